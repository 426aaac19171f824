"""What each kind of key accepts, what it refuses and how it says so, and the values that follow from several keys."""

import pytest

from lora_ms.adapters.methods import METHODS
from lora_ms.config import RunConfig, load_config
from lora_ms.config.problems import known_keys
from lora_ms.config.schema import without_effect
from lora_ms.errors import LoraMsError

_NAMES = [repr(name) for name in METHODS]
PET_TYPES = f"{', '.join(_NAMES[:-1])} or {_NAMES[-1]}"

KINDS = "CheckpointMonitor, MFLossMonitor, ObsMonitor, EvalCallBack, SummaryMonitor, ProfileMonitor"


def options(*texts: str) -> RunConfig:
    return load_config(None, options=texts)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # unknown keys: beside it, elsewhere, and where nothing is near
        ("runner_config.epoch=2", "unknown key runner_config.epoch; did you mean runner_config.epochs?"),
        (
            "train_dataset_dir=rows.jsonl",
            "unknown key train_dataset_dir; in a YAML it is train_dataset.data_loader.dataset_dir",
        ),
        ("lora_rank=2", "unknown key lora_rank; did you mean model.model_config.pet_config.lora_rank?"),
        (
            "pet_config.rank=2",
            "unknown key model.model_config.pet_config.rank; in a YAML it is model.model_config.pet_config.lora_rank",
        ),
        ("model.sizes.seq_length=2", "unknown key model.sizes; model has model_config, arch"),
        # other tools' words, and our own in another section
        ("model_name_or_path=m", "unknown key model_name_or_path; in a YAML it is load_checkpoint"),
        ("learning_rate=1e-4", "unknown key learning_rate; in a YAML it is lr_schedule.learning_rate"),
        ("runner_config.lr=1", "unknown key runner_config.lr; in a YAML it is lr_schedule.learning_rate"),
        ("optimizer.lr=1", "unknown key optimizer.lr; in a YAML it is optimizer.learning_rate"),
        ("bf16=True", "unknown key bf16; in a YAML it is model.model_config.compute_dtype: bfloat16"),
        ("bf16=False", "unknown key bf16; leave it out"),
        (
            "quantization_bit=8",
            "unknown key quantization_bit; in a YAML the nearest is model.model_config.quantization_config: nf4",
        ),
        ("warmup=100", "unknown key warmup; in a YAML it is lr_schedule.warmup_steps"),
        ("optimizer.lr_scheduler_type=a", "unknown key optimizer.lr_scheduler_type; in a YAML it is lr_schedule.type"),
        (
            "eval_dataset.dataset=x",
            "unknown key eval_dataset.dataset; in a YAML it is eval_dataset.data_loader.dataset_dir",
        ),
        (
            "runner_config.eval_batch_size=2",
            "unknown key runner_config.eval_batch_size; in a YAML it is eval_dataset.batch_size",
        ),
        (
            "eval_dataset.dataset_dir=x",
            "unknown key eval_dataset.dataset_dir; did you mean eval_dataset.data_loader.dataset_dir?",
        ),
        ("stage=sft", "unknown key stage"),
        # names of types that stand where a key should
        ("dpo={beta: 0.1}", "unknown key dpo; it is the type of an entry of objectives: [{type: dpo, …}]"),
        (
            "EvalCallBack=1",
            "unknown key EvalCallBack; it is the type of an entry of callbacks: [{type: EvalCallBack, …}]",
        ),
        (
            "evaluation.sets.kto={dataset_dir: a, metric: b}",
            "evaluation.sets.kto.metric expects 'loss', 'exact' or 'choice', got 'b'",
        ),
        ("objectives=[{type: kto, beat: 1}]", "unknown key objectives.0.beat; did you mean objectives.0.beta?"),
        (
            "callbacks=[{type: CheckpointMonitor, prefx: a}]",
            "unknown key callbacks.0.prefx; did you mean callbacks.0.prefix?",
        ),
        (
            "runner_wrapper.scale_sense={scale_facto: 2}",
            "unknown key runner_wrapper.scale_sense.scale_facto; did you mean runner_wrapper.scale_sense.scale_factor?",
        ),
        # types
        ("runner_config.epochs=two", "runner_config.epochs expects a whole number, got 'two'"),
        ("runner_config.epochs=2.0", "runner_config.epochs expects a whole number, got 2.0"),
        ("seed=True", "seed expects a whole number, got True"),
        ("seed={a: 1}", "seed expects a whole number, got {'a': 1}"),
        ("optimizer.eps=abc", "optimizer.eps expects a number, got 'abc'"),
        ("optimizer.eps=.nan", "optimizer.eps expects a number, got nan"),
        ("use_parallel=1", "use_parallel expects True or False, got 1"),
        ("use_parallel=TRUE!", "use_parallel expects True or False, got 'TRUE!'"),
        ("output_dir=2024", "output_dir expects text (put it in quotes), got 2024"),
        ("runner_config=3", "runner_config expects a mapping of keys, got 3"),
        ("callbacks=3", "callbacks expects a list, got 3"),
        (
            "pet_config.freeze_include=[1]",
            "model.model_config.pet_config.freeze_include expects a list of texts, got [1]",
        ),
        (
            "pet_config.target_modules='*q'",
            "model.model_config.pet_config.target_modules expects a regular expression "
            "(nothing to repeat at position 0), got '*q'",
        ),
        (
            "pet_config.target_modules=[]",
            "model.model_config.pet_config.target_modules expects a regular expression, "
            "a list of module names, or all-linear, got []",
        ),
        ("resume_training=3", "resume_training expects True, False or the name of a checkpoint, got 3"),
        ("data_fill=[a]", "data_fill expects a mapping of names to texts, got ['a']"),
        ("context.max_device_memory=59", 'context.max_device_memory expects a size such as "59GB", got 59'),
        ("runner_wrapper.scale_sense=big", "runner_wrapper.scale_sense expects a number, got 'big'"),
        (
            "model.model_config.eos_token_id=a",
            "model.model_config.eos_token_id expects a token number or a list of them, got 'a'",
        ),
        ("optimizer.betas=[1]", "optimizer.betas.1 is missing, got [1]"),
        ("optimizer.betas=[0.9, 2]", "optimizer: betas want two numbers from 0 to below 1, got [0.9, 2.0]"),
        ("train_dataset.data_loader.shuffle=", "train_dataset.data_loader.shuffle expects True or False, got None"),
        # ranges
        ("seed=4294967296", "seed expects 4294967295 or less, got 4294967296"),
        ("pet_config.lora_rank=0", "model.model_config.pet_config.lora_rank expects 1 or more, got 0"),
        ("pet_config.lora_alpha=0", "model.model_config.pet_config.lora_alpha expects more than 0, got 0"),
        ("pet_config.lora_dropout=1", "model.model_config.pet_config.lora_dropout expects less than 1, got 1"),
        ("model.model_config.top_p=1.5", "model.model_config.top_p expects 1 or less, got 1.5"),
        ("runner_config.max_steps=0", "runner_config: max_steps and sink_size want -1, or 1 and more; got 0"),
        # choices
        ("run_mode=chat", "run_mode expects 'finetune', 'train', 'eval' or 'predict', got 'chat'"),
        (
            "pet_config.pet_type=p_tuning",
            f"model.model_config.pet_config.pet_type expects {PET_TYPES}, got 'p_tuning'",
        ),
        # adapters
        (
            "pet_config.use_dorra=True",
            "unknown key model.model_config.pet_config.use_dorra; did you mean model.model_config.pet_config.use_dora?",
        ),
        (
            "pet_config.layer_groups=[{layers: 0-1, lora_rank: 4}, {layers: 2, lora_rank: 4, lora_alfa: 4}]",
            "unknown key model.model_config.pet_config.layer_groups.1.lora_alfa; "
            "did you mean model.model_config.pet_config.layer_groups.1.lora_alpha?",
        ),
        (
            "pet_config.layer_groups=[{lora_rank: 4}]",
            "model.model_config.pet_config.layer_groups.0.layers is missing, got {'lora_rank': 4}",
        ),
        (
            "pet_config.layers_to_transform=3-1",
            'model.model_config.pet_config.layers_to_transform expects layers such as 3, [0, 1, 8] or "0-3,8", '
            "counted from 0, got '3-1'",
        ),
        (
            "pet_config.layers_to_transform=[]",
            "model.model_config.pet_config.layers_to_transform expects at least one layer, and each once, got []",
        ),
        (
            "pet_config.rank_pattern={q_proj: 0}",
            "model.model_config.pet_config.rank_pattern.q_proj expects 1 or more, got 0",
        ),
        (
            "pet_config.alpha_pattern={'*q': 1}",
            "model.model_config.pet_config.alpha_pattern expects regular expressions as keys "
            "('*q': nothing to repeat at position 0), got {'*q': 1}",
        ),
        (
            "pet_config.rank_pattern=[8]",
            "model.model_config.pet_config.rank_pattern expects a mapping of module names, as regular expressions, "
            "to numbers, got [8]",
        ),
        (
            "pet_config.init_lora_weights=pisa",
            "model.model_config.pet_config.init_lora_weights expects True, gaussian, orthogonal, pissa, olora, loftq, "
            "eva, corda, lora_ga or pissa_niter_N (pissa?), got 'pisa'",
        ),
        ("pet_config.bias=some", "model.model_config.pet_config.bias expects 'none', 'all' or 'lora_only', got 'some'"),
        ("pet_config.tfinal=0", "model.model_config.pet_config.tfinal expects 1 or more, got 0"),
        ("pet_config.beta1=1", "model.model_config.pet_config.beta1 expects less than 1, got 1"),
        (
            "pet_config.neftune_noise_alpha=-1",
            "model.model_config.pet_config.neftune_noise_alpha expects 0 or more, got -1",
        ),
        (
            "pet_config={init_rank: 4, tinit: 2}",
            "model.model_config.pet_config: tinit, init_rank with pet_type lora: leave them out, or set "
            "pet_type: adalora",
        ),
        (
            "pet_config={pet_type: adalora, use_dora: True, loraplus_lr_ratio: 16}",
            "model.model_config.pet_config: use_dora, loraplus_lr_ratio with pet_type adalora: leave "
            "them out, or set pet_type: lora",
        ),
        (
            "pet_config={pet_type: adalora, lora_rank: 8, init_rank: 12}",
            "model.model_config.pet_config: init_rank 12 and lora_rank 8 differ: give one of the two",
        ),
        ("context.device_target=GPU", "context.device_target expects 'auto', 'Ascend' or 'CPU', got 'GPU'"),
        (
            "optimizer.type=Lion",
            "optimizer.type expects 'AdamW', 'FP32StateAdamWeightDecay', 'AdamWeightDecay', 'PmAdamW', 'AdamW8bit', "
            "'PagedAdamW', 'PagedAdamW8bit', 'adamw_8bit', 'paged_adamw_32bit' or 'paged_adamw_8bit', got 'Lion'",
        ),
        (
            "model.arch.type=GLM",
            "model.arch.type expects 'LlamaForCausalLM', 'Qwen2ForCausalLM' or 'Qwen3ForCausalLM', got 'GLM'",
        ),
        (
            "model.model_config.type=GLM",
            "model.model_config.type expects 'LlamaConfig', 'Qwen2Config' or 'Qwen3Config', got 'GLM'",
        ),
        (
            "lr_schedule.type=PolynomialWithWarmUpLR",
            "lr_schedule.type is not supported yet; use CosineWithWarmUpLR or "
            "LinearWithWarmUpLR, got 'PolynomialWithWarmUpLR'",
        ),
        (
            "lr_schedule.type=step",
            "lr_schedule.type expects one of ConstantWarmUpLR, LinearWithWarmUpLR, "
            "CosineWithWarmUpLR, constant, linear, cosine, got 'step'",
        ),
        (
            "lr_schedule.type=[linear]",
            "lr_schedule.type expects one of ConstantWarmUpLR, LinearWithWarmUpLR, "
            "CosineWithWarmUpLR, constant, linear, cosine, got ['linear']",
        ),
        (
            "callbacks=[{type: LossMonitor}]",
            f"callbacks.0.type expects one of {KINDS}, got 'LossMonitor' (nearest: MFLossMonitor)",
        ),
        ("callbacks=[{prefix: a}]", f"callbacks.0.type is missing: give one of {KINDS}"),
        # two keys that contradict each other
        (
            "lr_schedule={warmup_ratio: 0.1, warmup_steps: 3}",
            "lr_schedule: warmup_ratio 0.1 and warmup_steps 3 are both given: set one of them to null",
        ),
        (
            "optimizer={betas: [0.9, 0.95], beta2: 0.99}",
            "optimizer: betas [0.9, 0.95] and beta1, beta2 [0.9, 0.99] differ: give one of the two",
        ),
        (
            "callbacks=[{type: CheckpointMonitor}, {type: CheckpointMonitor}]",
            "callbacks: CheckpointMonitor is given twice; keep one",
        ),
    ],
)
def test_refusals(text, message):
    with pytest.raises(LoraMsError) as caught:
        options(text)
    assert str(caught.value) == f"configuration: {message}"


def test_all_problems_in_one_line():
    with pytest.raises(LoraMsError) as caught:
        options("sed=1", "runner_config.epoch=1", "runner_config.batch_size=0")
    assert str(caught.value) == (
        "configuration: runner_config.batch_size expects 1 or more, got 0; unknown key runner_config.epoch; "
        "did you mean runner_config.epochs?; unknown key sed; did you mean seed?"
    )


def test_problems_that_are_not_listed_are_counted():
    with pytest.raises(LoraMsError, match="; unknown key bf16; .* bfloat16; and 2 more faults$"):
        options(*(f"zz{i}=1" for i in range(9)), "bf16=True", "zz9=1", "zz10=1")


def test_betas_in_either_spelling():
    assert options().optimizer.betas == (0.9, 0.999)
    assert options("optimizer.beta2=0.95").optimizer.betas == (0.9, 0.95)
    assert options("optimizer.betas=[0.8, 0.9]").optimizer.betas == (0.8, 0.9)
    assert options("optimizer={betas: [0.8, 0.9], beta1: 0.8, beta2: 0.9}").optimizer.betas == (0.8, 0.9)


def test_which_learning_rate():
    assert options().learning_rate == 1e-4
    assert options("optimizer.learning_rate=1e-3").learning_rate == 1e-3
    both = options("optimizer.learning_rate=1e-3", "lr_schedule.learning_rate=1e-2")
    assert both.learning_rate == 1e-2
    assert both.notices() == ["no effect here: optimizer.learning_rate (lr_schedule.learning_rate 0.01 is used)"]


def test_which_batch_size():
    assert (options().batch_size, options().eval_batch_size) == (1, 1)
    datasets = options("train_dataset.batch_size=4", "eval_dataset.batch_size=3")
    assert (datasets.batch_size, datasets.eval_batch_size, datasets.notices()) == (4, 3, [])
    runner = options("runner_config.batch_size=2", "train_dataset.batch_size=4", "eval_dataset.batch_size=2")
    assert (runner.batch_size, runner.eval_batch_size) == (2, 2)
    assert runner.notices() == ["no effect here: train_dataset.batch_size (runner_config.batch_size 2 is used)"]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (
            ["train_dataset.mix=[{dataset_dir: a, weight: 1}]", "train_dataset.data_loader.dataset_dir=b"],
            "train_dataset.data_loader.dataset_dir (train_dataset.mix is used)",
        ),
        (["eval_dataset.data_loader.dataset_dir=a"], "eval_dataset (do_eval is False)"),
        (["evaluation.prompts=[a]"], "evaluation.prompts (nothing is evaluated)"),
        (["evaluation.prompts_file=a"], "evaluation.prompts_file (of lora-ms eval)"),
    ],
)
def test_what_is_given_in_vain(given, named):
    assert options(*given).notices() == [f"no effect here: {named}"]


def test_what_is_evaluated_is_not_in_vain():
    given = ("eval_dataset.data_loader.dataset_dir=a", "evaluation.prompts=[a]")
    assert options(*given, "do_eval=True").notices() == []
    assert options(*given, "run_mode=eval").notices() == []


def test_without_a_yaml_there_are_callbacks_to_override():
    assert options("callbacks.1.save_checkpoint_steps=7").save_steps == 7


def test_clipping_and_checkpoints():
    assert (options().max_grad_norm, options().save_steps, options().keep_checkpoint_max) == (1.0, 0, 5)
    assert options("runner_wrapper.max_grad_norm=0.3").max_grad_norm == 0.3
    assert options("runner_wrapper.use_clip_grad=False").max_grad_norm is None
    monitor = options("callbacks=[{type: CheckpointMonitor, save_checkpoint_steps: 7, keep_checkpoint_max: 2}]")
    assert (monitor.save_steps, monitor.keep_checkpoint_max) == (7, 2)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("ConstantWarmUpLR", "constant"),
        ("LinearWithWarmUpLR", "linear"),
        ("CosineWithWarmUpLR", "cosine"),
        ("constant", "constant"),
        ("linear", "linear"),
        ("cosine", "cosine"),
    ],
)
def test_schedules(text, kind):
    assert options(f"lr_schedule.type={text}").lr_schedule.kind == kind


def test_one_warmup_may_be_zero_or_null():
    schedule = options("lr_schedule={warmup_ratio: 0, warmup_steps: 3}").lr_schedule
    assert (schedule.warmup_ratio, schedule.warmup_steps) == (0, 3)
    schedule = options("lr_schedule={warmup_ratio: 0.1, warmup_steps: null}").lr_schedule
    assert (schedule.warmup_ratio, schedule.warmup_steps) == (0.1, None)


@pytest.mark.parametrize(
    ("text", "value"),
    [("True", True), ("False", False), ("[7, 7]", 14), ("[0, 0]", 0), ("3", 3), ("0-2,5", [0, 1, 2, 5])],
)
def test_recompute_in_all_spellings(text, value):
    found = options(f"recompute_config.recompute={text}").recompute_config.recompute
    assert (type(found), found) == (type(value), value)


def test_one_text_is_one_entry():
    assert options("pet_config.exclude_layers=lm_head").pet_config.exclude_layers == ["lm_head"]
    assert options("pet_config.exclude_layers=null").pet_config.exclude_layers == []
    assert options("pet_config.target_modules=q_proj").pet_config.target_modules == "q_proj"
    assert options("pet_config.target_modules=[q_proj]").pet_config.target_modules == ["q_proj"]


@pytest.mark.parametrize(
    ("text", "layers"),
    [("3", [3]), ("0-3", [0, 1, 2, 3]), ("'8, 0-2'", [0, 1, 2, 8]), ("[1, 5]", [1, 5]), ("[0-1, 7]", [0, 1, 7])],
)
def test_layers_in_every_spelling(text, layers):
    assert options(f"pet_config.layers_to_transform={text}").pet_config.layers_to_transform == layers


def test_alpha_keeps_its_kind():
    assert type(options("pet_config.lora_alpha=16").pet_config.lora_alpha) is int
    assert options("pet_config.lora_alpha=1.5").pet_config.lora_alpha == 1.5


def test_empty_sections_and_paths_are_defaults():
    assert (
        options("trainer=null", "model=null", "callbacks=null", "load_checkpoint=null", "resume_training=''")
        == options()
    )


IDLE = [path for path, field in known_keys(RunConfig).items() if without_effect(field)]


@pytest.mark.parametrize("path", IDLE)
def test_notice_names_a_key_without_effect(path):
    section, _, key = path.rpartition(".")
    if section.startswith("callbacks."):
        kind = section.removeprefix("callbacks.")
        config = options(f"callbacks=[{{type: {kind}, {key}: given}}]")
        named = section if kind == "ObsMonitor" else path  # the one that is idle as a whole
    else:
        config, named = options(f"{path}=given"), path
    assert config.notices() == [f"no effect here: {named}"]


def test_notices_are_one_sorted_line():
    config = options("auto_tune=True", "context.mode=1", "callbacks=[{type: ObsMonitor}]", "trainer.model_name=a")
    assert config.notices() == ["no effect here: auto_tune, callbacks.ObsMonitor, context.mode, trainer.model_name"]
    assert options("auto_tune=False", "context.mode=0").notices() == []


def test_keys_with_effect_are_not_declared_idle():
    assert not {
        "seed",
        "load_checkpoint",
        "resume_training",
        "runner_config.sink_size",
        "optimizer.weight_decay",
        "lr_schedule.lr_end",
        "train_dataset.drop_remainder",
        "context.max_device_memory",
        "recompute_config.recompute",
        "processor.tokenizer.vocab_file",
        "model.model_config.theta",
        "callbacks.CheckpointMonitor.keep_checkpoint_max",
        "runner_wrapper.max_grad_norm",
    } & set(IDLE)


def test_logging_steps_are_the_runners_or_the_loss_monitors():
    monitor = "callbacks=[{type: MFLossMonitor, per_print_times: 7}]"
    assert [options(*o).logging_steps for o in ((), (monitor,), (monitor, "runner_config.logging_steps=3"))] == [
        1,
        7,
        3,
    ]


def test_what_is_profiled():
    monitor = "callbacks=[{type: ProfileMonitor, start_step: 3, stop_step: 4, output_path: p}]"
    assert options().profiling is None
    found = options("profile=True", "profile_start_step=2").profiling
    assert (found.start_step, found.stop_step, found.output_path) == (2, 10, "")
    found = options("profile=True", monitor).profiling
    assert (found.start_step, found.stop_step, found.output_path) == (3, 4, "p")


def test_what_reports_go_to():
    given = (["none"], "none", "tensorboard", ["tensorboard"], None)
    assert [RunConfig(report_to=value).report_to for value in given] == [[], [], ["tensorboard"], ["tensorboard"], []]
    assert options().summary is None
    summary = options("callbacks=[{type: SummaryMonitor, summary_dir: s}]").summary
    assert (summary.summary_dir, summary.collect_freq) == ("s", 10)


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("report_to=comet", "report_to expects none or tensorboard, wandb, swanlab, mlflow "
         "(MindSpore's summaries: SummaryMonitor in callbacks), got 'comet'"),
        ("profile_start_step=11", "profile_start_step 11 is after profile_stop_step 10: swap them"),
        ("callbacks=[{type: ProfileMonitor, stop_step: 0}]", "callbacks.0.stop_step expects 1 or more, got 0"),
        ("callbacks=[{type: ProfileMonitor, start_step: 20}]",
         "callbacks.0: start_step 20 is after stop_step 10: swap them"),
        ("optimizer.groups=[{learning_rate: 1}]", "optimizer.groups.0.params is missing, got {'learning_rate': 1}"),
        ("optimizer.groups=[{params: '('}]", "optimizer.groups.0.params expects a regular expression (missing ), "
         "unterminated subpattern at position 0), got '('"),
        ("optimizer.groups=[{params: head, lr: 1}]",
         "unknown key optimizer.groups.0.lr"),
        ("optimizer.groups=[{params: head, weight_decay: -1}]",
         "optimizer.groups.0.weight_decay expects 0 or more, got -1"),
    ],
)  # fmt: skip
def test_wrong_reports_profiles_and_groups(option, reason):
    with pytest.raises(LoraMsError) as caught:
        options(option)
    assert reason in str(caught.value)


def test_a_callback_takes_what_it_says_and_no_more():
    """EvalCallBack's default interval is no wish of the user's; one that it has stands before the top level's, told."""
    found = options("callbacks=[{type: EvalCallBack}]", "eval_step_interval=20")
    assert found.eval_intervals == (20, 0) and found.notices() == []
    found = options("callbacks=[{type: EvalCallBack, step_interval: 30}]", "eval_step_interval=20", "do_eval=False")
    assert found.eval_intervals == (30, 0)
    assert found.notices() == [
        "no effect here: do_eval (there is an EvalCallBack, or a validation_split), "
        "eval_step_interval (EvalCallBack's step_interval 30 is used)"
    ]
    assert options("callbacks=[{type: EvalCallBack}]").eval_intervals == (100, 0)


def test_rows_that_are_compared_need_more_than_one():
    with pytest.raises(LoraMsError, match="kto compares the rows of a micro-batch, and context.low_memory makes these"):
        options("objectives=[{type: kto}]", "context.low_memory=True", "runner_config.batch_size=4")


def test_a_preset_does_not_make_an_adapter_of_none(tmp_path):
    file = tmp_path / "full.yaml"
    file.write_text("model: {model_config: {pet_config: null}}\n")
    with pytest.raises(LoraMsError, match="--preset few_rows is for adapters, and pet_config is null"):
        load_config(str(file), preset="few_rows")

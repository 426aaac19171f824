"""What a user can do wrong with MindFormers, in one line; and what its configuration is made of. MindFormers itself
is not needed here."""

import importlib.util
import sys
from importlib import metadata
from types import ModuleType

import numpy as np
import pytest

from lora_ms.bridge import model, package, settings, trainer
from lora_ms.bridge.layout import Heads
from lora_ms.cli.main import main
from lora_ms.config import load_config
from lora_ms.errors import LoraMsError
from lora_ms.models.decoder import DecoderConfig


@pytest.fixture
def mindformers(monkeypatch):
    """``mindformers(version, *names)``: a MindFormers that has these names alone, in their modules."""

    def install(version: str, *names: str) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
        monkeypatch.setattr(metadata, "version", lambda name: version)
        for module in {*package.NAMES.values()}:
            found = ModuleType(module)
            for name in names:
                setattr(found, name, object())
            monkeypatch.setitem(sys.modules, module, found)

    return install


def refusal(capsys, *arguments) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    printed = capsys.readouterr().err.strip()
    assert printed.startswith("error: ") and "\n" not in printed
    return printed


@pytest.fixture
def command(reference, tmp_path):
    """A run with MindFormers on a row."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"input_ids": [4, 5, 6], "labels": [-100, 5, 6]}\n' * 3)
    model = reference / "models" / "qwen2"
    flags = ("--load_checkpoint", model, "--train_dataset_dir", rows, "--output_dir", tmp_path / "out")
    return ("finetune", *flags, "--backend", "mindformers", "--device_target", "CPU")


@pytest.mark.parametrize("absent", ["mindformers", "mindpet"])
def test_not_installed(capsys, monkeypatch, command, tmp_path, absent):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == absent else find(name) or object())
    line = refusal(capsys, *command)
    assert f"backend mindformers needs {absent}: pip install '.[mindformers]'" in line
    assert not (tmp_path / "out").exists()


def test_a_version_that_was_not_tested_is_named(mindformers):
    mindformers("1.9.9", *package.NAMES)
    found, notices = package.load()
    assert set(vars(found)) == set(package.NAMES)
    assert notices == ["warning: MindFormers 1.9.9 is not among the versions tested (1.9.0)"]
    mindformers("1.9.0", *package.NAMES)
    assert package.load()[1] == []


def test_a_name_that_moved_is_one_line(mindformers, command, capsys):
    mindformers("3.0.0", *(name for name in package.NAMES if name != "LlamaForCausalLM"))
    line = refusal(capsys, *command)
    assert "MindFormers 3.0.0 has no mindformers.models.llama.LlamaForCausalLM that works here" in line
    assert "pip install" in line


def test_a_broken_package_is_one_line(mindformers, command, capsys, monkeypatch):
    mindformers("3.0.0", *package.NAMES)
    monkeypatch.setitem(sys.modules, "mindformers.trainer", None)  # its import fails
    assert "has no mindformers.trainer.Trainer that works here" in refusal(capsys, *command)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ("--pet_config.use_dora", "True"),
            "MindPet's LoRA does not support use_dora: set pet_config.lora_impl: lora_ms",
        ),
        (("--pet_config.layer_groups", "[{layers: 0, lora_rank: 2}]"), "MindPet's LoRA does not support layer_groups"),
        (("--pet_config.pet_type", "adalora"), "does not support pet_config.pet_type adalora"),
        (("--pet_config.neftune_noise_alpha", "5"), "does not support pet_config.neftune_noise_alpha"),
        (("--train_dataset.validation_split", "0.1"), "does not support train_dataset.validation_split"),
        (("--report_to", "tensorboard", "--profile", "True"), "does not support report_to, profile"),
        (("--pet_config", "null"), "unknown flag"),
        (("--options", "pet_config=null"), "backend mindformers trains adapters: give pet_config"),
        (("--resume_training", "True"), "expects MindFormers' checkpoint in load_checkpoint"),
        (("--backend", "mindformer"), "backend expects 'native' or 'mindformers', got 'mindformer'"),
        (("--pet_config.lora_impl", "peft"), "lora_impl expects 'mindpet' or 'lora_ms', got 'peft'"),
        (("--runner_config.batchsize", "2"), "runner_config.batch_size?"),
    ],
)
def test_what_this_backend_goes_without(mindformers, command, capsys, tmp_path, flags, said):
    mindformers("1.9.0", *package.NAMES)
    assert said in refusal(capsys, *command, *flags)
    assert not (tmp_path / "out").exists()


def test_its_evaluation_answers_no_questions(mindformers, command, capsys):
    mindformers("1.9.0", *package.NAMES)
    assert "has no evaluation.prompts_file" in refusal(capsys, "eval", *command[1:], "--prompts_file", "q.jsonl")


def test_its_evaluation_is_of_one_process(mindformers, command, capsys, tmp_path):
    mindformers("1.9.0", *package.NAMES)
    line = refusal(capsys, "eval", *command[1:], "--use_parallel", "True")
    assert "eval with backend mindformers is of one process: give --use_parallel False" in line
    assert not (tmp_path / "out").exists()


def test_models_that_its_llama_cannot_be():
    sizes = {"vocab_size": 8, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 4}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 1e4}
    sizes |= {"rope_scaling": None, "max_position_embeddings": 64, "attention_bias": False, "qk_norm": False}
    sizes |= {"tie_word_embeddings": True, "eos_token_ids": ()}
    assert model.llama_sizes(DecoderConfig(**sizes), 32)["num_heads"] == 4
    for change, said in (
        ({"qk_norm": True}, "Qwen3 is none of MindFormers' Llama models"),
        ({"unrotated_layers": (0,)}, "Llama rotates queries and keys in all layers, this model in some"),
        ({"head_dim": 8}, "head_dim 8 times 4 heads is not hidden_size 16"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling yarn is not supported"),
    ):
        with pytest.raises(LoraMsError, match=said):
            model.llama_sizes(DecoderConfig(**{**sizes, **change}), 32)


def test_sections_reach_mindformers_as_they_stand(tmp_path):
    """Keys and types that our own schema does not have, too; a text that is a number becomes one."""
    file = tmp_path / "run.yaml"
    file.write_text(
        "backend: mindformers\nlr_schedule: {type: CosineWithRestartsAndWarmUpLR, learning_rate: 1e-4, own: 3}\n"
        "callbacks: [{type: TrainingStateMonitor, step_interval: 2}]\nparallel: {dataset_strategy: [[2, 1]]}\n"
        "pet_config: {lora_rank: 2}\n"
    )
    config = load_config(str(file), flags={"lr_schedule.learning_rate": 0.5}, free_form=["optimizer.eps=1e-6"])
    found = settings.for_mindformers({}, config.mindformers_sections, ["t.mindrecord"], [], 0)
    assert found["lr_schedule"] == {"type": "CosineWithRestartsAndWarmUpLR", "learning_rate": 0.5, "own": 3}
    assert found["callbacks"] == [{"type": "TrainingStateMonitor", "step_interval": 2}]
    assert found["parallel"] == {"dataset_strategy": [[2, 1]]}
    assert found["optimizer"] == {"type": "AdamW", "betas": [0.9, 0.999], "eps": 1e-6, "weight_decay": 0.0}
    assert found["train_dataset"]["data_loader"]["dataset_dir"] == "t.mindrecord"
    with pytest.raises(LoraMsError, match="CosineWithRestartsAndWarmUpLR"):  # as native has it
        load_config(str(file), flags={"backend": "native"})


@pytest.mark.parametrize(
    ("sections", "schedule", "rate"),
    [
        ({}, {"type": "CosineWithWarmUpLR", "learning_rate": 1e-4, "total_steps": 4}, None),
        (
            {"lr_schedule": {"learning_rate": 2e-5}},
            {"type": "CosineWithWarmUpLR", "learning_rate": 2e-5, "total_steps": 4},
            None,
        ),
        ({"optimizer": {"type": "AdamW", "learning_rate": 2e-5}}, None, 2e-5),
    ],
)
def test_the_rate_is_the_users(sections, schedule, rate):
    """MindFormers lets a schedule replace the optimiser's rate; a section of flags alone has no type."""
    found = settings.for_mindformers({}, sections, ["t.mindrecord"], [], 4)
    assert found.get("lr_schedule") == schedule and found["optimizer"].get("learning_rate") == rate


def asked(**given) -> dict:
    return settings.for_mindformers(given, {}, ["train.mindrecord"], [], 0)


def test_what_is_otherwise_on_a_cpu_is_said():
    found, llama = (
        asked(runner_config={"batch_size": 2, "gradient_accumulation_steps": 4}),
        {"compute_dtype": "float32"},
    )
    lines = settings.adapt_to_cpu(found, llama)
    assert found["runner_config"] == {"epochs": 1, "batch_size": 8, "sink_mode": False}
    assert "batch_size 8: 4 accumulated micro-batches in one" in lines
    assert any("in place of param_init_type float16" in line for line in lines)
    assert llama["use_flash_attention"] is llama["fused_rms_norm"] is False and llama["use_rope_slice"] is True
    again = asked(runner_config={"sink_mode": False}, train_dataset={"num_parallel_workers": 1})
    lines = settings.adapt_to_cpu(
        again, {"fused_rms_norm": False, "use_rope_slice": True, **dict.fromkeys(settings.TYPES, "float32")}
    )
    assert len(lines) == 1 and "runner_wrapper" in lines[0]  # the rest is as it has to be
    with pytest.raises(LoraMsError, match="need Ascend; give --use_parallel False"):
        settings.adapt_to_cpu(asked(use_parallel=True), {})


def test_keys_of_ours_that_change_nothing_are_named():
    given = {"train_dataset": {"packing": True, "length_buckets": 1}, "report_to": ["tensorboard"]}
    given |= {"eval_dataset": {"packing": False}, "runner_config": {"batch_size": 2, "adaptive_batch": True}}
    assert settings.without_effect(given) == ["report_to", "runner_config.adaptive_batch", "train_dataset.packing"]
    found = asked(**given)
    assert "report_to" not in found and "adaptive_batch" not in found["runner_config"]
    assert "packing" not in found["train_dataset"]


def test_tokens_and_labels_of_a_batch():
    labels = np.array([[-100, -100, 5, 6, -100], [-100, 7, -100, -100, -100], [-100] * 5])
    # four tokens are predicted in each row: up to the last label three, one and none
    assert trainer.counts(labels) == (4, 3)


def test_scores_of_a_network():
    """Row by row: the mean of -log of the softmax at the labels, shifted by one."""
    from mindspore import Tensor

    rng = np.random.default_rng(0)
    logits = rng.standard_normal((3, 4, 5)).astype(np.float32)
    labels = np.array([[-100, 1, 2, -100], [0, 3, -100, 4], [-100, -100, -100, 2]])

    class Network:
        def set_train(self, mode):
            return self

        def __call__(self, ids):
            return (Tensor(logits[ids.asnumpy()[:, 0]]),)

    rows = np.repeat(np.arange(3, dtype=np.int32)[:, None], 4, axis=1)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    wanted = [(0, 0, 1), (0, 1, 2), (1, 0, 3), (1, 2, 4), (2, 2, 2)]  # row, place before the label, label
    right = [log_p[row, place].argmax() == label for row, place, label in wanted]
    loss, accuracy, tokens = trainer.scores(Network(), rows, labels, 2)
    assert tokens == 5 and accuracy == pytest.approx(np.mean(right))
    assert loss == pytest.approx(-np.mean([log_p[place] for place in wanted]), rel=1e-5)


def test_heads_of_a_model():
    assert Heads(4, 2, 8).heights("x.qkv_proj", 64) == (32, 16, 16)
    assert Heads(4, 2, 8).heights("x.gate_up_proj", 10) == (5, 5)

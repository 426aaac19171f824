"""The YAMLs in configs/, and YAMLs as MindFormers' users have them."""

from pathlib import Path

import pytest

from lora_ms.config import PetConfig, dump_config, load_config

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "configs").rglob("*.yaml"))
# file -> hidden, layers, heads, kv heads, head_dim, ffn, vocabulary, eps, theta, biases, tied head
SIZES = {
    "lora_llama2_7b": (4096, 32, 32, 32, None, 11008, 32000, 1e-5, 1e4, None, False),
    "lora_llama2_7b_layered": (4096, 32, 32, 32, None, 11008, 32000, 1e-5, 1e4, None, False),
    "qlora_llama2_7b_layered": (4096, 32, 32, 32, None, 11008, 32000, 1e-5, 1e4, None, False),
    "lora_llama2_7b_8p": (4096, 32, 32, 32, None, 11008, 32000, 1e-5, 1e4, None, False),
    "lora_llama2_70b_8p": (8192, 80, 64, 8, None, 28672, 32000, 1e-5, 1e4, None, False),
    "lora_llama2_13b": (5120, 40, 40, 40, None, 13824, 32000, 1e-5, 1e4, None, False),
    "lora_llama3_1_8b": (4096, 32, 32, 8, None, 14336, 128256, 1e-5, 5e5, None, False),
    "lora_qwen2_0_5b_instruct": (896, 24, 14, 2, None, 4864, 151936, 1e-6, 1e6, True, True),
    "lora_qwen2_5_0_5b": (896, 24, 14, 2, None, 4864, 151936, 1e-6, 1e6, True, True),
    "lora_qwen2_5_7b": (3584, 28, 28, 4, None, 18944, 152064, 1e-6, 1e6, True, False),
    "lora_qwen3_0_6b": (1024, 28, 16, 8, 128, 3072, 151936, 1e-6, 1e6, None, True),
    "lora_qwen3_8b": (4096, 36, 32, 8, 128, 12288, 151936, 1e-6, 1e6, None, False),
    "lora_deepseek_r1_distill_qwen_1_5b": (1536, 28, 12, 2, None, 8960, 151936, 1e-6, 1e4, True, False),
    **{
        f"lora_deepseek_r1_distill_qwen_1_5b_orangepi_{gb}gb": (
            *(1536, 28, 12, 2, None, 8960, 151936),
            *(1e-6, 1e4, True, False),
        )
        for gb in (8, 16, 24)
    },
    "lora_tiny": (None,) * 11,
    "adalora_tiny": (None,) * 11,
    "dora_tiny": (None,) * 11,
    "hybrid_tiny": (None,) * 11,
    "dpo_tiny": (None,) * 11,
}

ARTICLE = """
model:
  model_config:
    type: LlamaConfig
    batch_size: 1
    seq_length: 4096
    hidden_size: 4096
    num_layers: 32
    num_heads: 32
    vocab_size: 32000
    compute_dtype: "float16"
    pet_config:
      pet_type: lora
      lora_rank: 16
      lora_alpha: 16
      lora_dropout: 0.05
      target_modules: '.*wq|.*wk|.*wv|.*wo'
  arch:
    type: LlamaForCausalLM
"""

# Every key of MindFormers' Llama 2 LoRA YAML, with values away from our defaults where MindFormers' own are.
MINDFORMERS = """
{seed: 0, output_dir: ./output, load_checkpoint: '', src_strategy_path_or_dir: '', auto_trans_ckpt: False,
 only_save_strategy: False, resume_training: False, run_mode: finetune, do_eval: False, use_parallel: True,
 trainer: {type: CausalLanguageModelingTrainer, model_name: llama2_7b_lora},
 runner_config: {epochs: 2, batch_size: 2, sink_mode: True, sink_size: 2, gradient_accumulation_steps: 1},
 optimizer: {type: FP32StateAdamWeightDecay, beta1: 0.9, beta2: 0.95, eps: 1.e-8, learning_rate: 1e-5},
 lr_schedule: {type: CosineWithWarmUpLR, learning_rate: 1e-5, lr_end: 0, warmup_ratio: 0.03, total_steps: -1},
 train_dataset: &train {data_loader: {type: MindDataset, dataset_dir: rows.mindrecord, shuffle: True},
  input_columns: [input_ids, labels], num_parallel_workers: 8, python_multiprocessing: False, drop_remainder: True,
  batch_size: 4, construct_args_key: [input_ids], repeat: 1, numa_enable: False, prefetch_size: 1},
 train_dataset_task: {type: CausalLanguageModelDataset, dataset_config: *train},
 eval_dataset: &eval {data_loader: {type: MindDataset, dataset_dir: '', shuffle: False}, input_columns: [input_ids],
  drop_remainder: False},
 eval_dataset_task: {type: CausalLanguageModelDataset, dataset_config: *eval},
 parallel: {parallel_mode: 1, gradients_mean: False, enable_alltoall: False, full_batch: True,
  search_mode: sharding_propagation, enable_parallel_optimizer: True,
  strategy_ckpt_config: {save_file: ./ckpt_strategy.ckpt, only_trainable_params: False},
  parallel_optimizer_config: {gradient_accumulation_shard: False, parallel_optimizer_threshold: 64},
  pipeline_config: {pipeline_interleave: False, pipeline_scheduler: '1f1b'}},
 parallel_config: {data_parallel: 8, model_parallel: 1, pipeline_stage: 1, use_seq_parallel: False,
  micro_batch_num: 64, vocab_emb_dp: True, gradient_aggregation_group: 4},
 micro_batch_interleave_num: 1,
 recompute_config: {recompute: [7, 7], select_recompute: False, parallel_optimizer_comm_recompute: False,
  mp_comm_recompute: True, recompute_slice_activation: True},
 callbacks: [{type: MFLossMonitor}, {type: CheckpointMointor, prefix: llama_7b_lora, save_checkpoint_steps: 100,
  integrated_save: False, async_save: False}, {type: ObsMonitor}],
 context: {mode: 0, device_target: Ascend, max_call_depth: 10000, max_device_memory: 59GB, save_graphs: False,
  save_graphs_path: ./graph, device_id: 0, mempool_block_size: 52.5GB, jit_config: {jit_level: O1}},
 model: {model_config: {type: LlamaConfig, batch_size: 1, seq_length: 4096, hidden_size: 4096, num_layers: 32,
  num_heads: 32, n_kv_heads: 32, max_position_embedding: 4096, vocab_size: 32000, multiple_of: 256, rms_norm_eps: 1e-5,
  bos_token_id: 1, eos_token_id: 2, pad_token_id: 0, ignore_token_id: -100, compute_dtype: bfloat16,
  layernorm_compute_type: float32, softmax_compute_type: float32, rotary_dtype: float16, param_init_type: float32,
  use_past: False, extend_method: None, scaling_factor: 1.0, theta: 10000, use_flash_attention: True, offset: 0,
  fine_grain_interleave: 1, checkpoint_name_or_path: '', repetition_penalty: 1, max_decode_length: 512, top_k: 3,
  top_p: 1, do_sample: False, qkv_concat: false,
  rotary_emb_base: 1000000, compute_in_2d: True, initializer_range: 0.02, kv_channels: 128,
  pet_config: {pet_type: lora, lora_rank: 16, lora_alpha: 16, lora_dropout: 0.05,
   target_modules: '.*wq|.*wk|.*wv|.*wo', exclude_layers: null, freeze_include: ['*'], freeze_exclude: ['*lora*'],
   lora_a_init: normal}},
  arch: {type: LlamaForCausalLM}},
 processor: {return_tensors: ms, type: LlamaProcessor, tokenizer: {type: LlamaTokenizer, unk_token: <unk>}},
 metric: {type: PerplexityMetric},
 runner_wrapper: {type: MFTrainOneStepCell, enable_check_overflow: True, use_clip_grad: True, max_grad_norm: 1.0,
  scale_sense: {type: DynamicLossScaleUpdateCell, loss_scale_value: 65536, scale_factor: 2, scale_window: 1000}},
 eval_callbacks: [{type: ObsMonitor}], auto_tune: False, filepath_prefix: ./autotune, autotune_per_step: 10,
 profile: False, profile_start_step: 1, profile_stop_step: 10, init_start_profile: False, profile_communication: False,
 profile_memory: True, profiler_level: 2, layer_scale: False, layer_decay: 0.65, lr_scale_factor: 256,
 remote_save_url: obs}
"""
MINDFORMERS_WITHOUT_EFFECT = (
    "no effect here: callbacks.CheckpointMonitor.prefix, callbacks.ObsMonitor, context.jit_config, "
    "context.mempool_block_size, eval_callbacks, model.model_config.compute_in_2d, "
    "model.model_config.initializer_range, model.model_config.kv_channels, "
    "model.model_config.pet_config.lora_a_init, model.model_config.rotary_dtype, model.model_config.rotary_emb_base, "
    "parallel.enable_parallel_optimizer, parallel.parallel_optimizer_config, parallel.pipeline_config, "
    "parallel.strategy_ckpt_config, parallel_config.micro_batch_num, processor.tokenizer.unk_token, profiler_level, "
    "recompute_config.recompute_slice_activation, remote_save_url, runner_wrapper.enable_check_overflow, "
    "train_dataset.batch_size (runner_config.batch_size 2 is used), train_dataset.construct_args_key, "
    "trainer.model_name"
)


def write(folder: Path, text: str) -> str:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shipped_yaml_has_the_published_sizes_and_no_idle_key(path, tmp_path):
    config = load_config(str(path))
    sizes = config.model.sizes
    assert SIZES[path.stem] == (
        sizes.hidden_size,
        sizes.num_layers,
        sizes.num_heads,
        sizes.n_kv_heads,
        sizes.head_dim,
        sizes.intermediate_size,
        sizes.vocab_size,
        sizes.rms_norm_eps,
        sizes.theta,
        sizes.qkv_has_bias,
        sizes.tie_word_embeddings,
    )
    assert config.notices() == []
    dump_config(config, str(tmp_path / "config.yaml"))
    assert load_config(str(tmp_path / "config.yaml")) == config


def test_every_expected_yaml_is_there():
    assert sorted(path.stem for path in FILES) == sorted(SIZES)


@pytest.mark.parametrize(("gb", "length"), [(8, 64), (16, 256), (24, 512)])
def test_orange_pi_settings(gb, length):
    """The course's adapter, and lines that fit the board."""
    name = f"configs/deepseek_r1_distill/lora_deepseek_r1_distill_qwen_1_5b_orangepi_{gb}gb.yaml"
    config = load_config(str(ROOT / name))
    assert (config.context.low_memory, config.recompute_config.recompute, config.batch_size) == (True, True, 1)
    assert (config.pet_config.lora_rank, config.pet_config.lora_alpha, config.pet_config.lora_dropout) == (8, 32, 0.1)
    assert (config.model.sizes.compute_dtype, config.model.sizes.seq_length) == ("float16", length)


def test_court_drama_settings():
    config = load_config(str(ROOT / "configs/deepseek_r1_distill/lora_deepseek_r1_distill_qwen_1_5b.yaml"))
    assert config.pet_config == PetConfig(lora_rank=12, lora_alpha=48, lora_dropout=0.15)
    assert config.model.sizes.compute_dtype == "float16"
    assert config.learning_rate == 1.5e-5
    assert (config.runner_config.epochs, config.runner_config.gradient_accumulation_steps) == (5, 4)


def test_tiny_settings():
    config = load_config(str(ROOT / "configs/tiny/lora_tiny.yaml"))
    assert config.pet_config == PetConfig(lora_rank=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear")
    assert (config.load_checkpoint, config.train_dataset.data_loader.dataset_dir, config.output_dir) == (
        "examples/tiny/model",
        "examples/identity.jsonl",
        "./output",
    )
    assert (config.runner_config.epochs, config.batch_size, config.learning_rate) == (8, 8, 2e-3)
    assert (config.lr_schedule.kind, config.lr_schedule.warmup_ratio, config.save_steps) == ("cosine", 0.03, 0)
    assert (config.model.sizes.seq_length, config.context.device_target) == (128, "CPU")


def test_layered_settings():
    pet = load_config(str(ROOT / "configs/llama2/lora_llama2_7b_layered.yaml")).pet_config
    assert [(g.layers, g.lora_rank, g.lora_alpha) for g in pet.layer_groups] == [
        (list(range(11)), 64, None),
        (list(range(11, 32)), 16, None),
    ]


def test_layers_of_four_bits():
    config = load_config(str(ROOT / "configs/llama2/qlora_llama2_7b_layered.yaml"))
    assert [(g.layers, g.lora_rank, g.bits) for g in config.pet_config.layer_groups] == [
        (list(range(11)), 64, None),
        (list(range(11, 32)), 16, "nf4"),
    ]
    assert config.model.sizes.quantization_config["bnb_4bit_use_double_quant"] is True


def test_the_other_tiny_settings_differ_in_pet_config_and_adaloras_rate():
    plain, adalora, dora = (
        load_config(str(ROOT / f"configs/tiny/{name}_tiny.yaml")) for name in ("lora", "adalora", "dora")
    )
    changes = {"lora_alpha": 24, "pet_type": "adalora", "init_rank": 12, "target_rank": 4, "delta_t": 5}
    assert adalora.pet_config == PetConfig(target_modules="all-linear", **changes)
    assert dora.pet_config == plain.pet_config.model_copy(update={"use_dora": True})
    assert adalora.learning_rate == 10 * plain.learning_rate
    adalora.lr_schedule.learning_rate = plain.lr_schedule.learning_rate
    for config in (adalora, dora):
        config.model.sizes.pet_config = plain.pet_config
        assert config == plain


def test_llama3_rope_scaling():
    sizes = load_config(str(ROOT / "configs/llama3_1/lora_llama3_1_8b.yaml")).model.sizes
    assert sizes.extend_method == "LLAMA3"
    assert sizes.scaling_factor == {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def test_the_articles_block(tmp_path):
    config = load_config(write(tmp_path, ARTICLE), flags={"run_mode": "finetune"})
    sizes = config.model.sizes
    assert config.pet_config == PetConfig(
        lora_rank=16, lora_alpha=16, lora_dropout=0.05, target_modules=".*wq|.*wk|.*wv|.*wo"
    )
    assert (
        sizes.type,
        sizes.seq_length,
        sizes.hidden_size,
        sizes.num_layers,
        sizes.num_heads,
        sizes.vocab_size,
        sizes.compute_dtype,
    ) == ("LlamaConfig", 4096, 4096, 32, 32, 32000, "float16")
    assert config.model.arch.type == "LlamaForCausalLM"
    assert config.notices() == []


def test_mindformers_yaml(tmp_path):
    config = load_config(write(tmp_path, MINDFORMERS))
    assert config.notices() == [MINDFORMERS_WITHOUT_EFFECT]
    assert (config.batch_size, config.learning_rate, config.save_steps) == (2, 1e-5, 100)
    assert config.optimizer.betas == (0.9, 0.95)
    assert config.recompute_config.recompute == 14  # of one stage and of the other
    assert config.runner_wrapper.scale_sense.loss_scale_value == 65536
    assert config.pet_config.freeze_exclude == ["*lora*"]
    dump_config(config, str(tmp_path / "again.yaml"))
    assert load_config(str(tmp_path / "again.yaml")) == config
    assert load_config(str(tmp_path / "again.yaml")).notices() == [MINDFORMERS_WITHOUT_EFFECT]

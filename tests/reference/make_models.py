"""Write models/<name>/: six tiny random causal language models in the layouts that the hub holds.

config.json is written by hand in the layout before transformers 5 (`rope_theta`, `rope_scaling`, `torch_dtype`)
or since (`rope_parameters`, `dtype`); weights are drawn in float32 and stored in the config's type.
"""

import math
from pathlib import Path

import numpy as np
import torch
from common import MODEL_NAMES, REFERENCE_DIR, VOCAB_SIZE, asked, load_model, save_json
from safetensors.torch import save_file

WEIGHT_STD = 0.2
BIAS_STD = 0.3
NORM_STD = 0.2
SEEDS = {"llama2": 11, "llama3": 12, "qwen2": 13, "qwen3": 14, "deepseek_r1_qwen": 15, "smollm3": 16}

SIZES = {
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "use_cache": True,
    "vocab_size": VOCAB_SIZE,
}
OLD_QWEN = {"use_mrope": False, "use_sliding_window": False, "sliding_window": 512, "max_window_layers": 2}
NEW_QWEN = {
    "use_sliding_window": False,
    "sliding_window": None,
    "max_window_layers": 2,
    "layer_types": ["full_attention", "full_attention"],
    "pad_token_id": None,
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    "transformers_version": "5.23.0",
}

CONFIGS = {
    "llama2": SIZES
    | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_size": 48,
        "num_key_value_heads": 4,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.37.2",
    },
    "llama3": SIZES
    | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
        "head_dim": 16,
        "hidden_size": 64,
        "mlp_bias": False,
        "num_key_value_heads": 2,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 64,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0",
    },
    "qwen2": SIZES
    | NEW_QWEN
    | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_size": 64,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    },
    "qwen3": SIZES
    | NEW_QWEN
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": 24,
        "hidden_size": 64,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": False,
        "dtype": "float16",
    },
    "deepseek_r1_qwen": SIZES
    | OLD_QWEN
    | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_size": 48,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.44.0",
    },
    # without tie_word_embeddings, as transformers 4 writes it: tied by default
    "smollm3": SIZES
    | {
        "architectures": ["SmolLM3ForCausalLM"],
        "model_type": "smollm3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_size": 48,
        "layer_types": ["full_attention", "full_attention"],
        "mlp_bias": False,
        "no_rope_layer_interval": 4,
        "no_rope_layers": [1, 0],
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 5000000.0,
        "sliding_window": None,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.54.0",
        "use_sliding_window": False,
    },
}


def tensor_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint's tensors, in the order of the hub's files."""
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim", hidden // config["num_attention_heads"])
    q_out, kv_out = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        for projection, out in (("q_proj", q_out), ("k_proj", kv_out), ("v_proj", kv_out)):
            shapes[f"{prefix}self_attn.{projection}.weight"] = (out, hidden)
            if config["model_type"] == "qwen2":
                shapes[f"{prefix}self_attn.{projection}.bias"] = (out,)
        shapes[prefix + "self_attn.o_proj.weight"] = (hidden, q_out)
        if config["model_type"] == "qwen3":
            shapes[prefix + "self_attn.q_norm.weight"] = (head_dim,)
            shapes[prefix + "self_attn.k_norm.weight"] = (head_dim,)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        shapes[prefix + "mlp.gate_proj.weight"] = (ffn, hidden)
        shapes[prefix + "mlp.up_proj.weight"] = (ffn, hidden)
        shapes[prefix + "mlp.down_proj.weight"] = (hidden, ffn)
    shapes["model.norm.weight"] = (hidden,)
    if not config.get("tie_word_embeddings", config["model_type"] == "smollm3"):
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def random_tensors(config: dict, seed: int) -> dict[str, torch.Tensor]:
    """Normal weights, norm weights about one, biases not zero, in the config's type."""
    rng = np.random.default_rng(seed)
    dtype = getattr(torch, config.get("dtype") or config["torch_dtype"])
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        values = rng.standard_normal(shape)
        if "norm" in name:
            values = 1.0 + NORM_STD * values
        elif name.endswith("bias"):
            values = BIAS_STD * values
        else:
            values = WEIGHT_STD * values
        tensors[name] = torch.from_numpy(values.astype(np.float32)).to(dtype)
    return tensors


def check_rope_bands(config: dict) -> None:
    """Llama 3's rule must keep, blend and divide at least one frequency each."""
    rope = config["rope_scaling"]
    head_dim, original = config["head_dim"], rope["original_max_position_embeddings"]
    wavelengths = [2 * math.pi * config["rope_theta"] ** (2 * i / head_dim) for i in range(head_dim // 2)]
    short, long = original / rope["high_freq_factor"], original / rope["low_freq_factor"]
    bands = (
        sum(w < short for w in wavelengths),
        sum(short <= w <= long for w in wavelengths),
        sum(w > long for w in wavelengths),
    )
    if min(bands) == 0:
        raise SystemExit(f"llama3: frequencies kept, blended, divided are {bands}; choose rope_scaling with all three")


def write_tensors(model_dir: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    """One model.safetensors, or `shards` files of about the same number of tensors and their index."""
    if shards == 1:
        save_file(tensors, model_dir / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    per_shard = math.ceil(len(names) / shards)
    weight_map = {}
    for shard in range(shards):
        file_name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[shard * per_shard : (shard + 1) * per_shard]
        save_file({name: tensors[name] for name in part}, model_dir / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file_name)
    metadata = {
        "total_parameters": sum(tensor.numel() for tensor in tensors.values()),
        "total_size": sum(tensor.nbytes for tensor in tensors.values()),
    }
    save_json(model_dir / "model.safetensors.index.json", {"metadata": metadata, "weight_map": weight_map})


def main() -> None:
    check_rope_bands(CONFIGS["llama3"])
    for name in filter(asked, MODEL_NAMES):
        model_dir = REFERENCE_DIR / "models" / name
        model_dir.mkdir(parents=True, exist_ok=True)
        save_json(model_dir / "config.json", CONFIGS[name])
        write_tensors(model_dir, random_tensors(CONFIGS[name], SEEDS[name]), shards=2 if name == "qwen2" else 1)
        count = sum(parameter.numel() for parameter in load_model(model_dir).parameters())
        print(f"{name}: {count} parameters")


if __name__ == "__main__":
    main()

"""What the benchmarks share: a random model on disk, and running the two sides in turn, each in its own process."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

SIDES = ("ours", "torch")
FIGURES_FILE = "LORA_MS_FIGURES"  # where ``table`` leaves its figures as JSON: set by benchmarks/all.py


def parser(description: str, layers: type = int) -> argparse.ArgumentParser:
    """The arguments that the benchmarks take; layers: the type of --layers."""
    out = argparse.ArgumentParser(description=description)
    out.add_argument("--torch_python", default=os.environ.get("LORA_MS_TORCH_PYTHON", sys.executable))
    out.add_argument("--rounds", type=int, default=2, help="times each side runs, in turn")
    out.add_argument("--layers", type=layers, default=8)
    out.add_argument("--hidden", type=int, default=512)
    out.add_argument("--heads", type=int, default=8)
    out.add_argument("--kv_heads", type=int, help="as many as --heads unless given")
    out.add_argument("--ffn", type=int, default=1408)
    out.add_argument("--tied", action="store_true", help="the head is the embedding")
    out.add_argument("--vocab", type=int, default=8192)
    out.add_argument("--folder", help="a model's folder, in place of random weights")
    out.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    out.add_argument("--model", help=argparse.SUPPRESS)
    return out


def write_model(args: argparse.Namespace, folder: Path) -> None:
    """A Llama of random float32 weights as a Hugging Face directory."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    h, f = args.hidden, args.ffn
    kv_heads = args.kv_heads or args.heads
    kv = h // args.heads * kv_heads
    shapes = {"model.embed_tokens.weight": (args.vocab, h)}
    if not args.tied:
        shapes["lm_head.weight"] = (args.vocab, h)
    norms = ["model.norm.weight"]
    for i in range(args.layers):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}self_attn.{p}_proj.weight": (h, h) for p in "qo"}
        shapes |= {f"{layer}self_attn.{p}_proj.weight": (kv, h) for p in "kv"}
        shapes |= {f"{layer}mlp.{p}_proj.weight": (f, h) for p in ("gate", "up")}
        shapes[f"{layer}mlp.down_proj.weight"] = (h, f)
        norms += [f"{layer}input_layernorm.weight", f"{layer}post_attention_layernorm.weight"]
    tensors = {name: rng.standard_normal(shape, np.float32) * 0.02 for name, shape in shapes.items()}
    tensors |= {name: np.ones(h, np.float32) for name in norms}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": args.vocab,
        "hidden_size": h,
        "intermediate_size": f,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": args.tied,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))


def write_adapter(model: Path, folder: Path, rank: int, seed: int, names: Sequence[str]) -> None:
    """A random adapter, in PEFT's format, on the projections ``names`` of all layers; it leaves answers readable."""
    from safetensors.numpy import save_file

    config = json.loads((model / "config.json").read_text())
    hidden, heads, ffn = config["hidden_size"], config["num_attention_heads"], config["intermediate_size"]
    width = config.get("head_dim") or hidden // heads
    own, shared = heads * width, config.get("num_key_value_heads", heads) * width
    sizes = {"q_proj": (hidden, own), "k_proj": (hidden, shared), "v_proj": (hidden, shared), "o_proj": (own, hidden)}
    sizes |= {"gate_proj": (hidden, ffn), "up_proj": (hidden, ffn), "down_proj": (ffn, hidden)}
    rng = np.random.default_rng(seed)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for name in names:
            block = "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
            key = f"base_model.model.model.layers.{layer}.{block}.{name}"
            inputs, outputs = sizes[name]
            tensors[f"{key}.lora_A.weight"] = rng.normal(0, 0.02, (rank, inputs)).astype(np.float32)
            tensors[f"{key}.lora_B.weight"] = rng.normal(0, 0.02, (outputs, rank)).astype(np.float32)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": [*names],
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def peak_rss_mb() -> float:
    """Most resident memory of this process so far."""
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def run_sides(script: str, args: argparse.Namespace, argv: list[str]) -> dict[str, list[dict]]:
    """Runs ``script --side …`` for each side, ``args.rounds`` times in turn; the last line each prints is its JSON."""
    results: dict[str, list[dict]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        if not args.folder:
            write_model(args, Path(folder))
        for _ in range(args.rounds):
            for side in SIDES:
                model = os.path.abspath(args.folder or folder)
                results[side].append(run_side(script, side, args.torch_python, argv, model))
                print(f"{side:6} {results[side][-1]}", flush=True)
    return results


def run_side(script: str, side: str, torch_python: str, argv: list[str], folder: str) -> dict[str, float]:
    """Runs ``script --side SIDE --model FOLDER`` in a process of its own; what its last line says."""
    python = sys.executable if side == "ours" else torch_python
    command = [python, script, *argv, "--side", side, "--model", folder]
    env = {**os.environ, "GLOG_v": "3", "LORA_MS_START": str(time.time())}
    env["PYTHONPATH"] = str(Path(__file__).resolve().parent.parent)
    if side == "ours":
        env["OMP_NUM_THREADS"] = "1"  # as the command line sets it; see lora_ms/cli/main.py
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tempfile.gettempdir())
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def table(results: dict[str, list[dict]], rows: dict[str, str]) -> None:
    """Prints the median of each figure on both sides, and ours / torch; keeps them for benchmarks/all.py."""
    print(f"\n{'':34}{'ours':>10}{'torch':>10}{'ratio':>8}")
    figures = {}
    for key, title in rows.items():
        ours, torch = (float(np.median([result[key] for result in results[side]])) for side in SIDES)
        print(f"{title:34}{ours:10.2f}{torch:10.2f}{ours / torch:8.2f}")
        figures[title] = [round(ours, 4), round(torch, 4)]
    if FIGURES_FILE in os.environ:
        Path(os.environ[FIGURES_FILE]).write_text(json.dumps(figures))

"""Peak memory and step time of float32 loading against ``--low_memory True``, on random weights of Qwen2-1.5B's shape.

Both sides train the same rows in the same steps, by the command line, each in a process of its own. Float32 takes about
15 GB with all 28 layers and these rows.

python benchmarks/low_memory.py --steps 2
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
CHILD = """
import sys
from lora_ms.cli.main import main
status = main(sys.argv[1:])
print("peak", open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])
sys.exit(status)
"""
SIDES = {"float32": ["--model.model_config.compute_dtype", "float32"], "low_memory": ["--low_memory", "True"]}


def shapes(args: argparse.Namespace) -> dict[str, tuple[int, ...]]:
    """The tensors of the model."""
    h, f, kv = args.hidden, args.ffn, args.hidden // args.heads * args.kv_heads
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (args.vocab, h), "model.norm.weight": (h,)}
    for i in range(args.layers):
        layer = f"model.layers.{i}."
        for name, rows in (("q", h), ("k", kv), ("v", kv)):
            found[f"{layer}self_attn.{name}_proj.weight"] = (rows, h)
            found[f"{layer}self_attn.{name}_proj.bias"] = (rows,)
        found[f"{layer}self_attn.o_proj.weight"] = (h, h)
        found |= {f"{layer}mlp.{name}_proj.weight": (f, h) for name in ("gate", "up")}
        found[f"{layer}mlp.down_proj.weight"] = (h, f)
        found |= {f"{layer}{name}_layernorm.weight": (h,) for name in ("input", "post_attention")}
    return found


def write_model(args: argparse.Namespace, folder: Path) -> None:
    """The model in float16, written tensor by tensor."""
    header, end = {}, 0
    for name, shape in shapes(args).items():
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + 2 * int(np.prod(shape))]}
        end += 2 * int(np.prod(shape))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(0)
    with open(folder / "model.safetensors", "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes(args).items():
            if len(shape) == 1:
                value = np.zeros(shape, np.float16) if name.endswith("bias") else np.ones(shape, np.float16)
            else:
                value = (rng.standard_normal(shape, np.float32) * np.float32(0.02)).astype(np.float16)
            stream.write(value.tobytes())
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": args.vocab,
        "hidden_size": args.hidden,
        "intermediate_size": args.ffn,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        "eos_token_id": 2,
        "torch_dtype": "float16",
    }
    (folder / "config.json").write_text(json.dumps(config))


def run(side: str, args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Peak MB, seconds of a step (median without the first), and the last loss."""
    out = folder / side
    command = [sys.executable, "-c", CHILD, "finetune", "--load_checkpoint", str(folder), *SIDES[side]]
    command += ["--train_dataset_dir", str(folder / "rows.jsonl"), "--output_dir", str(out), "--device_target", "CPU"]
    command += ["--seq_length", str(args.seq), "--batch_size", str(args.batch), "--max_steps", str(args.steps)]
    command += ["--runner_config.sink_mode", "False"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    seconds = float(np.median([record["step_time_s"] for record in records[1:]]))
    return {"peak_mb": int(done.stdout.split()[-1]) / 2**10, "step_s": seconds, "loss": records[-1]["loss"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    sizes = {"layers": 28, "hidden": 1536, "heads": 12, "kv_heads": 2, "ffn": 8960, "vocab": 151936}
    for name, value in {**sizes, "batch": 8, "seq": 256, "steps": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(args, folder)
        rng = np.random.default_rng(1)
        ids = rng.integers(3, args.vocab, (args.batch * args.steps, args.seq)).tolist()
        lines = (json.dumps({"input_ids": row, "labels": row}) for row in ids)
        (folder / "rows.jsonl").write_text("".join(f"{line}\n" for line in lines))
        found = {}
        for side in SIDES:
            found[side] = run(side, args, folder)
            print(side, found[side], flush=True)
    print(f"\n{args.layers} layers, {args.batch} rows of {args.seq} tokens a step")
    print(f"{'':16}{'float32':>12}{'low_memory':>12}{'ratio':>8}")
    for key, title in (("peak_mb", "peak, MB"), ("step_s", "step, s"), ("loss", "loss")):
        first, second = found["float32"][key], found["low_memory"][key]
        print(f"{title:16}{first:12.2f}{second:12.2f}{second / first:8.2f}")


if __name__ == "__main__":
    main()

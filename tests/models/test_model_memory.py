"""Loading holds the model and one tensor, not two models."""

import json
import subprocess

import numpy as np
from safetensors.numpy import save_file

CHILD = """
import re, sys
from pathlib import Path
import mindspore as ms
from lora_ms.models import hub

def kilobytes(key):
    return int(re.search(key + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1))

ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
(ms.Tensor([1.0]) + 1).asnumpy()  # the runtime's own memory
before = kilobytes("VmHWM")
model = hub.load_directory(Path(sys.argv[1]), ms.float32)
print(before, kilobytes("VmHWM"))
"""
HIDDEN, WIDE, LAYERS, VOCABULARY = 512, 1408, 7, 8000
CONFIG = {"architectures": ["LlamaForCausalLM"], "vocab_size": VOCABULARY, "hidden_size": HIDDEN,
          "intermediate_size": WIDE, "num_hidden_layers": LAYERS, "num_attention_heads": 8}  # fmt: skip


def shapes() -> dict[str, tuple[int, ...]]:
    found = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}
    found["model.norm.weight"] = (HIDDEN,)
    for number in range(LAYERS):
        layer = f"model.layers.{number}."
        found |= {f"{layer}self_attn.{x}_proj.weight": (HIDDEN, HIDDEN) for x in "qkvo"}
        found |= {f"{layer}mlp.{x}_proj.weight": (WIDE, HIDDEN) for x in ("gate", "up")}
        found[f"{layer}mlp.down_proj.weight"] = (HIDDEN, WIDE)
        found |= {f"{layer}{x}_layernorm.weight": (HIDDEN,) for x in ("input", "post_attention")}
    return found


def test_peak_memory_of_loading(tmp_path, python, python_env):
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_normal(shape, np.float32).astype(np.float16) for name, shape in shapes().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    command = [python, "-c", CHILD, str(tmp_path)]
    child = subprocess.run(command, env=python_env, capture_output=True, text=True, check=True)
    before, after = map(int, child.stdout.split()[-2:])
    sizes = [4 * value.size / 2**20 for value in tensors.values()]  # MB in float32
    assert sum(sizes) > 115 and max(sizes) < 0.15 * sum(sizes)
    growth = (after - before) / 2**10
    assert growth < sum(sizes) + max(sizes) + 40, f"{growth:.0f} MB for a model of {sum(sizes):.0f} MB"

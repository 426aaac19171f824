"""Adapters of every kind made here, and what PEFT itself makes of them: one process for all of them."""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from lora_ms.adapters.inject import adapter_cells, inject
from lora_ms.adapters.merge import merge
from lora_ms.adapters.methods.adalora import AdaLoraConfig
from lora_ms.adapters.methods.ia3 import IA3Config
from lora_ms.adapters.methods.lora import LayerGroup, LoraConfig
from lora_ms.adapters.methods.miss import MissConfig
from lora_ms.adapters.methods.vera import VeraConfig
from lora_ms.adapters.peft_format import save_adapter
from lora_ms.models.decoder import CausalLM
from lora_ms.models.hub import load_directory
from lora_ms.ops import Operators

pytestmark = [pytest.mark.usefixtures("graph_mode"), pytest.mark.peft, pytest.mark.slow]
QV = ("q_proj", "v_proj")
HEAD, EMBED = ("q_proj", "lm_head"), ("q_proj", "embed_tokens")
GROUPS = (LayerGroup((0,), 4, 8.0), LayerGroup((1,), 2, 3.0, ("q_proj", "down_proj")))
KEPT = {
    "model.layers.0.self_attn.q_proj": (True, False, True, True),
    "model.layers.0.self_attn.v_proj": (False, False, False, False),
    "model.layers.1.self_attn.q_proj": (False, True, False, False),
    "model.layers.1.self_attn.v_proj": (True, True, True, True),
}


class Made(NamedTuple):
    """An adapter: the reference model under it, and its settings."""

    model: str
    config: LoraConfig


def made(model: str, **settings) -> Made:
    return Made(model, LoraConfig(**{"lora_rank": 3, "lora_alpha": 5.0, "target_modules": QV, **settings}))


ADALORA = AdaLoraConfig(4, 6.0, target_modules=QV, target_rank=2, total_steps=12)
KINDS = {
    "lora": made("qwen2", target_modules=("q_proj", "k_proj", "o_proj", "up_proj"), lora_dropout=0.1),
    "lora_llama3": made("llama3", target_modules="wq|w2"),
    "all_linear": made("qwen3", target_modules="all-linear"),
    "rslora": made("llama3", use_rslora=True),
    "dora": made("qwen2", use_dora=True, target_modules=("q_proj", "down_proj")),
    "dora_rslora": made("qwen3", use_dora=True, use_rslora=True),
    "lora_bias": made("qwen2", lora_bias=True),
    "bias_all": made("qwen2", bias="all"),
    "bias_all_of_a_layer": made("qwen2", bias="all", layers_to_transform=(0,)),
    "bias_lora_only": made("qwen2", bias="lora_only"),
    "gaussian": made("qwen2", init_lora_weights="gaussian"),
    "orthogonal": made("qwen2", init_lora_weights="orthogonal", lora_rank=4),
    "pissa": made("qwen2", init_lora_weights="pissa"),
    "pissa_niter": made("llama3", init_lora_weights="pissa_niter_4"),
    "pissa_rslora": made("qwen3", init_lora_weights="pissa", use_rslora=True),
    "olora": made("qwen2", init_lora_weights="olora", rank_pattern={"v_proj": 2}),
    "adalora": Made("qwen2", ADALORA),
    "ia3": Made("qwen2", IA3Config()),
    "ia3_paths": Made("llama3", IA3Config("o_proj|up_proj", feedforward_modules=r".*layers\.1\..*o_proj")),
    "ia3_head": Made("qwen3", IA3Config(("v_proj", "lm_head"), feedforward_modules=(), modules_to_save="model.norm")),
    "vera": Made("qwen2", VeraConfig(QV, lora_rank=5, d_initial=0.4, projection_prng_key=4)),
    "vera_drawn": Made("llama3", VeraConfig("all-linear", lora_rank=5, d_initial=0.4, save_projection=False)),
    "miss": Made("qwen3", MissConfig(QV, lora_rank=5)),
    "miss_mini": Made("llama3", MissConfig(QV, lora_rank=4, init_weights="mini", mini_r=2)),
    "miss_bat": Made("qwen2", MissConfig("down_proj", lora_rank=4, init_weights="bat")),
    "adalora_allocated": Made("qwen3", replace(ADALORA, kept=KEPT)),
    "patterns": made("qwen3", rank_pattern={r"1\..*q_proj": 1, "q_proj": 2}, alpha_pattern={"v_proj": 7.0}),
    "patterns_rslora": made("llama3", rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 7.5}, use_rslora=True),
    "layer_groups": made("qwen2", layer_groups=GROUPS),
    "layers_to_transform": made("llama3", layers_to_transform=1),
    "exclude_modules": made("qwen2", target_modules="all-linear", exclude_modules=r".*layers\.0\.(mlp|self_attn\.k).*"),
    "embed": made("qwen2", target_modules=EMBED),
    "embed_dora": made("qwen3", target_modules=EMBED, use_dora=True),
    "lm_head": made("qwen3", target_modules=HEAD),
    "lm_head_tied": made("qwen2", target_modules=HEAD),
    "lm_head_dora": made("llama2", target_modules=HEAD, use_dora=True),
    "save_head": made("qwen2", modules_to_save="lm_head"),
    "save_embed": made("qwen2", modules_to_save="embed_tokens"),
    "save_norms": made("qwen3", modules_to_save="norm"),
    "save_head_and_embed": made("qwen3", modules_to_save=("lm_head", "embed_tokens"), use_rslora=True),
}  # fmt: skip
# PEFT adds the update to the weight that both modules of a tied model share, and refuses to merge then
NOT_MERGED = ("embed", "lm_head_tied")
# every adapter through live_peft.py's own function
DRIVER = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from common import save_npz
from live_peft import live_logits
for name, model in json.loads(sys.argv[3]).items():
    folder = Path(sys.argv[2])
    save_npz(folder / f"{name}.npz", live_logits(str(Path(sys.argv[1]) / "models" / model), str(folder / name)))
"""


def moved(reference: Path, kind: str, operators: Operators) -> CausalLM:
    """The model with the adapter, whose every tensor is away from where it starts."""
    model = load_directory(reference / "models" / KINDS[kind].model, operators=operators)
    config = KINDS[kind].config
    ms.set_seed(5)
    inject(model, config)
    rng = np.random.default_rng(5)
    for path, cell in adapter_cells(model).items():
        for factor, parameter in cell.tensors().items():
            value = parameter.asnumpy() + rng.standard_normal(parameter.shape, np.float32) * np.float32(0.2)
            if factor == "lora_E" and path in KEPT and kind == "adalora_allocated":
                value = value * np.array(KEPT[path])[:, None]
            parameter.set_data(Tensor(value.astype(np.float32)))
    return model.set_train(False)


@pytest.fixture(scope="module")
def theirs(reference, native, python_env, tmp_path_factory) -> Path:
    """The folder of what PEFT says, one npz a kind."""
    torch_python = os.environ.get("LORA_MS_TORCH_PYTHON")
    if not torch_python:
        pytest.skip("LORA_MS_TORCH_PYTHON names no Python with torch and PEFT")
    folder = tmp_path_factory.mktemp("adapters")
    for kind, (name, config) in KINDS.items():
        save_adapter(moved(reference, kind, native), folder / kind, config, str(reference / "models" / name))
    models = json.dumps({kind: name for kind, (name, _) in KINDS.items()})
    command = [torch_python, "-c", DRIVER, str(reference), str(folder), models]
    child = subprocess.run(command, env={**python_env, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert "missing" not in child.stderr.lower() and "unexpected" not in child.stderr.lower(), child.stderr
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_peft_makes_the_same_of_our_adapter(reference, native, theirs, kind):
    with np.load(theirs / f"{kind}.npz") as values:
        values = dict(values)
    assert np.abs(values["logits"] - values["base_logits"]).mean() > 0.1
    assert ("merged_logits" in values) == (kind not in NOT_MERGED)
    model, input_ids = moved(reference, kind, native), Tensor(values["input_ids"])
    ms.set_context(mode=ms.PYNATIVE_MODE)  # models that run once; their graphs are tested elsewhere
    try:
        found, merged = model(input_ids).asnumpy(), merge(model)(input_ids).asnumpy()
    finally:
        ms.set_context(mode=ms.GRAPH_MODE)
    np.testing.assert_allclose(found, values["logits"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(merged, values.get("merged_logits", values["logits"]), rtol=0, atol=1e-4)

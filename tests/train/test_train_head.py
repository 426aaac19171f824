"""Something on the head trains in the narrow types as in float32: no step is skipped, and the numbers are near."""

import pytest
from mindspore import dtype as types

from lora_ms.adapters.methods.ia3 import IA3Config
from lora_ms.adapters.methods.lora import LoraConfig
from lora_ms.adapters.methods.miss import MissConfig
from lora_ms.adapters.methods.vera import VeraConfig

HEAD = ("q_proj", "lm_head")
CONFIGS = {
    "lora": LoraConfig(4, 8.0, target_modules=HEAD),
    "dora": LoraConfig(4, 8.0, target_modules=HEAD, use_dora=True),
    "ia3": IA3Config(("v_proj", "lm_head"), feedforward_modules=()),
    "vera": VeraConfig(HEAD, lora_rank=4, d_initial=0.5, save_projection=False),
    "bat": MissConfig(HEAD, lora_rank=4, init_weights="bat"),
    "whole": LoraConfig(4, 8.0, target_modules="q_proj", modules_to_save=("lm_head",)),
    "tokens": LoraConfig(4, 8.0, target_modules="q_proj", trainable_token_indices={"lm_head": (1, 7, 20)}),
}


@pytest.fixture(scope="module")
def in_float32(train, tmp_path_factory) -> dict:
    """The same runs in float32, by kind, as they are asked for."""
    found = {}

    def run(kind: str):
        if kind not in found:
            found[kind] = train(tmp_path_factory.mktemp(kind), config=CONFIGS[kind], name="llama2", warmup_steps=0)
        return found[kind]

    return run


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("dtype", [types.float16, types.bfloat16], ids=str)
def test_the_head_trains_from_the_first_step(train, in_float32, tmp_path, kind, dtype):
    found = train(tmp_path, config=CONFIGS[kind], name="llama2", dtype=dtype, dynamic_scale=False, warmup_steps=0)
    norms = [[record["grad_norm"] for record in run.records] for run in (found, in_float32(kind))]
    assert norms[0] == pytest.approx(norms[1], rel=2e-2)
    assert found.losses == pytest.approx(in_float32(kind).losses, rel=1e-2)

"""Which part of a model a rank has; that the parts compute the same is shown by tests/scripts/test_ranks.py."""

import numpy as np
import pytest
from mindspore import Parameter, Tensor

from lora_ms.adapters.inject import inject
from lora_ms.adapters.methods.lora import LoraConfig
from lora_ms.adapters.peft_format import adapter_tensors, read_tensors, save_adapter
from lora_ms.models.hub import load_directory
from lora_ms.nn.parallel import WHOLE, Shard, split_axis
from lora_ms.train.optimizer import FlatAdamW

pytestmark = pytest.mark.usefixtures("graph_mode")
SHARDS = [Shard(0, 2, "ranks_0_1"), Shard(1, 2, "ranks_0_1")]
LAYER = "model.layers.0"


@pytest.mark.parametrize(
    ("name", "axis"),
    [
        (f"{LAYER}.self_attn.q_proj.weight", 0),
        (f"{LAYER}.self_attn.q_proj.bias", 0),
        (f"{LAYER}.self_attn.o_proj.weight", 1),
        (f"{LAYER}.mlp.up_proj.weight", 0),
        (f"{LAYER}.mlp.down_proj.weight", 1),
        (f"{LAYER}.self_attn.k_proj.lora_a", None),
        (f"{LAYER}.self_attn.k_proj.lora_b", 0),
        (f"{LAYER}.mlp.down_proj.lora_a", 1),
        (f"{LAYER}.mlp.down_proj.lora_b", None),
        (f"base_model.model.{LAYER}.self_attn.v_proj.lora_B.weight", 0),
        (f"base_model.model.{LAYER}.self_attn.o_proj.lora_A.weight", 1),
        (f"base_model.model.{LAYER}.self_attn.o_proj.lora_B.weight", None),
        ("lm_head.weight", 0),
        ("model.embed_tokens.weight", 0),
        ("model.norm.weight", None),
        (f"{LAYER}.self_attn.q_norm.weight", None),
        (f"{LAYER}.self_attn.q_proj.scaling", None),
    ],
)
def test_what_is_split(name, axis):
    assert split_axis(name) == axis


def joined(name: str, parts: list[np.ndarray]) -> np.ndarray:
    axis = split_axis(name)
    if axis is None:
        np.testing.assert_array_equal(*parts)
        return parts[0]
    return np.concatenate(parts, axis)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_ranks_read_their_parts_and_start_as_one(reference, kind):
    """Weights and a fresh adapter of two ranks, put together, are one rank's, bit by bit."""
    models, reports = {}, []
    for shard in (WHOLE, *SHARDS):
        np.random.seed(3)
        model = load_directory(reference / "models" / kind, shard=shard)
        report = inject(model, LoraConfig(4, 8.0, 0.0, "all-linear"), shard=shard)
        models[shard] = {name: p.asnumpy() for name, p in model.parameters_and_names()}
        reports.append(report)
    assert reports[1:] == reports[:1] * 2  # each counts the whole
    whole = models[WHOLE]
    assert all(models[shard].keys() == whole.keys() for shard in SHARDS)
    for name, value in whole.items():
        np.testing.assert_array_equal(joined(name, [models[shard][name] for shard in SHARDS]), value, err_msg=name)
    assert np.ptp(whole[f"{LAYER}.mlp.down_proj.lora_a"]) > 0.1


def test_an_adapter_is_read_in_parts(reference, tmp_path):
    model, config = load_directory(reference / "models" / "qwen2"), LoraConfig(4, 8.0, 0.0, "q_proj|o_proj")
    inject(model, config)
    save_adapter(model, tmp_path, config)
    parts = [read_tensors(tmp_path, shard) for shard in SHARDS]
    for name, value in adapter_tensors(model, config).items():
        np.testing.assert_array_equal(joined(name, [part[name] for part in parts]), value, err_msg=name)


def test_moments_are_taken_back_in_parts():
    """A checkpoint of one rank, on each of two."""
    rng = np.random.default_rng(0)
    shapes = {
        "down_proj.lora_a": (2, 6),
        "down_proj.lora_b": (4, 2),
        "up_proj.lora_a": (2, 4),
        "up_proj.lora_b": (6, 2),
    }
    values = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}

    def optimizer(shard: Shard) -> FlatAdamW:
        return FlatAdamW([Parameter(Tensor(shard.part(n, v).copy()), name=n) for n, v in values.items()], shard=shard)

    one = optimizer(WHOLE)
    flat = np.concatenate([value.ravel() for value in values.values()])
    one.state()["exp_avg"].set_data(Tensor(flat))
    one.count.set_data(Tensor(np.float32(7)))
    parts = []
    for shard in SHARDS:
        there = optimizer(shard)
        there.restore(one.whole_state())
        assert float(there.count.asnumpy()) == 7
        pieces = np.split(there.state()["exp_avg"].asnumpy(), np.cumsum(there.sizes)[:-1])
        parts.append([piece.reshape(p.shape) for piece, p in zip(pieces, there.params, strict=True)])
    for number, (name, value) in enumerate(values.items()):
        np.testing.assert_array_equal(joined(name, [part[number] for part in parts]), value)

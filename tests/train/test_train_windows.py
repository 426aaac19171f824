"""Training with sliding windows: padded or packed, recomputed or not, layers of both kinds, under adapters."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from lora_ms.adapters.inject import inject
from lora_ms.adapters.methods.lora import LoraConfig
from lora_ms.data.collate import collate
from lora_ms.data.example import TokenRow
from lora_ms.models.decoder import DecoderConfig
from lora_ms.models.hub import new_model
from lora_ms.nn import sharing
from lora_ms.ops import PORTABLE, Operators
from lora_ms.train import shared_layers
from lora_ms.train.evaluation import LabelScores
from lora_ms.train.gradient import MicroStep
from lora_ms.train.optimizer import FlatAdamW
from lora_ms.train.parts import SummedLoss

LAYERS = 5  # two blocks of two, and the top
PATTERNS = {"upper": (3, 4), "every other": (0, 2, 4), "none": ()}
LENGTHS = (30, 5, 17)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(shared_layers, "BLOCK_LAYERS", 2)
    monkeypatch.setattr(sharing, "SHARED_FROM", LAYERS)


def config(layers: tuple[int, ...], window: int = 6) -> DecoderConfig:
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "head_dim": 4, "attention_bias": True}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1e4}
    return DecoderConfig(**sizes, num_hidden_layers=LAYERS, sliding_window=window, sliding_layers=layers)


def batch_of(packed: bool) -> list[Tensor]:
    """Three rows whose latter halves are learnt, in one line or in three."""
    rng = np.random.default_rng(3)
    rows = []
    for number, length in enumerate(LENGTHS):
        ids = rng.integers(0, 40, length).astype(np.int32)
        rows.append(TokenRow(f"row {number}", ids, np.where(np.arange(length) < length // 2, -100, ids)))
    lines = [rows] if packed else [[row] for row in rows]
    batch = collate(lines, len(lines), 56 if packed else 32, 32, 0)
    return [Tensor(part) for part in batch[:4]]


def step(model, recompute, packed: bool) -> tuple[MicroStep, float, np.ndarray]:
    """A micro-batch: the loss, and the gradient of all that trains."""
    optimizer = FlatAdamW(model.trainable_params(), operators=model.operators)
    micro_step = MicroStep(SummedLoss(model, 40).set_train(), optimizer, recompute)
    loss = micro_step(*batch_of(packed)).asnumpy()
    return micro_step, float(loss), optimizer.grad.asnumpy().copy()


def adapted(operators: Operators, layers: tuple[int, ...], use_dora: bool = False):
    model = new_model(config(layers), ms.float32, 0, operators)
    inject(model, LoraConfig(2, 4.0, 0.0, "k_proj", use_dora=use_dora))
    rng = np.random.default_rng(2)
    for parameter in model.trainable_params():  # B too: at zero, A has no gradient
        if not parameter.name.endswith("magnitude"):
            parameter.set_data(Tensor(rng.normal(0, 0.2, parameter.shape).astype(np.float32)))
    return model


@pytest.mark.parametrize(
    ("pattern", "use_dora", "recomputed"),
    [("upper", True, ([0, 3],)), ("every other", False, (True,))],
)
def test_padded_packed_and_recomputed_are_the_same(native, pattern, use_dora, recomputed):
    model = adapted(native, PATTERNS[pattern], use_dora)
    _, wanted_loss, wanted = step(model, False, packed=False)
    for recompute in recomputed:
        _, loss, found = step(model, recompute, packed=True)
        assert loss == pytest.approx(wanted_loss, rel=1e-5)
        assert np.linalg.norm(found - wanted) <= 1e-5 * np.linalg.norm(wanted)
    # evaluation runs the same blocks
    scores = LabelScores(SummedLoss(model, 40))(*batch_of(packed=True))
    assert float(scores[0].asnumpy()) == pytest.approx(wanted_loss, rel=1e-5)
    # and the window counts
    without = LabelScores(SummedLoss(adapted(native, PATTERNS["none"], use_dora), 40))(*batch_of(packed=True))
    assert abs(float(without[0].asnumpy()) - wanted_loss) > 1e-3 * wanted_loss


def test_both_sets_of_operators(native):
    """The same gradient of rows in one line, of layers with a window between layers without."""
    _, wanted_loss, wanted = step(adapted(native, PATTERNS["every other"]), False, packed=True)
    _, loss, found = step(adapted(PORTABLE, PATTERNS["every other"]), False, packed=True)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert np.linalg.norm(found - wanted) <= 1e-4 * np.linalg.norm(wanted)


def test_blocks_share_their_graphs_whatever_their_windows(native):
    """What a layer sees is a value that its graph takes, not a part of the graph."""
    model = adapted(native, PATTERNS["upper"])
    micro_step, _, _ = step(model, True, packed=True)
    assert micro_step.shared is not None
    assert (len(micro_step.shared.blocks), len(micro_step.shared.graphs)) == (2, 1)
    assert [block.layers for block in micro_step.shared.blocks] == [slice(0, 2), slice(2, 4)]
    assert [model.config.layer_windows[block.layers] for block in micro_step.shared.blocks] == [(0, 0), (0, 6)]

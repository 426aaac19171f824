"""Padded, bucketed and packed are the same training, and no row sees another."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from lora_ms.adapters.inject import inject
from lora_ms.adapters.methods.lora import LoraConfig
from lora_ms.data.collate import collate
from lora_ms.data.example import TokenRow
from lora_ms.data.loader import DataPlan
from lora_ms.data.packing import Layout, Shape
from lora_ms.models.hub import load_directory
from lora_ms.train.gradient import MicroStep
from lora_ms.train.optimizer import FlatAdamW
from lora_ms.train.parts import SummedLoss

pytestmark = pytest.mark.usefixtures("graph_mode")
KINDS = ("padded", "bucketed", "packed")


@pytest.fixture(scope="module")
def uneven() -> list[TokenRow]:
    """16 rows of 3 to 40 tokens of the reference vocabulary; of one, two turns carry labels."""
    rng = np.random.default_rng(11)
    rows = []
    for number in range(16):
        length = int(rng.integers(3, 20)) if number else 40
        ids = rng.integers(5, 128, length).astype(np.int32)
        labels = ids.copy()
        labels[: int(rng.integers(1, length - 1))] = -100
        rows.append(TokenRow(f"row {number}", ids, labels))
    rows[0].labels[25:30] = -100
    return rows


@pytest.fixture(scope="module", params=["qwen2", "llama3", "qwen3"])
def summed(request, reference, native, uneven):
    """Of each layout: the summed loss and its gradient, [numbers of all factors], over one step of all rows."""
    model = load_directory(reference / "models" / request.param, operators=native)
    inject(model, LoraConfig(4, 8.0, 0.0, "all-linear"))
    rng = np.random.default_rng(2)
    for parameter in model.trainable_params():  # B too: at zero, A has no gradient
        parameter.set_data(Tensor(rng.normal(0, 0.1, parameter.shape).astype(np.float32)))
    model.set_train()
    optimizer = FlatAdamW(model.trainable_params())
    micro_step = MicroStep(SummedLoss(model, 128), optimizer)
    found = {}
    for kind in KINDS:
        plan = DataPlan.build(
            uneven, batch_size=8, accumulation=2, epochs=1, seed=5, pad_id=0, seq_length=128, kind=kind, buckets=2
        )
        optimizer.grad.set_data(ms.ops.zeros_like(optimizer.grad))
        batches, _ = plan.step(0)
        loss = sum(float(micro_step(*map(Tensor, batch[:4])).asnumpy()) for batch in batches)
        found[kind] = (batches, loss, optimizer.grad.asnumpy().copy())
    return found


def test_the_layouts_differ(summed):
    lines = {kind: [batch.input_ids.shape for batch in summed[kind][0]] for kind in KINDS}
    assert lines["padded"] == [(8, 48), (8, 48)] and lines["bucketed"] == [(8, 16), (8, 48)]
    input_tokens = sum(batch.input_tokens for batch in summed["packed"][0])
    assert len({batch.input_tokens for batch in summed["packed"][0]}) and sum(
        shape[0] * shape[1] for shape in lines["packed"]
    ) < min(2 * input_tokens, 8 * 64)


@pytest.mark.parametrize("kind", ["bucketed", "packed"])
def test_loss_and_gradient_are_the_same(summed, kind):
    (_, wanted_loss, wanted), (_, loss, found) = summed["padded"], summed[kind]
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert np.linalg.norm(found - wanted) <= 1e-5 * np.linalg.norm(wanted)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


def test_no_row_sees_another(reference, native, uneven):
    """Every token of one row of a packed line is changed: the losses of the others do not move by a bit."""
    model = load_directory(reference / "models" / "qwen2", operators=native).set_train(False)

    class Losses(ms.nn.Cell):
        def __init__(self):
            super().__init__()
            self.model, self.log_softmax = model, ms.ops.LogSoftmax(-1)

        def construct(self, input_ids, position_ids, target_index, targets):
            hidden = self.model.hidden_states(input_ids, position_ids, target_index)
            logits = ms.ops.matmul(hidden, self.model.head_weight().T)
            return -ms.ops.gather_elements(self.log_softmax(logits), 1, ms.ops.maximum(targets, 0).reshape((-1, 1)))

    losses, line, changed = Losses(), uneven[1:6], 2

    def of_rows(rows):
        batch = collate([rows], 1, 96, 96, 0)
        values = losses(*map(Tensor, batch[:4])).asnumpy().ravel()
        counts = np.cumsum([np.count_nonzero(row.labels[1:] != -100) for row in rows])
        return np.split(values[: counts[-1]], counts[:-1])

    before = of_rows(line)
    other = line[changed]
    line[changed] = TokenRow(other.where, (other.input_ids + 50) % 128, other.labels)
    after = of_rows(line)
    for number, (old, new) in enumerate(zip(before, after, strict=True)):
        if number == changed:
            assert np.abs(old - new).max() > 1e-2
        else:
            np.testing.assert_array_equal(old, new)
    # and a row alone has the losses that it has in a line
    for number, row in enumerate(uneven[1:6]):
        np.testing.assert_allclose(of_rows([row])[0], before[number], rtol=1e-5)


@pytest.mark.parametrize("kind", ["bucketed", "packed"])
def test_a_run_is_the_padded_run(train, tmp_path, kind):
    """Six steps with clipping and decay, through the loop."""
    found = train(tmp_path / kind, packing=kind == "packed", length_buckets=2)
    wanted = train(tmp_path / "padded", plan={"layout": Layout("padded", 8, (Shape(8, 16, 128),))})
    np.testing.assert_allclose(found.losses, wanted.losses, rtol=1e-5)
    for name, value in wanted.adapter.items():
        np.testing.assert_allclose(found.adapter[name], value, rtol=0, atol=1e-5, err_msg=name)

"""Schedules by their formulas, AdamW against float64, and the loss scale of float16."""

import math

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops

from lora_ms.adapters.inject import inject
from lora_ms.adapters.methods.lora import LoraConfig
from lora_ms.adapters.methods.training import rate_factors
from lora_ms.errors import LoraMsError
from lora_ms.models.hub import load_directory
from lora_ms.ops import PORTABLE
from lora_ms.ops.dynamic_map import dynamic_map
from lora_ms.train.optimizer import FlatAdamW, LossScaling
from lora_ms.train.schedule import learning_rate

ROOT3 = math.sqrt(3)


@pytest.mark.parametrize(
    ("kind", "warmup", "end", "rates"),
    [
        # eight steps; peak 8
        ("constant", 0, 0.0, [8, 8, 8, 8, 8, 8, 8, 8]),
        ("constant", 4, 0.0, [0, 2, 4, 6, 8, 8, 8, 8]),
        ("linear", 0, 0.0, [8, 7, 6, 5, 4, 3, 2, 1]),
        ("linear", 4, 0.0, [0, 2, 4, 6, 8, 6, 4, 2]),
        ("linear", 4, 4.0, [0, 2, 4, 6, 8, 7, 6, 5]),
        ("cosine", 2, 0.0, [0, 4, 8, 4 + 2 * ROOT3, 6, 4, 2, 4 - 2 * ROOT3]),
        ("cosine", 2, 4.0, [0, 4, 8, 6 + ROOT3, 7, 6, 5, 6 - ROOT3]),
        ("cosine", 0, 0.0, [4 + 4 * math.cos(math.pi * n / 8) for n in range(8)]),
        ("linear", 8, 0.0, [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_schedules(kind, warmup, end, rates):
    found = [learning_rate(step, 8, 8.0, kind, warmup, end) for step in range(8)]
    np.testing.assert_allclose(found, rates, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("kind", "last"), [("constant", 8.0), ("linear", 0.5), ("cosine", 0.5)])
def test_beyond_the_schedule_the_rate_stays(kind, last):
    assert [learning_rate(step, 8, 8.0, kind, 2, 0.5) for step in (8, 9, 1000)] == [last] * 3


SHAPES = {"w": (3, 2), "b": (4,), "v": (2, 2)}


def parameters() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in SHAPES.items()}


def optimizer_of(values: dict[str, np.ndarray], **kwargs) -> FlatAdamW:
    return FlatAdamW([Parameter(Tensor(value), name=name) for name, value in values.items()], **kwargs)


def step(optimizer: FlatAdamW, grads: np.ndarray, rate: float = 0.1, label_tokens: float = 1.0) -> tuple[float, bool]:
    optimizer.grad.set_data(Tensor(grads.astype(np.float32)))
    norm, finite, *_ = optimizer(Tensor(rate, ms.float32), Tensor(label_tokens, ms.float32))
    return float(norm.asnumpy()), bool(finite.asnumpy())


def current(optimizer: FlatAdamW) -> np.ndarray:
    return np.concatenate([p.asnumpy().ravel() for p in optimizer.params])


@pytest.mark.parametrize(
    ("max_grad_norm", "weight_decay", "swap"),
    [(None, 0.1, False), (None, 0.0, False), (1.0, 0.1, False), (1.0, 0.1, True)],
    ids=["decay", "plain", "clipped", "swapped"],
)
def test_adamw_against_float64(operators, max_grad_norm, weight_decay, swap):
    """Gradients of norm below and above 1; the rate changes; only w and v, of two dimensions, decay."""
    beta1, beta2, eps = 0.8, 0.95, 1e-6
    values = parameters()
    optimizer = optimizer_of(values, operators=operators, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay,
                             max_grad_norm=max_grad_norm, swap=swap)  # fmt: skip
    x = np.concatenate([value.ravel() for value in values.values()]).astype(np.float64)
    decay = weight_decay * np.repeat([1, 0, 1], [6, 4, 4])
    m, v = np.zeros(14), np.zeros(14)
    for number, rate in enumerate([0.1, 0.05, 0.2, 0.01], start=1):
        summed = np.random.default_rng(number).standard_normal(14) * (0.3 if number % 2 else 30)
        norm, finite = step(optimizer, summed, rate, label_tokens=5.0)
        g = summed / 5
        assert finite
        np.testing.assert_allclose(norm, np.linalg.norm(g), rtol=1e-6)
        if max_grad_norm is not None and np.linalg.norm(g) > max_grad_norm:
            assert number % 2 == 0
            g *= max_grad_norm / np.linalg.norm(g)
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        x = x - rate * decay * x
        x = x - rate * (m / (1 - beta1**number)) / (np.sqrt(v / (1 - beta2**number)) + eps)
        np.testing.assert_allclose(current(optimizer), x, rtol=0, atol=3e-6)
        np.testing.assert_array_equal(optimizer.grad.asnumpy(), 0)


def test_eight_bits_against_bitsandbytes(operators, golden):
    """Five steps of one matrix; the clipping that bitsandbytes does not do is off."""
    wanted = golden("adamw8bit")
    for signed, values in zip((True, False), wanted["maps"], strict=True):
        np.testing.assert_allclose(dynamic_map(signed), values, rtol=0, atol=1e-7)
    optimizer = optimizer_of({"w": wanted["start"]}, operators=operators, betas=(0.9, 0.99), weight_decay=0.1,
                             max_grad_norm=None, eight_bits=True)  # fmt: skip
    for gradient, parameters in zip(wanted["gradients"], wanted["parameters"], strict=True):
        step(optimizer, gradient, 1e-2)
        np.testing.assert_allclose(current(optimizer), parameters.ravel(), rtol=0, atol=2e-5)
    state = optimizer.whole_state()
    for name, codes, factors in zip(("exp_avg", "exp_avg_sq"), wanted["codes"], wanted["factors"], strict=True):
        np.testing.assert_allclose(state[f"{name}_factors"], factors, rtol=1e-5)
        off = np.abs(state[name].astype(int) - codes.astype(int))
        assert off.max() <= 1 and (off > 0).mean() < 0.01


def test_eight_bits_take_a_quarter(graph_mode):
    """Two bytes a number and two factors for 256, of the eight bytes of float32; whole blocks."""
    for size in (1, 256, 257, 100_000):
        state = PORTABLE.adamw_8bit(0.9, 0.999, 1e-8).state_of(size)
        assert sum(value.nbytes for value in state.values()) == -(-size // 256) * (512 + 8)


def test_an_overflow_leaves_eight_bits_as_they_are(operators):
    optimizer = optimizer_of(parameters(), operators=operators, eight_bits=True)
    step(optimizer, np.ones(14))
    before = {name: value.copy() for name, value in optimizer.whole_state().items()}
    assert step(optimizer, np.full(14, np.nan))[1] is False
    after = optimizer.whole_state()
    for name in ("exp_avg", "exp_avg_factors", "exp_avg_sq", "exp_avg_sq_factors", "count"):
        np.testing.assert_array_equal(after[name], before[name], err_msg=name)


@pytest.mark.parametrize("eight_bits", [False, True])
def test_state_in_a_file_is_the_same_state(native, tmp_path, eight_bits):
    """Step for step, restored in between; the file has no name, and its folder is empty."""
    kept = optimizer_of(parameters(), operators=native, eight_bits=eight_bits)
    paged = optimizer_of(parameters(), operators=native, eight_bits=eight_bits, paged_in=tmp_path)
    for number in range(4):
        summed = np.random.default_rng(number).standard_normal(14)
        assert step(kept, summed) == step(paged, summed)
        np.testing.assert_array_equal(current(kept), current(paged))
        if number == 1:
            state = {name: value.copy() for name, value in kept.whole_state().items()}
            paged = optimizer_of({p.name: p.asnumpy() for p in kept.params}, operators=native, eight_bits=eight_bits,
                                 paged_in=tmp_path)  # fmt: skip
            paged.restore(state)
    for name, value in paged.whole_state().items():
        np.testing.assert_array_equal(value, kept.whole_state()[name], err_msg=name)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_for_the_state(native, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(LoraMsError, match="KB for the optimiser's state cannot be had .No space left on device"):
        optimizer_of(parameters(), operators=native, paged_in=tmp_path)


def test_where_the_state_lies_is_told_to_mindspore(graph_mode):
    """A card has not been asked; the mark that it would go by is there, after a checkpoint too."""
    for swap, place in ((True, "CPU"), (False, None)):
        optimizer = optimizer_of(parameters(), swap=swap)
        optimizer.restore(optimizer.whole_state())
        marks = {name: p._get_user_data("parameter_device") for name, p in optimizer.state().items()}
        assert marks == dict.fromkeys(marks, None) | {"exp_avg": place, "exp_avg_sq": place}


def test_decay_acts_on_matrices_alone(graph_mode):
    values = parameters()
    optimizer = optimizer_of(values, weight_decay=0.5)
    step(optimizer, np.zeros(14), rate=0.1)
    wanted = {"w": values["w"] * 0.95, "b": values["b"], "v": values["v"] * 0.95}
    for p in optimizer.params:
        np.testing.assert_allclose(p.asnumpy(), wanted[p.name], rtol=1e-6)


def test_the_loss_scale_halves_on_overflow_and_grows_after_its_window(graph_mode):
    optimizer = optimizer_of(parameters(), loss_scaling=LossScaling(1024.0, window=2), weight_decay=0.1)
    reference = optimizer_of(parameters(), weight_decay=0.1)
    state = optimizer.state()

    def numbers() -> tuple[float, float, float]:
        return tuple(float(state[name].asnumpy()) for name in ("loss_scale", "good_steps", "count"))

    grads = np.random.default_rng(1).standard_normal(14)
    bad = grads.copy()
    for value in (np.inf, np.nan):
        bad[3] = value
        before, scale = current(optimizer), numbers()[0]
        assert step(optimizer, bad)[1] is False
        np.testing.assert_array_equal(current(optimizer), before)
        np.testing.assert_array_equal(state["exp_avg"].asnumpy(), 0)
        np.testing.assert_array_equal(state["exp_avg_sq"].asnumpy(), 0)
        np.testing.assert_array_equal(optimizer.grad.asnumpy(), 0)
        assert numbers() == (scale / 2, 0.0, 0.0)
    # gradients arrive multiplied by the scale, and the update is that of the unscaled ones
    seen = []
    for _ in range(5):
        norm, finite = step(optimizer, grads * numbers()[0])
        wanted, _ = step(reference, grads)
        assert finite
        np.testing.assert_allclose(norm, wanted, rtol=1e-6)
        np.testing.assert_allclose(current(optimizer), current(reference), rtol=0, atol=1e-6)
        seen.append(numbers())
    assert seen == [(256.0, 1.0, 1.0), (512.0, 0.0, 2.0), (512.0, 1.0, 3.0), (1024.0, 0.0, 4.0), (1024.0, 1.0, 5.0)]
    assert step(optimizer, bad)[1] is False  # an overflow starts the window anew
    assert numbers() == (512.0, 0.0, 5.0)


def test_without_a_loss_scale_it_stays_at_one(graph_mode):
    optimizer = optimizer_of(parameters())
    for value in (1.0, np.inf, 1.0):
        step(optimizer, np.full(14, value))
    assert float(optimizer.loss_scale.asnumpy()) == 1.0


def test_the_loss_scale_never_falls_below_one(graph_mode):
    optimizer = optimizer_of(parameters(), loss_scaling=LossScaling(2.0))
    for _ in range(3):
        step(optimizer, np.full(14, np.inf))
    assert float(optimizer.loss_scale.asnumpy()) == 1.0


class Pull(nn.Cell):
    """Half the squared distance from 1, and its gradient."""

    name = "distance"

    def construct(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        return 0.5 * ops.square(flat - 1.0).sum(), flat - 1.0


class Witness(nn.Cell):
    """Keeps what the last step showed it."""

    def __init__(self, n: int):
        super().__init__()
        self.new, self.grad = (Parameter(Tensor(np.zeros(n, np.float32)), name=name) for name in ("new", "seen"))
        self.taken = Parameter(Tensor(-1.0, ms.float32), name="taken")

    def state(self) -> dict[str, Parameter]:
        return {"seen": self.grad}

    def construct(self, new: Tensor, grad: Tensor, taken: Tensor) -> Tensor:
        ops.assign(self.new, new)
        ops.assign(self.grad, grad)
        ops.assign(self.taken, taken)
        return taken


def test_rates_objective_and_observer_against_float64(operators):
    """Each tensor at its own rate; the objective's is added to the mean gradient, before clipping."""
    beta1, beta2, eps, factors = 0.8, 0.95, 1e-6, np.repeat([1.0, 16.0, 0.0], [6, 4, 4])
    values, witness = parameters(), Witness(14)
    optimizer = optimizer_of(values, operators=operators, betas=(beta1, beta2), eps=eps, weight_decay=0.1,
                             max_grad_norm=2.0, rate_factors=[1.0, 16.0, 0.0], objectives=[Pull()],
                             observers=[witness])  # fmt: skip
    x = np.concatenate([value.ravel() for value in values.values()]).astype(np.float64)
    m, v, decay = np.zeros(14), np.zeros(14), 0.1 * np.repeat([1, 0, 1], [6, 4, 4])
    for number, rate in enumerate([0.01, 0.005, 0.02], start=1):
        summed = np.random.default_rng(number).standard_normal(14)
        norm, _ = step(optimizer, summed, rate, label_tokens=5.0)
        g = summed / 5 + x - 1
        np.testing.assert_allclose(norm, np.linalg.norm(g), rtol=1e-6)
        assert norm > 2
        g *= 2 / np.linalg.norm(g)
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        update = (m / (1 - beta1**number)) / (np.sqrt(v / (1 - beta2**number)) + eps)
        x = x - rate * factors * (decay * x + update)
        np.testing.assert_allclose(current(optimizer), x, rtol=0, atol=3e-6)
        np.testing.assert_allclose(witness.new.asnumpy(), current(optimizer), rtol=0, atol=0)
        np.testing.assert_allclose(witness.grad.asnumpy(), g, rtol=0, atol=1e-6)
        assert float(witness.taken.asnumpy()) == 1
    assert optimizer.state()["seen"] is witness.grad


def test_a_step_that_is_not_taken_shows_so(graph_mode):
    witness = Witness(14)
    optimizer = optimizer_of(parameters(), observers=[witness], loss_scaling=LossScaling(2.0))
    _, finite = step(optimizer, np.full(14, np.inf))
    assert not finite
    assert float(witness.taken.asnumpy()) == 0
    np.testing.assert_array_equal(witness.grad.asnumpy(), 0)


def test_loraplus_groups_as_peft_has_them(reference):
    """B and all of one dimension at the ratio, A and B on the embedding at a rate of their own, the rest at 1."""
    model = load_directory(reference / "models" / "qwen3")
    targets = ("q_proj", "embed_tokens")
    inject(model, LoraConfig(2, 4.0, target_modules=targets, use_dora=True, modules_to_save=("lm_head", "norm")))
    by_name = rate_factors(model, 16.0, 0.25)
    found = {name: by_name[name] for name, p in model.parameters_and_names() if p.requires_grad}
    q = "model.layers.0.self_attn.q_proj"
    assert {name: found[f"{q}.{name}"] for name in ("lora_a", "lora_b", "lora_magnitude")} == {
        "lora_a": 1.0, "lora_b": 16.0, "lora_magnitude": 16.0
    }  # fmt: skip
    assert {name.rpartition(".")[2]: f for name, f in found.items() if "embed_tokens" in name} == {
        "lora_a": 0.25, "lora_b": 0.25, "lora_magnitude": 16.0
    }  # fmt: skip
    assert (found["lm_head.weight"], found["model.norm.weight"]) == (1.0, 16.0)

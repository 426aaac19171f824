"""Extra terms of the loss: their gradients, where they are shown, and that a resumed run has the same."""

import dataclasses
import math
import shutil

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops

from lora_ms.errors import LoraMsError
from lora_ms.nn.parallel import Shard
from lora_ms.runtime.device import Runtime
from lora_ms.train.callbacks import StepRecord
from lora_ms.train.objectives import term_names
from lora_ms.train.optimizer import FlatAdamW
from lora_ms.train.report import fields_of
from lora_ms.train.steps import Steps


class Decay(nn.Cell):
    """``weight / 2`` times the squared distance of all parameters from ``centre``."""

    def __init__(self, name: str, weight: float, centre: float):
        super().__init__()
        self.name, self.weight, self.centre = name, weight, centre

    def construct(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        distance = parameters - self.centre
        return 0.5 * self.weight * ops.square(distance).sum(), self.weight * distance


class Witness(nn.Cell):
    """Sums the gradients that steps used."""

    def __init__(self, n: int):
        super().__init__()
        self.total = Parameter(ops.zeros(n, ms.float32), name="total", requires_grad=False)

    def state(self) -> dict[str, Parameter]:
        return {"witness": self.total}

    def construct(self, parameters: Tensor, gradient: Tensor, taken: Tensor) -> Tensor:
        return ops.assign(self.total, self.total + gradient)


class Hook:
    """Two terms and an observer; notes the steps it is told of."""

    def __init__(self):
        self.steps = []

    def objectives(self, params):
        return [Decay("pull", 0.5, 0.0), Decay("push", 0.25, 1.0)]

    def observer(self, params):
        self.witness = Witness(sum(p.size for p in params))
        return self.witness

    def after_step(self, step):
        self.steps.append(step)

    def describe(self):
        return ""

    def summary(self):
        return ""


def test_terms_are_summed_and_each_is_returned(graph_mode):
    x = np.random.default_rng(0).standard_normal(6).astype(np.float32)
    summed = np.random.default_rng(1).standard_normal(6).astype(np.float32)
    witness = Witness(6)
    terms = [Decay("pull", 0.5, 0.0), Decay("push", 0.25, 1.0)]
    optimizer = FlatAdamW(
        [Parameter(Tensor(x.reshape(2, 3)), name="w")], max_grad_norm=None, objectives=terms, observers=[witness]
    )
    optimizer.grad.set_data(Tensor(summed))
    norm, finite, *values = optimizer(Tensor(0.1, ms.float32), Tensor(4.0, ms.float32))
    wide = x.astype(np.float64)
    gradient = summed / 4 + 0.5 * wide + 0.25 * (wide - 1)
    np.testing.assert_allclose(witness.total.asnumpy(), gradient, rtol=0, atol=1e-6)
    np.testing.assert_allclose(float(norm.asnumpy()), np.linalg.norm(gradient), rtol=1e-6)
    wanted = [0.25 * np.sum(wide**2), 0.125 * np.sum((wide - 1) ** 2)]
    np.testing.assert_allclose([float(value.asnumpy()) for value in values], wanted, rtol=1e-6)
    assert bool(finite.asnumpy())


@pytest.mark.parametrize("names", [["loss"], ["pull", "pull"], ["cross_entropy"]])
def test_a_name_that_is_taken(names):
    with pytest.raises(ValueError, match=names[-1]):
        term_names([Decay(name, 1.0, 0.0) for name in names], ["step", "loss"])


def test_a_record_shows_its_terms_under_their_names():
    record = StepRecord(
        step=1, epoch=0.5, loss=3.0, grad_norm=0.5, learning_rate=1e-3, tokens=100, label_tokens=40,
        tokens_per_second=1234.5, step_time_s=0.1, wait_share=0.0, peak_memory_mb=300.0,
    )  # fmt: skip
    plain = fields_of(record)
    assert "terms" not in plain and list(plain)[-1] == "peak_memory_mb"
    terms = {"cross_entropy": 2.0, "pull": 1.0}
    assert fields_of(dataclasses.replace(record, terms=terms)) == plain | terms


@pytest.fixture(scope="module")
def with_terms(train, tmp_path_factory):
    """The six steps of ``plain_run`` with two more terms."""
    hook = Hook()
    return hook, train(tmp_path_factory.mktemp("terms"), hooks=[hook], save_steps=3)


def test_the_loss_is_the_sum_and_each_term_is_logged(with_terms, plain_run):
    hook, found = with_terms
    assert hook.steps == list(range(6))
    for record in found.records:
        assert list(record)[-3:] == ["cross_entropy", "pull", "push"]
        assert record["loss"] == record["cross_entropy"] + (record["pull"] + record["push"])
        assert record["pull"] > 0 and record["push"] > 0
    assert not any("cross_entropy" in record for record in plain_run.records)
    # nothing is trained before the first step
    assert found.records[0]["cross_entropy"] == plain_run.losses[0]
    assert found.records[0]["grad_norm"] != plain_run.records[0]["grad_norm"]
    assert (found.outcome.first_loss, found.outcome.last_loss) == (found.losses[0], found.losses[-1])


def test_the_terms_act_on_the_parameters(with_terms, plain_run):
    """They pull A and B towards a third, which the plain run does not."""
    _, found = with_terms
    far = [sum(np.square(value - 1 / 3).sum() for value in run.adapter.values()) for run in (found, plain_run)]
    assert far[0] < far[1]


def test_a_resumed_run_has_the_same_terms(with_terms, train, tmp_path):
    _, wanted = with_terms
    shutil.copytree(wanted.path, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_6")
    hook = Hook()
    found = train(tmp_path / "run", hooks=[hook], resume=True)
    assert hook.steps == [3, 4, 5]
    assert found.records == wanted.records
    for name, value in wanted.adapter.items():
        np.testing.assert_array_equal(found.adapter[name], value, err_msg=name)


def test_processes_that_share_a_model_have_no_terms(settings, tmp_path):
    runtime = Runtime("CPU", world=2, shard=Shard(0, 2))
    with pytest.raises(LoraMsError) as caught:
        Steps(nn.Dense(2, 2), None, settings(tmp_path), runtime, vocab_size=2, hooks=[Hook()])
    assert str(caught.value) == (
        "loss terms (pull, push) are not supported with parallel_config.model_parallel 2: set it to 1, or leave the "
        "terms out"
    )


def test_a_term_that_is_no_number_stops_the_run(train, tmp_path):
    hook = Hook()
    hook.objectives = lambda params: [Decay("pull", math.inf, 0.0)]
    with pytest.raises(LoraMsError, match=r"^the loss of step 1 \(rows .*\) is inf; no weight was changed by it"):
        train(tmp_path, hooks=[hook])

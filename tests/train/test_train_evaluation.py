"""Evaluation while training: its numbers, what it keeps, what it stops, and that it changes nothing."""

import shutil
from math import inf, nan
from types import SimpleNamespace

import numpy as np
import pytest
from mindspore import Tensor
from safetensors.numpy import load_file

from lora_ms.adapters.peft_format import load_adapter
from lora_ms.data.example import IGNORE_INDEX, TokenRow
from lora_ms.models.hub import load_directory
from lora_ms.train.callbacks import TrainerCallback
from lora_ms.train.evaluation import Evaluator

ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def held_out(rows) -> list[TokenRow]:
    """Ten rows of 5 to 16 tokens; a training step has eight, an evaluation batch four."""
    return [TokenRow(f"held out {i}", row.input_ids[::-1].copy(), row.labels) for i, row in enumerate(rows[:10])]


@pytest.fixture(scope="module")
def evaluated(train, held_out, tmp_path_factory):
    """The six steps of ``plain_run``, evaluated after every second and saved after each."""
    path = tmp_path_factory.mktemp("evaluated") / "run"
    answers = iter([{"prompt": "Wer?", "answer": f"ich {i} 好"}] for i in range(9))
    every = {"eval_steps": 2, "save_steps": 1, "keep_checkpoint_max": 6}
    return train(path, held_out=held_out, sample=lambda: next(answers), **every)


def independent(path, reference, held_out) -> tuple[float, float, int]:
    """Loss, accuracy and number of label tokens of the adapter in ``path``, from whole logits in float64."""
    model = load_directory(reference / "models" / "qwen2")
    load_adapter(model, str(path))
    ids, labels = np.zeros((10, 16), np.int32), np.full((10, 16), IGNORE_INDEX)
    for i, row in enumerate(held_out):
        ids[i, : len(row.input_ids)], labels[i, : len(row.labels)] = row.input_ids, row.labels
    logits = model.set_train(False)(Tensor(ids)).asnumpy().astype(np.float64)[:, :-1]
    asked = labels[:, 1:] != IGNORE_INDEX
    logits, wanted = logits[asked], labels[:, 1:][asked]
    largest = logits.max(1)
    log_sum = largest + np.log(np.exp(logits - largest[:, None]).sum(1))
    loss = log_sum - logits[np.arange(len(wanted)), wanted]
    return loss.mean(), (logits.argmax(1) == wanted).mean(), len(wanted)


def test_an_evaluation_changes_nothing(evaluated, plain_run):
    assert [record for record in evaluated.records if "loss" in record] == plain_run.records
    for name, value in plain_run.adapter.items():
        np.testing.assert_array_equal(evaluated.adapter[name], value, err_msg=name)


def test_every_n_steps(evaluated):
    assert [(e["step"], e["epoch"]) for e in evaluated.evaluations] == [(2, 0.3333), (4, 0.6667), (6, 1.0)]
    order = [(record["step"], "loss" in record) for record in evaluated.records]
    assert order == [
        (1, True),
        (2, True),
        (2, False),
        (3, True),
        (4, True),
        (4, False),
        (5, True),
        (6, True),
        (6, False),
    ]


@pytest.mark.parametrize("number", [0, 2])
def test_the_scores_by_numpy(evaluated, reference, held_out, number):
    found = evaluated.evaluations[number]
    loss, accuracy, tokens = independent(evaluated.path / "checkpoints" / f"step_{found['step']}", reference, held_out)
    assert found["eval_loss"] == pytest.approx(loss, rel=2e-6)
    assert found["eval_perplexity"] == pytest.approx(np.exp(loss), rel=1e-5)
    assert found["eval_accuracy"] == pytest.approx(accuracy, abs=1e-9)
    assert found["eval_label_tokens"] == tokens


def test_samples_stand_in_the_records(evaluated):
    assert [e["samples"] for e in evaluated.evaluations] == [
        [{"prompt": "Wer?", "answer": f"ich {i} 好"}] for i in range(3)
    ]


def test_the_best_weights_are_kept(evaluated, worsened):
    for run in (evaluated, worsened):
        losses = {e["step"]: e["eval_loss"] for e in run.evaluations}
        best = min(losses, key=losses.get)
        kept = load_file(run.path / "best" / ADAPTER)
        wanted = load_file(run.path / "checkpoints" / f"step_{best}" / ADAPTER)
        assert sorted(kept) == sorted(wanted)
        for name, value in wanted.items():
            np.testing.assert_array_equal(kept[name], value, err_msg=name)
        assert [e["best"] for e in run.evaluations] == [
            loss == min(list(losses.values())[: i + 1]) for i, loss in enumerate(losses.values())
        ]


def test_a_loss_that_is_not_finite_is_never_the_best():
    class Made(Evaluator):
        sample = None
        model = SimpleNamespace(training=False, set_train=lambda training: None)

        def __init__(self, loss):
            self.loss = loss

        def shown(self):
            return {"eval_loss": self.loss, "eval_perplexity": None, "eval_accuracy": None, "eval_label_tokens": 1}

    for loss, before, best in ((nan, None, False), (nan, 2.0, False), (inf, None, False), (1.0, None, True)):
        assert Made(loss).evaluate(1, 1.0, before).best == best


def test_a_resumed_run_has_the_same_evaluations(train, evaluated, held_out, tmp_path):
    """From step 3: the best so far is that of step 2."""
    shutil.copytree(evaluated.path, tmp_path / "run")
    for step in (4, 5, 6):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{step}")
    answers = iter([{"prompt": "Wer?", "answer": f"ich {i} 好"}] for i in (1, 2))
    found = train(tmp_path / "run", held_out=held_out, sample=lambda: next(answers), eval_steps=2, resume=True)
    assert found.records == evaluated.records
    for name, value in evaluated.adapter.items():
        np.testing.assert_array_equal(found.adapter[name], value, err_msg=name)


class Seen(TrainerCallback):
    """Keeps what it is told."""

    def __init__(self):
        self.points = []

    def on_train_begin(self, state):
        self.points.append(("begin", state.step))

    def on_step_end(self, state, record):
        self.points.append(("step", record.step))

    def on_evaluate(self, state, evaluation):
        self.points.append(("evaluate", evaluation.step, state.worse))

    def on_save(self, state, path):
        self.points.append(("save", path.name))

    def on_train_end(self, state):
        self.points.append(("end", state.step))


@pytest.fixture(scope="module")
def seen() -> Seen:
    return Seen()


@pytest.fixture(scope="module")
def worsened(train, rows, seen, tmp_path_factory):
    """Two steps an epoch, evaluated after each on what is unlearnt: rows whose labels are shifted by one."""
    wrong = [
        TokenRow(r.where, r.input_ids, np.where(r.labels == IGNORE_INDEX, r.labels, (r.labels + 1) % 128))
        for r in rows[:8]
    ]
    path = tmp_path_factory.mktemp("worsened")
    settings = {
        "epochs": 10,
        "eval_epochs": 1,
        "patience": 2,
        "save_steps": -1,
        "warmup_steps": 0,
        "learning_rate": 2e-2,
    }
    return train(path, data=rows[:16], held_out=wrong, callbacks=[seen], **settings)


def test_evaluations_by_epoch_stop_the_run_early(worsened, seen):
    """After the second evaluation in a row that is not the best."""
    losses = [e["eval_loss"] for e in worsened.evaluations]
    assert [e["step"] for e in worsened.evaluations] == [2 * i for i in range(1, len(losses) + 1)]
    assert int(np.argmin(losses)) == len(losses) - 3 and len(losses) < 10
    assert (worsened.outcome.steps, worsened.outcome.stopped) == (2 * len(losses), False)
    best = f"{min(losses):.4f} at step {2 * len(losses) - 4}"
    assert worsened.outcome.reason == f"no better evaluation in the last 2 (best: {best})"


def test_callbacks_are_told_in_order(worsened, seen):
    steps = worsened.outcome.steps
    told = [("begin", 0)]
    for step in range(1, steps + 1):
        told.append(("step", step))
        if step % 2 == 0:
            told += [("evaluate", step, max(0, (step - steps) // 2 + 2)), ("save", f"step_{step}")]
    assert seen.points == [*told, ("end", steps)]

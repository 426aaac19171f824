"""Learning without forgetting from the command line: Fisher information, terms of the loss, the report, tasks."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from lora_ms.cli.main import main

TIMES = ("tokens_per_second", "step_time_s", "wait_share", "peak_memory_mb")


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def files(token_rows, tmp_path_factory) -> dict[str, str]:
    """Five domain rows and three general ones."""
    folder = tmp_path_factory.mktemp("rows")
    return {
        "domain": write(folder / "domain.jsonl", token_rows[:5]),
        "general": write(folder / "general.jsonl", token_rows[5:]),
    }


def flags(model: Path, files: dict[str, str], output: Path, *more: str) -> list[str]:
    mix = [{"dataset_dir": files[name], "weight": n, "role": name} for name, n in (("domain", 5), ("general", 3))]
    words = ["--load_checkpoint", str(model), "--output_dir", str(output), "--max_steps", "4", "--batch_size", "8"]
    words += ["--seq_length", "16", "--learning_rate", "0.01", "--seed", "3"]
    return [*words, "--train_dataset.mix", json.dumps(mix), *more]


LORA = ["--lora_rank", "2", "--lora_alpha", "16", "--target_modules", "q_proj|up_proj", "--lora_dropout", "0"]


def single_rows(model: Path, file: str) -> dict[str, np.ndarray]:
    """The mean squared gradient, from a loop over rows with ``value_and_grad`` of the whole model."""
    import mindspore as ms
    from mindspore import Tensor, ops

    from lora_ms.data.collate import collate
    from lora_ms.data.example import TokenRow
    from lora_ms.models.hub import load_directory
    from lora_ms.train.parts import SummedLoss

    net = load_directory(model)
    trained = {name: p for name, p in net.parameters_and_names() if p.requires_grad}
    gradient = ops.value_and_grad(SummedLoss(net, 128).set_train(), None, ms.ParameterTuple(list(trained.values())))
    rows = [json.loads(line) for line in Path(file).read_text().splitlines()]
    total = {name: np.zeros(p.shape) for name, p in trained.items()}
    for row in rows:
        one = TokenRow("", np.array(row["input_ids"], np.int32), np.array(row["labels"], np.int32))
        batch = collate([[one]], 1, 16, 16, 0)
        _, found = gradient(*map(Tensor, batch[:4]))
        for name, value in zip(trained, found, strict=True):
            total[name] += (value.asnumpy().astype(np.float64) / batch.label_tokens) ** 2 / len(rows)
    return total


def test_fisher_is_the_mean_over_single_rows(model, files, tmp_path, capsys):
    """Of the general part alone, at the values before training."""
    file = tmp_path / "f.safetensors"
    words = [*flags(model, files, tmp_path / "o"), "--options", "pet_config=null"]
    assert main(["fisher", *words, "--output", str(file)]) == 0
    assert "on 3 rows" in capsys.readouterr().out
    found, wanted = load_file(file), single_rows(model, files["general"])
    assert sorted(found) == sorted(wanted)
    for name, value in wanted.items():
        # of the largest: a small gradient is a difference of large numbers, rounded (4e-5 of itself in float32)
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-5 * value.max(), err_msg=name)
    with safe_open(file, "numpy") as opened:
        settings = json.loads(opened.metadata()["lora_ms_fisher"])
    assert settings["rows"] == 3 and settings["loss"] == "mean over the row's label tokens"
    assert not (tmp_path / "o").exists() and not list(tmp_path.glob("*.part"))


def test_fisher_of_the_first_rows_of_a_part(model, files, tmp_path):
    """As of a file that has no others."""
    words = ["fisher", *flags(model, files, tmp_path / "o"), *LORA, "--params", ".*lora_b"]
    rows = Path(files["general"]).read_text().splitlines(keepends=True)
    (tmp_path / "two.jsonl").write_text("".join(rows[:2]))
    whole, first, two = (tmp_path / name for name in ("whole", "first", "two"))
    assert main([*words, "--output", str(whole)]) == 0
    assert main([*words, "--train_dataset.mix.1.num_samples", "2", "--output", str(first)]) == 0
    assert main([*words, "--train_dataset.mix.1.dataset_dir", str(tmp_path / "two.jsonl"), "--output", str(two)]) == 0
    settings = []
    for file in (first, two):
        with safe_open(file, "numpy") as opened:
            settings.append(json.loads(opened.metadata()["lora_ms_fisher"]))
    assert settings[0] == settings[1] and settings[0]["rows"] == 2
    for name, value in load_file(two).items():
        np.testing.assert_array_equal(load_file(first)[name], value, err_msg=name)
        assert np.any(load_file(whole)[name] != value)


def test_fisher_goes_on_where_it_was_stopped(model, files, tmp_path, monkeypatch, capsys):
    """After two of three rows, as after a kill: the same numbers to the bit. Chosen parameters alone."""
    from lora_ms.recipes import fisher
    from lora_ms.train.fisher import FisherRun

    words = ["fisher", *flags(model, files, tmp_path / "o"), *LORA, "--params", ".*lora_b"]
    assert main([*words, "--output", str(tmp_path / "whole")]) == 0
    assert all(name.endswith("lora_b") for name in load_file(tmp_path / "whole"))

    def killed(self, start):
        for step in taken(self, start):
            yield step
            if step == 2:
                raise KeyboardInterrupt

    taken = FisherRun.steps
    monkeypatch.setattr(fisher, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(FisherRun, "steps", killed)
    assert main([*words, "--output", str(tmp_path / "cut")]) == 130
    assert (tmp_path / "cut.part").is_file() and not (tmp_path / "cut").exists()
    monkeypatch.setattr(FisherRun, "steps", taken)
    capsys.readouterr()
    assert main([*words, "--output", str(tmp_path / "cut")]) == 0
    assert "going on after 2 of 3 steps" in capsys.readouterr().out
    whole, cut = load_file(tmp_path / "whole"), load_file(tmp_path / "cut")
    assert all(value.any() for value in whole.values())
    for name, value in whole.items():
        np.testing.assert_array_equal(cut[name], value, err_msg=name)
    assert main([*words[:-1], "nothing"]) == 2
    assert "fits none of the parameters that train" in capsys.readouterr().err


@pytest.mark.parametrize("signalled", [True, False])
def test_fisher_of_several_processes_stops_in_all_after_the_same_step(
    model, files, tmp_path, monkeypatch, capsys, signalled
):
    """Whether this process or another one got the signal; each waits for the file to be written."""
    from lora_ms.recipes import session
    from lora_ms.runtime.device import Runtime
    from lora_ms.train.fisher import FisherRun

    def steps(self, start):
        for step in taken(self, start):
            if signalled:
                os.kill(os.getpid(), signal.SIGINT)
            yield step

    def summed(values):  # of the flags, with the other process's
        return values + (not signalled) if values.size == 1 else values

    taken, waited = FisherRun.steps, []
    monkeypatch.setattr(FisherRun, "steps", steps)
    monkeypatch.setattr(Runtime, "data_sum", lambda self: summed)
    monkeypatch.setattr(session, "wait_for_all", lambda: waited.append((tmp_path / "f.part").is_file()))
    words = ["fisher", *flags(model, files, tmp_path / "o"), *LORA, "--params", ".*lora_b"]
    assert main([*words, "--output", str(tmp_path / "f")]) == 130
    assert waited == [True] and "stopped after 1 of 3, and kept in" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_fisher_of_all_parameters_is_of_float32(model, files, tmp_path, capsys, dtype):
    words = ["fisher", *flags(model, files, tmp_path / "o"), "--output", str(tmp_path / "f"), "--options"]
    assert main([*words, "pet_config=null", f"model.model_config.compute_dtype={dtype}"]) == 2
    assert "all parameters train in float32 only: set compute_dtype to float32" in capsys.readouterr().err
    assert not (tmp_path / "f").exists()


def test_fisher_of_virtual_tokens(model, files, tmp_path):
    """They stand before the rows."""
    words = [*flags(model, files, tmp_path / "o"), "--options", "pet_config={pet_type: prompt, num_virtual_tokens: 2}"]
    assert main(["fisher", *words, "--output", str(tmp_path / "f")]) == 0
    (values,) = load_file(tmp_path / "f").values()
    assert len(values) == 2 and values.all()


def records(folder: Path) -> list[dict]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in TIMES} for record in found]


@pytest.fixture(scope="module")
def hybrid(model, files, tmp_path_factory) -> tuple[list[str], Path]:
    """The words of a run with EWC, contrast and an anchor to the start's answers, and its finished folder."""
    folder = tmp_path_factory.mktemp("hybrid")
    terms = [
        {"type": "ewc", "weight": 0.2, "fisher": str(folder / "fisher.safetensors")},
        {"type": "contrastive", "weight": 0.1},
        {"type": "kl_anchor", "weight": 0.3},
    ]
    words = [*flags(model, files, folder / "run"), *LORA, "--objectives", json.dumps(terms)]
    words = [*words[:-2], "--options", f"objectives={words[-1]}", "callbacks.1.save_checkpoint_steps=2"]
    assert main(["fisher", *words]) == 0
    assert main(["finetune", *words]) == 0
    return words, folder / "run"


def test_a_hybrid_loss(hybrid):
    found = records(hybrid[1])
    names = ["cross_entropy", "ewc", "contrastive", "kl_anchor"]
    for record in found:
        assert list(record)[-4:] == names
        assert record["loss"] == pytest.approx(sum(record[name] for name in names), rel=1e-6)
        assert record["contrastive"] > 0
    assert found[0]["ewc"] == 0 and abs(found[0]["kl_anchor"]) < 1e-5  # nothing has moved
    assert found[-1]["ewc"] > 0 and found[-1]["kl_anchor"] > 1e-4


def test_a_hybrid_loss_goes_on_to_the_bit(hybrid, tmp_path):
    words, wanted = hybrid
    shutil.copytree(wanted, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_4")
    words = [*words, "output_dir=" + str(tmp_path / "run")]
    assert main(["finetune", *words, "--resume_training", "True"]) == 0
    assert records(tmp_path / "run") == records(wanted)
    for name, value in load_file(wanted / "adapter" / "adapter_model.safetensors").items():
        np.testing.assert_array_equal(load_file(tmp_path / "run/adapter/adapter_model.safetensors")[name], value)


def test_packed_and_padded_rows_have_the_same_anchor(model, files, tmp_path):
    words = [*flags(model, files, tmp_path), *LORA, "--max_steps", "3", "--options", "objectives=[{type: kl_anchor}]"]
    for name in ("packed", "padded"):
        more = [f"output_dir={tmp_path / name}", f"train_dataset.packing={name == 'packed'}"]
        assert main(["finetune", *words, *more]) == 0
    packed, padded = records(tmp_path / "packed"), records(tmp_path / "padded")
    assert packed[-1]["kl_anchor"] > 1e-4
    for found, wanted in zip(padded, packed, strict=True):
        for name in ("cross_entropy", "kl_anchor"):
            assert found[name] == pytest.approx(wanted[name], rel=1e-4, abs=1e-6), name


def test_terms_need_their_rows(model, files, tmp_path, capsys):
    words = [*flags(model, files, tmp_path), "--options", "objectives=[{type: contrastive}]"]
    assert main(["finetune", *words, "--train_dataset.mix.1.role", "domain"]) == 2
    assert "contrastive needs domain rows and at least 2 general ones" in capsys.readouterr().err
    missing = "objectives=[{type: ewc, fisher: nowhere}]"
    for more in ([], ["--dry_run"]):
        assert main(["finetune", *words, missing, *more]) == 2
        said = capsys.readouterr()
        assert "nowhere: no such file: lora-ms fisher writes it" in said.err + said.out
    assert main(["finetune", *words, "backend=mindformers"]) == 2
    assert "objectives need backend native" in capsys.readouterr().err


# --- the report


def test_choices_are_read(tmp_path):
    from lora_ms.data.choices import read_choices
    from lora_ms.errors import LoraMsError

    rows = [
        {"question": "a", "choices": ["x", "y"], "answer": 1},
        {"question": "b", "choices": ["x", "y", "z"], "answer": "C"},
        {"question": "c", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"},
        {"query": "d", "options": ["x", "y"], "answer": "x"},
    ]
    assert [row.answer for row in read_choices(write(tmp_path / "q.jsonl", rows))] == [1, 2, 1, 0]
    for row, said in [
        ({"question": "a", "choices": ["x", "y"], "answer": 2}, "q.jsonl:1: answer 2 is none of the choices"),
        ({"question": "a", "choices": ["x"], "answer": 0}, "choices is no list of 2 to 26 texts"),
        ({"choices": ["x", "y"], "answer": 0}, "no question; the row has choices, answer"),
    ]:
        with pytest.raises(LoraMsError, match=said):
            read_choices(write(tmp_path / "q.jsonl", [row]))


def test_scores_of_sets(text_model):
    """Against the logits of the whole model, row by row."""
    from mindspore import Tensor

    from lora_ms.data.choices import ChoiceRow, tokens_of
    from lora_ms.data.store import TokenStore
    from lora_ms.data.tokenizer import load_tokenizer
    from lora_ms.models.hub import load_directory
    from lora_ms.recipes.data import held_out_plan
    from lora_ms.runtime import device
    from lora_ms.train.forgetting import ScoredSet, SetScorer

    here = device.setup("CPU")[0]
    net = load_directory(text_model, operators=here.operators)
    tokenizer = load_tokenizer(str(text_model))
    questions = [ChoiceRow("", "ab", ("c", "dd", "e"), 1), ChoiceRow("", "x", ("yy", "z"), 0)]
    rows, choices = tokens_of(tokenizer, questions, 64)
    assert choices == [3, 2] and len(rows) == 5
    right, losses, counts = [], [], []
    ids = np.zeros((len(rows), max(len(row.input_ids) for row in rows)), np.int32)
    for line, row in zip(ids, rows, strict=True):
        line[: len(row.input_ids)] = row.input_ids
    for row, logits in zip(rows, net(Tensor(ids)).asnumpy().astype(np.float64), strict=True):
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        places = np.flatnonzero(row.labels != -100)
        losses.append(-logs[places - 1, row.labels[places]].sum())
        right.append(np.sum(logits[places - 1].argmax(-1) == row.labels[places]))
        counts.append(len(places))
    losses, right, counts = map(np.array, (losses, right, counts))
    best = [int(np.argmin(losses[:3])), int(np.argmin(losses[3:]))]
    store = TokenStore.of(rows)
    plan = held_out_plan(store, 1, tokenizer, 64, here, packing=False)
    sets = {
        "loss": ScoredSet("loss", held_out_plan(store, 2, tokenizer, 64, here)),
        "exact": ScoredSet("exact", plan),
        "choice": ScoredSet("choice", plan, choices, best),
        "half": ScoredSet("choice", plan, choices, [best[0], 1 - best[1]]),
    }
    found = SetScorer(net, sets, here, 128).scores()
    wanted = {
        "loss": (losses.sum() / counts.sum(), right.sum() / counts.sum()),
        "exact": (losses.sum() / counts.sum(), np.mean(right == counts)),
        "choice": ((losses[best[0]] + losses[3 + best[1]]) / (counts[best[0]] + counts[3 + best[1]]), 1.0),
        "half": ((losses[best[0]] + losses[4 - best[1]]) / (counts[best[0]] + counts[4 - best[1]]), 0.5),
    }
    for name, (loss, accuracy) in wanted.items():
        assert found[name]["loss"] == pytest.approx(loss, rel=1e-4), name
        assert found[name]["accuracy"] == pytest.approx(accuracy, abs=1e-6), name


def test_sets_are_scored_behind_virtual_tokens(text_model):
    """As the model is called: a row's own tokens keep their keys and values."""
    from mindspore import Tensor

    from lora_ms.adapters.inject import inject
    from lora_ms.adapters.methods.prefix import PrefixTuningConfig
    from lora_ms.config import load_config
    from lora_ms.data.example import TokenRow
    from lora_ms.data.store import TokenStore
    from lora_ms.models.hub import load_directory
    from lora_ms.recipes.forgetting import ReadSet, scorer_of
    from lora_ms.runtime import device

    here = device.setup("CPU")[0]
    net = load_directory(text_model, operators=here.operators)
    inject(net, PrefixTuningConfig(num_virtual_tokens=3))
    ids = np.arange(4, 12, dtype=np.int32)
    store = TokenStore.of([TokenRow("", ids, np.where(ids > 6, ids, -100).astype(np.int32))])
    logits = net(Tensor(ids[None])).asnumpy()[0].astype(np.float64)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    found = scorer_of(load_config(None), net, {"set": ReadSet("loss", store)}, None, 16, here).scores()
    assert found["set"]["loss"] == pytest.approx(-logs[np.arange(2, 7), ids[3:]].mean(), rel=1e-4)


def test_a_report_of_forgetting(model, files, tmp_path, capsys):
    sets = {"general": {"dataset_dir": files["general"]}, "domain": {"dataset_dir": files["domain"], "metric": "exact"}}
    words = [*flags(model, files, tmp_path), *LORA, "--options", f"evaluation.sets={json.dumps(sets)}"]
    words += ["eval_step_interval=2", "callbacks.1.save_checkpoint_steps=2"]
    assert main(["finetune", *words]) == 0
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if line.startswith("forgetting:")]
    found = json.loads((tmp_path / "forgetting.json").read_text())
    assert [point["step"] for point in found["points"]] == [0, 2, 4]
    general, domain = found["sets"]["general"], found["sets"]["domain"]
    assert (general["metric"], general["compared"], general["rows"]) == ("loss", "loss", 3)
    assert (domain["metric"], domain["compared"], domain["rows"]) == ("exact", "accuracy", 5)
    assert general["before"] == found["points"][0]["scores"]["general"]["loss"]
    assert general["change"] == general["after"] - general["before"] != 0
    assert (
        f"general loss {general['before']:.4f} -> {general['after']:.4f}" in line and "domain accuracy 0.0% ->" in line
    )
    assert (tmp_path / "forgetting.png").stat().st_size > 1000
    shutil.rmtree(tmp_path / "checkpoints" / "step_4")
    assert main(["finetune", *words, "--resume_training", "True"]) == 0
    assert json.loads((tmp_path / "forgetting.json").read_text()) == found
    words = ["eval", "--load_checkpoint", str(model), "--options", f"evaluation.sets={json.dumps(sets)}"]
    capsys.readouterr()
    assert main(words) == 0
    assert capsys.readouterr().out.splitlines()[-2].startswith(f"general: loss {general['before']:.4f}  accuracy ")


def test_keys_of_a_set(model, files, tmp_path, capsys):
    words = [*flags(model, files, tmp_path), "--options"]
    assert main(["finetune", *words, "evaluation.sets={g: {dataset_dir: x, metrik: loss}}"]) == 2
    assert "unknown key evaluation.sets.g.metrik; did you mean" in capsys.readouterr().err
    assert main(["finetune", *words, "evaluation.sets={g: {dataset_dir: nowhere.jsonl}}"]) == 2
    assert capsys.readouterr().err.startswith("error: evaluation.sets.g: ")


# --- tasks in turn


def test_numbers_of_a_matrix():
    from lora_ms.train.sequence import TaskMatrix

    scores = np.array([[0.9, 0.2, 0.1], [0.6, 0.8, 0.2], [0.5, 0.7, 1.0]])
    names, shown = ["a", "b", "c"], ["accuracy"] * 3
    whole = TaskMatrix(names, shown, np.zeros(3), scores)
    assert whole.mean == pytest.approx((0.5 + 0.7 + 1.0) / 3)
    assert whole.backward_transfer == pytest.approx(((0.5 - 0.9) + (0.7 - 0.8)) / 2)
    assert whole.lines()[-1] == "sequence: mean accuracy 73.3% after 3 of 3 tasks, backward transfer -25.0 points"
    assert TaskMatrix(names, shown, np.zeros(3), scores[:1]).backward_transfer is None


def test_the_first_rows_of_a_task_are_not_the_first_of_those_that_are_replayed(files, tmp_path):
    from lora_ms.config import load_config
    from lora_ms.recipes.sequence import config_of

    tasks = [{"name": "a", "dataset_dir": files["domain"], "eval_dir": files["domain"], "num_samples": 3}]
    general = {"dataset_dir": files["general"], "weight": 1, "role": "general"}
    for mix in ([], [general]):
        config = load_config(
            None, flags={"output_dir": str(tmp_path), "sequence.tasks": tasks, "train_dataset.mix": mix}
        )
        dataset = config_of(config, 0).train_dataset
        found = [part.num_samples or dataset.num_samples for part in dataset.mix] or [dataset.num_samples]
        assert found == [3, None][: len(mix) + 1]


def test_a_task_has_the_weights_of_the_domain_parts(files, tmp_path):
    from lora_ms.config import load_config
    from lora_ms.recipes.sequence import config_of

    tasks = [{"name": "a", "dataset_dir": files["domain"], "eval_dir": files["domain"]}]
    general = {"dataset_dir": files["general"], "weight": 1, "weight_end": 4, "role": "general"}
    plain, falling = {"dataset_dir": "x", "weight": 3}, {"dataset_dir": "y", "weight": 2, "weight_end": 0.5}
    for domain, wanted in (([], (1, None)), ([plain], (3, None)), ([plain, falling], (5, 3.5))):
        mix = [*domain, general]
        config = load_config(
            None, flags={"output_dir": str(tmp_path), "sequence.tasks": tasks, "train_dataset.mix": mix}
        )
        own, replayed = config_of(config, 0).train_dataset.mix
        assert (own.weight, own.weight_end, replayed.weight_end) == (*wanted, 4)


@pytest.mark.parametrize("orthogonal", [False, True])
def test_tasks_in_turn(model, files, tmp_path, capsys, monkeypatch, orthogonal):
    """Stopped in the second task, and gone on with: the first is not learnt again."""
    from lora_ms.commands import finetune

    tasks = [
        {"name": name, "dataset_dir": files[name], "eval_dir": files[name], "metric": "loss"}
        for name in ("domain", "general")
    ]
    words = ["sequence", *flags(model, files, tmp_path)[:-2], *LORA]
    words += ["--options", f"sequence.tasks={json.dumps(tasks)}"]
    if orthogonal:
        words.append("objectives=[{type: orthogonal}]")

    def cut(config):
        if "general" in config.output_dir:
            raise KeyboardInterrupt
        run(config)

    run = finetune.run
    monkeypatch.setattr(finetune, "run", cut)
    assert main(words) == 130
    monkeypatch.setattr(finetune, "run", run)
    capsys.readouterr()
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "task 1 of 2: domain: learnt before" in said and "\nsequence: mean loss" in said
    found = json.loads((tmp_path / "sequence.json").read_text())
    matrix = np.array(found["matrix"])
    assert matrix.shape == (2, 2) and np.all(np.diag(matrix) < found["before"])  # each is learnt
    assert found["backward_transfer"] == pytest.approx(matrix[1, 0] - matrix[0, 0])
    assert (tmp_path / "sequence.png").is_file()
    second = json.loads((tmp_path / "task_2_general" / "forgetting.json").read_text())["points"]
    # the second begins where the first has ended
    assert second[0]["scores"]["domain"]["loss"] == pytest.approx(matrix[0, 0], rel=1e-5)
    assert ("orthogonal" in records(tmp_path / "task_2_general")[0]) == orthogonal
    assert "orthogonal" not in records(tmp_path / "task_1_domain")[0]
    assert main([*words, "seed=4"]) == 2
    assert "was learnt with other settings" in capsys.readouterr().err


def test_orthogonal_tasks_start_from_an_adapter_once(model, files, tmp_path):
    """The first task goes on with it; the model of the second has it in it, and the second's own begins at nothing."""
    words = [*flags(model, files, tmp_path / "o")[:-2], *LORA]
    given = ["--train_dataset_dir", files["domain"], "--output_dir", str(tmp_path / "given")]
    assert main(["finetune", *words, *given]) == 0
    tasks = [
        {"name": name, "dataset_dir": files[name], "eval_dir": files[name], "metric": "loss"}
        for name in ("domain", "general")
    ]
    more = ["--load_adapter", str(tmp_path / "given" / "adapter")]
    more += ["--options", f"sequence.tasks={json.dumps(tasks)}", "objectives=[{type: orthogonal}]"]
    assert main(["sequence", *words, *more]) == 0
    first, second = (
        [point["scores"]["domain"]["loss"] for point in json.loads((folder / "forgetting.json").read_text())["points"]]
        for folder in (tmp_path / "o/task_1_domain", tmp_path / "o/task_2_general")
    )
    assert first[0] < records(tmp_path / "given")[0]["loss"] - 0.01
    assert second[0] == pytest.approx(first[-1], rel=1e-5)


def test_orthogonal_tasks_that_could_not_be_learnt_in_turn(model, files, tmp_path, capsys):
    """They are refused before anything is trained."""
    tasks = [{"name": name, "dataset_dir": files[name], "eval_dir": files[name]} for name in ("domain", "general")]
    words = ["sequence", *flags(model, files, tmp_path / "o")[:-2], *LORA]
    more = ["--options", f"sequence.tasks={json.dumps(tasks)}", "objectives=[{type: orthogonal}]"]
    (tmp_path / "w.ckpt").touch()
    assert main(["quantize", "--load_checkpoint", str(model), "--output_dir", str(tmp_path / "nf4")]) == 0
    pet = "model.model_config.pet_config"
    for option, said in [
        ("model.model_config.quantization_config=nf4", "whose weights must be whole"),
        (pet + "={layer_groups: [{layers: [0], lora_rank: 2, bits: nf4}]}", "whose weights must be whole"),
        (f"load_checkpoint={tmp_path / 'nf4'}", "whose weights must be whole"),
        (f"load_checkpoint={tmp_path / 'w.ckpt'}", "w.ckpt' is no folder"),
        ("pet_config=null", "give a pet_config whose adapter merges"),
        ("pet_config={pet_type: prompt, num_virtual_tokens: 2}", "give a pet_config whose adapter merges"),
        ("pet_config={pet_type: ia3}", "A of every task apart, and pet_type ia3 has none: give lora or adalora"),
        ("pet_config={pet_type: vera, lora_rank: 2}", "pet_type vera has none"),
        ("pet_config={pet_type: miss, lora_rank: 2}", "pet_type miss has none"),
        ("pet_config={use_lorafa: True}", "use_lorafa does not train it: leave it out"),
    ]:
        given = words[: -len(LORA)] if "pet_config" in option else words
        assert main([*given, *more, option]) == 2, option
        assert said in capsys.readouterr().err, option
    assert not (tmp_path / "o").exists()

"""A run with all that can look on: evaluation, TensorBoard, MindSpore's summaries, the profile; and with groups."""

import csv
import json
from pathlib import Path

import pytest
import yaml

from lora_ms.cli.main import main

QUESTIONS = ["What is 1?", "And two?", "Who?", "Why not?", "Is it so?", "Where to?", "How?", "When was it?"]
ANSWERS = ["one", "two", "me", "yes", "no", "home", "well", "then"]


@pytest.fixture(scope="module")
def talk(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("talk") / "talk.jsonl"
    rows = [{"instruction": q, "output": a} for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def watched(text_model, talk, tmp_path_factory):
    """Four steps of two rows; every second one is evaluated, two are profiled."""
    out = tmp_path_factory.mktemp("watched") / "out"
    config = {
        "load_checkpoint": str(text_model),
        "output_dir": str(out),
        "do_eval": True,
        "eval_step_interval": 2,
        "report_to": ["tensorboard"],
        "runner_config": {"batch_size": 2},
        "optimizer": {"groups": [{"params": r".*\.lora_b", "learning_rate": 5e-4, "weight_decay": 0.1}]},
        "lr_schedule": {"type": "constant", "learning_rate": 1e-3},
        "callbacks": [
            {"type": "MFLossMonitor", "per_print_times": 3},
            {"type": "SummaryMonitor", "collect_freq": 2},
            {"type": "ProfileMonitor", "start_step": 2, "stop_step": 3},
        ],
        "evaluation": {"prompts": ["What is 1?"], "max_new_tokens": 4},
        "model": {"model_config": {"seq_length": 64, "pet_config": {"lora_rank": 2, "lora_dropout": 0.0}}},
        **{f"{name}_dataset": {"data_loader": {"dataset_dir": str(talk)}} for name in ("train", "eval")},
    }
    file = out.parent / "run.yaml"
    file.write_text(yaml.safe_dump(config))
    assert main(["finetune", "--config", str(file)]) == 0
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return out, records, (out / "run.log").read_text().splitlines()


def only_file(folder: Path) -> Path:
    (file,) = folder.iterdir()
    return file


def test_logged_steps_are_loss_monitors(watched):
    _, records, log = watched
    assert [r["step"] for r in records if "loss" in r] == [3, 4]
    assert [line.split()[1] for line in log if line.startswith("step") and "lr" in line] == ["3/4", "4/4"]
    assert [r["step"] for r in records if "eval_loss" in r] == [2, 4]


def test_samples_are_recorded(watched, text_model, talk, capsys):
    """Those of the last evaluation are what the adapter answers."""
    out, records, log = watched
    samples = [r["samples"] for r in records if "eval_loss" in r]
    assert [[s["prompt"] for s in part] for part in samples] == [["What is 1?"]] * 2
    words = ["predict", "--load_checkpoint", text_model, "--load_adapter", out / "adapter", "--predict_data"]
    words += ["What is 1?", "--max_new_tokens", 4, "--do_sample", "False", "--repetition_penalty", 1]
    assert main([str(word) for word in words]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == ["> What is 1?", samples[-1][0]["answer"]]
    assert "  > What is 1?" in log


def test_tensorboard_has_the_numbers(watched, events):
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    out, records, _ = watched
    first, start, *rest = events(only_file(out / "tensorboard"), Event)
    assert first.file_version == "brain.Event:2"
    assert (start.session_log.status, start.step) == (SessionLog.START, 1)
    found = [(e.step, {v.tag: v.simple_value for v in e.summary.value}) for e in rest]
    train = {"loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_memory_mb"}
    scored = {f"eval/{name}": f"eval_{name}" for name in ("loss", "accuracy", "perplexity")}
    names = [{f"train/{name}": name for name in train} if "loss" in r else scored for r in records]
    assert found == [
        (r["step"], {tag: pytest.approx(r[name], rel=1e-6) for tag, name in tags.items()})
        for r, tags in zip(records, names, strict=True)
    ]


def test_mindspores_summary_has_the_numbers(watched, events):
    from mindspore.train.summary_pb2 import Event

    out, records, _ = watched
    _, *rest = events(only_file(out / "summary"), Event)
    found = [(e.step, {v.tag: v.scalar_value for v in e.summary.value}) for e in rest]
    assert [(step, len(values)) for step, values in found] == [(2, 5), (2, 3), (4, 5), (4, 3)]
    by_step = {r["step"]: r for r in records if "loss" in r}
    for name in ("loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_memory_mb"):
        assert found[2][1][f"train/{name}"] == pytest.approx(by_step[4][name], rel=1e-6)
    scored = [r for r in records if "eval_loss" in r]
    for name in ("loss", "accuracy", "perplexity"):
        assert [v[f"eval/{name}"] for _, v in found[1::2]] == pytest.approx([r[f"eval_{name}"] for r in scored])


def test_the_profile_names_the_dearest_operators(watched):
    out, _, log = watched
    (file,) = (out / "profile").rglob("cpu_op_type_info_*.csv")
    with open(file, newline="") as stream:
        rows = sorted(csv.DictReader(stream), key=lambda row: -float(row["total_compute_time"]))
    start = next(i for i, line in enumerate(log) if line.startswith("profile of steps 2 to 3: "))
    table = [line.split() for line in log[start + 1 : start + 12]]
    assert table[0] == ["operator", "calls", "total", "ms", "share"]
    assert [line[:2] for line in table[1:]] == [
        [row["op_type"], f"{int(row['type_occurrences']):,}"] for row in rows[:10]
    ]
    total = sum(float(row["total_compute_time"]) for row in rows)
    assert float(table[1][3].rstrip("%")) == pytest.approx(100 * float(rows[0]["total_compute_time"]) / total, abs=0.06)
    assert all(len(line) <= 80 for line in log[start + 1 : start + 12])
    # our own operators, of which every layer has several, in two steps: a profile of one step has half of them
    assert int(next(row["type_occurrences"] for row in rows if row["op_type"] == "Custom")) % 2 == 0


def test_groups_are_announced_and_kept(watched):
    out, _, log = watched
    lines = [line for line in log if line.startswith("optimizer: ")]
    assert lines[0].endswith("numbers, learning rate 0.0005, weight decay 0.1")
    assert lines[1].startswith("optimizer: the rest: ") and lines[1].endswith("learning rate 0.001, weight decay 0")
    kept = yaml.safe_load((out / "config.yaml").read_text())["optimizer"]["groups"]
    assert kept == [{"params": r".*\.lora_b", "learning_rate": 5e-4, "weight_decay": 0.1}]


def test_what_is_not_installed_is_said_before_anything_is_done(text_model, talk, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "tensorboardX", None)
    words = ["finetune", "--load_checkpoint", text_model, "--train_dataset_dir", talk, "--output_dir", tmp_path / "a"]
    assert main([*map(str, words), "--report_to", "tensorboard"]) == 2
    assert capsys.readouterr().err == ("error: report_to tensorboard needs tensorboardX: pip install tensorboardX\n")
    assert not (tmp_path / "a").exists()

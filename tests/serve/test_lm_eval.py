"""lm-evaluation-harness: `lora-ms eval --tasks` against its own `local-completions`, on our server, and `hf`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_ms.cli.main import main

MODEL = Path(__file__).parents[2] / "examples/tiny/model"
QUESTIONS = [
    ("Which sound does a frog make?", ["woof", "croak", "moo"], 1),
    ("Which sound does a dog make?", ["woof", "croak"], 0),
    ("Count from 15 to 17.", ["15 16 17", "17 16 15", "15 15 15", "1 2 3"], 0),
    ("你是谁？", ["我是一个助手。", "不", "11"], 0),
    ("What comes after a very long beginning? " + "one two three four five six seven " * 12, ["eight", "nine"], 0),
    ("", [" Hi friend!", " zzzz zzz"], 0),
]


def task_file(folder: Path, name: str, **keys) -> Path:
    """A task over ``QUESTIONS``; JSON is YAML."""
    rows = folder / "rows.jsonl"
    lines = [{"question": question, "choices": choices, "answer": right} for question, choices, right in QUESTIONS]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "doc_to_text": "{{ question }}",
        **keys,
    }
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps(task), "utf-8")
    return file


def choice_task(folder: Path) -> Path:
    metrics = [{"metric": "acc"}, {"metric": "acc_norm"}]
    keys = {"doc_to_choice": "{{ choices }}", "doc_to_target": "answer", "metric_list": metrics}
    return task_file(folder, "sounds", output_type="multiple_choice", **keys)


def answer_task(folder: Path) -> Path:
    keys = {
        "doc_to_text": "Q: {{ question }}\n",
        "doc_to_target": "{{ choices[answer] }}",
        "metric_list": [{"metric": "exact_match"}],
    }
    settings = {"until": ["\n", "16"], "max_gen_toks": 12, "do_sample": False}
    return task_file(folder, "answers", output_type="generate_until", generation_kwargs=settings, **keys)


def by_lm_eval(python: str, out: Path, tasks: list[Path], model: str, arguments: dict, *flags: str) -> dict:
    """What the `lm_eval` command finds: a task's results, and what was answered to each question."""
    given = ",".join(f"{key}={value}" for key, value in arguments.items())
    command = [python, "-m", "lm_eval", "run", "--model", model, "--model_args", given, "--log_samples"]
    command += ["--tasks", *map(str, tasks), "--output_path", str(out), *flags]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = out.rglob("results_*.json")
    samples = {}
    for task in tasks:
        (file,) = out.rglob(f"samples_{task.stem}_*.jsonl")
        samples[task.stem] = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    return {"results": json.loads(results.read_text("utf-8"))["results"], "samples": samples}


def by_us(out: Path, tasks: list[Path], *flags: str) -> dict:
    """The same of `lora-ms eval --tasks`."""
    command = ["eval", "--load_checkpoint", str(MODEL), "--output_dir", str(out), "--tasks", *map(str, tasks)]
    assert main([*command, *flags]) == 0
    samples: dict = {}
    for line in (out / "tasks.jsonl").read_text("utf-8").splitlines():
        sample = json.loads(line)
        samples.setdefault(sample["task"], []).append(sample)
    return {"results": json.loads((out / "tasks.json").read_text("utf-8"))["results"], "samples": samples}


def check_same(found: dict, expected: dict, tolerance: float) -> None:
    for task, samples in expected["samples"].items():
        ours = {sample["doc_id"]: sample["resps"] for sample in found["samples"][task]}
        assert len(ours) == len(samples) == len(QUESTIONS)
        for sample in samples:
            assert near(ours[sample["doc_id"]], sample["resps"], tolerance), (sample, ours[sample["doc_id"]])
        assert scores(found["results"][task]) == scores(expected["results"][task])


def near(ours, theirs, tolerance: float) -> bool:
    """Numbers, which lm-eval may write as texts, within the tolerance; all else equal."""
    if isinstance(theirs, list):
        return len(ours) == len(theirs) and all(near(*pair, tolerance) for pair in zip(ours, theirs, strict=True))
    try:
        return abs(float(ours) - float(theirs)) <= tolerance
    except (TypeError, ValueError):
        return str(ours) == str(theirs)


def scores(result: dict) -> dict:
    return {key: value for key, value in result.items() if "," in key and "stderr" not in key}


def test_the_same_as_local_completions(server, tmp_path, capsys):
    tasks = [choice_task(tmp_path), answer_task(tmp_path)]
    found = by_us(tmp_path / "ours", tasks)
    assert {**scores(found["results"]["sounds"])}.keys() == {"acc,none", "acc_norm,none"}
    assert "|sounds" in capsys.readouterr().out
    settings = {"model": "tiny", "base_url": f"{server.url}/completions", "tokenizer": MODEL, "num_concurrent": 3}
    settings |= {"tokenizer_backend": "huggingface", "max_length": 512}
    check_same(found, by_lm_eval(sys.executable, tmp_path / "theirs", tasks, "local-completions", settings), 1e-4)


@pytest.mark.peft
def test_the_same_as_lm_evals_own_hugging_face_backend(tmp_path):
    tasks = [choice_task(tmp_path), answer_task(tmp_path)]
    python = os.environ.get("LORA_MS_TORCH_PYTHON")
    if not python:
        pytest.skip("LORA_MS_TORCH_PYTHON is not set: scripts/test.sh --with-torch sets it")
    found = by_us(tmp_path / "ours", tasks)
    settings = {"pretrained": MODEL, "dtype": "float32"}
    check_same(found, by_lm_eval(python, tmp_path / "theirs", tasks, "hf", settings, "--device", "cpu"), 1e-3)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"process_docs": "x"}, "process_docs is not read from a file: it may name code"),
        ({"include": "other.yaml"}, "include is not read from a file"),
        ({"doc_to_txt": "x"}, "unknown key doc_to_txt; the nearest is doc_to_text"),
        ({"metric_list": [{"metric": "/tmp/metric.py"}]}, "is none of lm-eval's own metrics"),
        ({"metric_list": [{"metric": "acc", "hf_evaluate": True}]}, "is none of lm-eval's own metrics"),
        ({"doc_to_text": "{{ question.__class__.__mro__ }}"}, "SecurityError"),
        ({"dataset_kwargs": {"data_files": {"test": "/no/such.jsonl"}}}, "FileNotFoundError"),
        ({"task": None}, "no task: give it a name"),
    ],
)
def test_a_task_that_runs_code_or_cannot_be_read(tmp_path, capsys, keys, said):
    file = choice_task(tmp_path)
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **keys}), "utf-8")
    assert main(["eval", "--load_checkpoint", str(MODEL), "--output_dir", str(tmp_path), "--tasks", str(file)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and said in error


def test_a_function_in_a_task_is_not_called(tmp_path, capsys):
    (tmp_path / "t.yaml").write_text("task: t\ndoc_to_text: !function os.getcwd\n")
    for name, said in (("t.yaml", "!function"), ("rows.jsonl", "evaluation.sets, with metric: choice")):
        choice_task(tmp_path)
        assert main(["eval", "--load_checkpoint", str(MODEL), "--tasks", str(tmp_path / name)]) == 2
        assert said in capsys.readouterr().err


def test_without_lm_eval_it_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["eval", "--load_checkpoint", str(MODEL), "--tasks", "x.yaml"]) == 2
    assert "pip install 'lora_ms[lm-eval]'" in capsys.readouterr().err

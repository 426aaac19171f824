"""Tasks of lm-evaluation-harness, asked of our own model."""

import difflib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_ms import saving, storage
from lora_ms.config import RunConfig
from lora_ms.config.load import read_yaml
from lora_ms.errors import LoraMsError
from lora_ms.infer.cached_model import default_length
from lora_ms.infer.engine import ROWS, Engine
from lora_ms.infer.generate import Speaker

RESULTS, SAMPLES = "tasks.json", "tasks.jsonl"
# keys of a task that may name code, or a file of it
CODE = ("class", "custom_dataset", "group", "include", "process_docs", "process_results", "unsafe_code", "use_prompt")


class Tasks:
    """The tasks of ``evaluation.tasks``, read before the model is."""

    def __init__(self, config: RunConfig):
        try:
            import lm_eval  # noqa: F401
        except ImportError:
            raise LoraMsError("evaluation.tasks needs lm-eval: pip install 'lora_ms[lm-eval]'") from None
        from lm_eval.tasks import TaskManager

        _render_safely()
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        keys = config.evaluation
        named = [name for name in keys.tasks if not _is_file(name)]
        manager = TaskManager(include_defaults=bool(named))  # reading all of its own tasks takes seconds
        for name in named:
            if name not in manager.all_tasks:
                near = difflib.get_close_matches(name, manager.all_tasks, 1)
                hint = f"; the nearest is {near[0]}" if near else ""
                raise LoraMsError(f"evaluation.tasks: {name} is no file, and lm-eval has no such task{hint}")
        self.manager = manager
        self.tasks = [name if name in named else read_task(name) for name in keys.tasks]
        self.num_fewshot = keys.num_fewshot
        self.limit = keys.limit
        self.folder = Path(config.output_dir)

    def run(self, speaker: Speaker) -> None:
        """Asks, prints lm-eval's table, and writes ``tasks.json`` and a line of ``tasks.jsonl`` for each question."""
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.utils import make_table

        from lora_ms.infer.harness import HarnessModel

        model = speaker.generator.model
        engine = Engine(model, ROWS, default_length(model, ROWS, speaker.max_length))
        harness = HarnessModel(engine, speaker.tokenizer, speaker.eos_token_ids)
        try:
            found: Any = simple_evaluate(
                harness, tasks=self.tasks, num_fewshot=self.num_fewshot, limit=self.limit, task_manager=self.manager
            )
        except LoraMsError:
            raise
        except (MemoryError, RecursionError):
            raise
        except Exception as error:  # a task is a program of its author, and its data come from anywhere
            raise LoraMsError(f"evaluation.tasks: {type(error).__name__}: {error}") from error
        print(make_table(found))
        if harness.cut:
            print(f"{harness.cut} texts were longer than {engine.length} tokens: their beginnings were left out")
        self._write(found)

    def _write(self, found: Mapping[str, Any]) -> None:
        kept = ("results", "groups", "n-samples", "n-shot", "versions", "higher_is_better")
        storage.write_json(self.folder / RESULTS, {key: _plain(found[key]) for key in kept if key in found})
        with saving.new_file(self.folder / SAMPLES) as part, open(part, "w", encoding="utf-8") as file:
            for task, samples in found["samples"].items():
                for sample in samples:
                    file.write(json.dumps({"task": task, **_plain(sample)}, ensure_ascii=False) + "\n")
        print(f"results: {self.folder / RESULTS}, answers: {self.folder / SAMPLES}")


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) or Path(name).is_file()


def read_task(file: str) -> dict[str, Any]:
    """The task of a YAML file, which holds no code.

    Raises:
        LoraMsError: it is none, or asks for code to be run.
    """
    from lm_eval.api import metrics  # noqa: F401  the registry is filled by it
    from lm_eval.api.registry import metric_registry
    from lm_eval.config.task import TaskConfig

    if Path(file).suffix not in (".yaml", ".yml"):
        raise LoraMsError(
            f"{file} is no task, which is a YAML file of lm-eval; questions with choices in other files are scored by "
            "evaluation.sets, with metric: choice"
        )
    task = read_yaml(file)
    known = [name for name in TaskConfig.__dataclass_fields__ if name not in CODE]
    for key in task:
        if key in CODE:
            raise LoraMsError(f"{file}: {key} is not read from a file: it may name code")
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1, 0.0)[0]
            raise LoraMsError(f"{file}: unknown key {key}; the nearest is {near}")
    if not isinstance(task.get("task"), str):
        raise LoraMsError(f"{file}: no task: give it a name with task: NAME")
    measured = task.get("metric_list") or []
    for each in measured if isinstance(measured, list) else [measured]:
        name = each.get("metric") if isinstance(each, dict) else None
        if not isinstance(name, str) or name not in metric_registry or each.get("hf_evaluate"):
            raise LoraMsError(f"{file}: metric_list: {str(each)[:100]} is none of lm-eval's own metrics")
    return task


def _render_safely() -> None:
    """A task's templates cannot reach beyond the values that they are given."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from lm_eval import utils

    before = utils.env
    utils.env = ImmutableSandboxedEnvironment(undefined=before.undefined, keep_trailing_newline=True)
    utils.env.filters.update(before.filters)


def _plain(value: Any) -> Any:
    """What JSON has, of what lm-eval gives."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    return value if value is None or isinstance(value, str | int | float) else str(value)

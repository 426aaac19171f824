"""Tasks that are learnt one after another: the configuration of each, and what becomes of the earlier ones."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_ms import storage
from lora_ms.config import RunConfig
from lora_ms.config.sections import EvaluationSet, Part
from lora_ms.errors import LoraMsError
from lora_ms.objectives.parameter_terms import OrthogonalKeys
from lora_ms.recipes.adapter import adapter_config
from lora_ms.recipes.model import quantisation_of_run
from lora_ms.train import checkpoint
from lora_ms.train.forgetting import read_points
from lora_ms.train.sequence import TaskMatrix

RESULT, PLOT = "sequence.json", "sequence.png"
DONE = "task.json"  # under a task's folder, written last: the settings that it was learnt with
MERGED = "merged"  # under a task's folder: the model with this and all earlier adapters in it


def check(config: RunConfig) -> None:
    """Raises LoraMsError where the tasks are not such as can be learnt in turn."""
    tasks = config.sequence.tasks
    if len(tasks) < 2:
        raise LoraMsError("sequence.tasks: give two tasks or more, each with name, dataset_dir and eval_dir")
    names = [task.name for task in tasks]
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise LoraMsError(f"sequence.tasks: {twice[0]} is given twice: give each task a name of its own")
    both = [name for name in names if name in config.evaluation.sets]
    if both:
        raise LoraMsError(f"evaluation.sets.{both[0]} has the name of a task, which is a set as well: give it another")
    if config.backend != "native":
        raise LoraMsError("sequence needs backend native")
    if is_orthogonal(config):
        _check_merging(config)


def _check_merging(config: RunConfig) -> None:
    """Raises LoraMsError where a task's adapter could not be merged into the model before the next one, or trains no A
    that could be orthogonal to the earlier ones."""
    pet, base = config.pet_config, config.load_checkpoint
    need = "orthogonal merges every task's adapter into the model"
    if pet is None or not adapter_config(pet).merges:
        raise LoraMsError(f"{need}: give a pet_config whose adapter merges, such as lora")
    apart = "orthogonal keeps the A of every task apart, and"
    if not any(name.startswith("lora_A") for name in adapter_config(pet).TENSORS):
        raise LoraMsError(f"{apart} pet_type {pet.pet_type} has none: give lora or adalora")
    if pet.use_lorafa:
        raise LoraMsError(f"{apart} use_lorafa does not train it: leave it out")
    if not Path(base).is_dir():
        raise LoraMsError(f"{need}: load_checkpoint {base!r} is no folder: give a Hugging Face directory")
    if quantisation_of_run(config, 0) is not None:
        raise LoraMsError(f"{need}, whose weights must be whole: train without four bits, or leave orthogonal out")


def folder_of(config: RunConfig, number: int) -> Path:
    """Where task ``number`` (from 0) is learnt."""
    return Path(config.output_dir) / f"task_{number + 1}_{config.sequence.tasks[number].name}"


def is_orthogonal(config: RunConfig) -> bool:
    """Whether each task has an adapter of its own, on the model with the earlier ones merged into it (O-LoRA)."""
    return any(isinstance(term, OrthogonalKeys) for term in config.objectives)


def is_done(config: RunConfig, number: int) -> bool:
    """Whether a task was learnt to its end, and can be gone on from."""
    folder = folder_of(config, number)
    written = folder / ("model" if config.pet_config is None else "adapter")
    return written.is_dir() and (folder / DONE).is_file()


def mark_done(config: RunConfig, number: int) -> None:
    """Notes that a task was learnt to its end."""
    storage.write_json(folder_of(config, number) / DONE, {"settings": digest_of(config)})


def digest_of(config: RunConfig) -> str:
    """Tells whether two sequences have the same settings, wherever they write."""
    plain = config.model_dump(mode="json", by_alias=True, exclude={"output_dir", "resume_training"})
    for part in plain["train_dataset"]["mix"]:
        if part["num_samples"] is None:  # as before there was such a key
            del part["num_samples"]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def check_same(config: RunConfig) -> None:
    """Raises LoraMsError where a task in output_dir was learnt with other settings."""
    for number in range(len(config.sequence.tasks)):
        file = folder_of(config, number) / DONE
        if file.is_file() and storage.read_json(file).get("settings") != digest_of(config):
            raise LoraMsError(f"{file.parent} was learnt with other settings: give another output_dir, or remove it")


def config_of(config: RunConfig, number: int) -> RunConfig:
    """The configuration of task ``number``: of its rows, from the end of the task before it, scored on all tasks.

    General parts of ``train_dataset.mix`` stay beside the task's rows: they are replayed.
    """
    tasks = config.sequence.tasks
    task = tasks[number]
    found = config.model_copy(deep=True)
    found.sequence.tasks = []
    found.output_dir = str(folder_of(config, number))
    dataset = found.train_dataset
    general = [part for part in dataset.mix if part.role == "general"]
    domain = [part for part in dataset.mix if part.role == "domain"]
    weight = sum(part.weight for part in domain) or 1.0
    ends = [part.weight if part.weight_end is None else part.weight_end for part in domain]
    weight_end = None if all(part.weight_end is None for part in domain) else sum(ends)
    dataset.data_loader.dataset_dir = "" if general else task.dataset_dir
    own = Part(dataset_dir=task.dataset_dir, weight=weight, weight_end=weight_end, num_samples=task.num_samples)
    dataset.mix = [own, *general] if general else []
    if task.num_samples is not None and not general:
        dataset.num_samples = task.num_samples
    found.evaluation.sets = {
        **{one.name: EvaluationSet(dataset_dir=one.eval_dir, metric=one.metric) for one in tasks},
        **found.evaluation.sets,
    }
    found.resume_training = bool(checkpoint.list_checkpoints(folder_of(config, number)))
    earlier = [folder_of(config, i) for i in range(number)]
    if is_orthogonal(config):
        found.objectives = [term for term in found.objectives if earlier or not isinstance(term, OrthogonalKeys)]
        for term in found.objectives:
            if isinstance(term, OrthogonalKeys):
                term.adapters = [*term.adapters, *(str(folder / "adapter") for folder in earlier)]
        if earlier:
            found.load_checkpoint = str(earlier[-1] / MERGED)
            found.load_adapter = ""  # the first task has gone on from it
    elif earlier and config.pet_config is None:
        found.load_checkpoint = str(earlier[-1] / "model")
    elif earlier:
        found.load_adapter = str(earlier[-1] / "adapter")
    return found


def matrix_of(config: RunConfig) -> TaskMatrix:
    """The scores after each task that is done."""
    tasks = config.sequence.tasks
    names = [task.name for task in tasks]
    shown = ["loss" if task.metric == "loss" else "accuracy" for task in tasks]

    def scores(point: dict[str, Any]) -> list[float]:
        return [float(point["scores"][name][kind]) for name, kind in zip(names, shown, strict=True)]

    before: Sequence[float] = ()
    rows = []
    for number in range(len(tasks)):
        if is_done(config, number):
            points = read_points(folder_of(config, number))
            if not points:
                raise LoraMsError(f"{folder_of(config, number)}: forgetting.json is missing: remove the folder")
            before = before or scores(points[0])
            rows.append(scores(points[-1]))
    table: NDArray = np.array(rows, float).reshape(len(rows), len(tasks))
    return TaskMatrix(names, shown, np.array(before), table)

"""``RunConfig``: one run, as read from a YAML in MindFormers' schema, with the values that follow from several keys.

Read single keys by their YAML path (``config.runner_config.epochs``; ``model.model_config`` is ``config.model.sizes``),
and what several keys decide through the properties below.
"""

from collections.abc import Container, Iterator
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, PrivateAttr, model_validator
from pydantic.fields import FieldInfo

from lora_ms.config.callbacks import (
    NO_EFFECT_CALLBACKS,
    Callback,
    CheckpointMonitor,
    EvalCallBack,
    LossMonitor,
    ProfileMonitor,
    SummaryMonitor,
)
from lora_ms.config.model import Model, PetConfig, Processor
from lora_ms.config.optimizer import LrSchedule, Optimizer
from lora_ms.config.sections import (
    Context,
    Dataset,
    DatasetTask,
    EvalDataset,
    EvaluationKeys,
    Metric,
    Parallel,
    ParallelConfig,
    RecomputeConfig,
    RunnerConfig,
    RunnerWrapper,
    TaskSequence,
    TrainerKeys,
)
from lora_ms.config.terms import Term
from lora_ms.errors import LoraMsError
from lora_ms.objectives.base import Preferences, preferences_of
from lora_ms.values import NO_EFFECT, Flag, Folder, NoEffect, Path, Reports, Section, Whole

Kind = TypeVar("Kind", bound=Section)
RunMode = Literal["finetune", "train", "eval", "predict"]
DEFAULT_LEARNING_RATE = 1e-4
# with backend mindformers they are not checked here: MindFormers gets them as they stand
MINDFORMERS_SECTIONS = (
    *("trainer", "optimizer", "lr_schedule", "runner_wrapper", "callbacks", "metric"),
    *("parallel", "parallel_config", "recompute_config"),
)


def move_pet_config(data: dict[str, Any]) -> dict[str, Any]:
    """Return ``data`` with a top-level ``pet_config`` moved to MindFormers' place, ``model.model_config.pet_config``.

    Raises:
        LoraMsError: both places are given and differ, or the second cannot hold it.
    """
    if "pet_config" not in data:
        return data
    data = dict(data)
    top = data.pop("pet_config")
    model = data["model"] = _mapping("model", data.get("model"))
    sizes = model["model_config"] = _mapping("model.model_config", model.get("model_config"))
    if "pet_config" in sizes and sizes["pet_config"] != top:
        raise LoraMsError(
            f"pet_config is given twice: {top} at the top level and {sizes['pet_config']} in "
            "model.model_config; remove one of them"
        )
    sizes["pet_config"] = top
    return data


def _mapping(key: str, value: Any) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise LoraMsError(f"{key} expects a mapping of keys, got {value!r}")
    return dict(value or {})


def _resume(value: Any) -> bool | str:
    if isinstance(value, str) and value.lower() in ("true", "false", ""):
        return value.lower() == "true"
    if isinstance(value, (bool, str)):
        return value
    raise ValueError("expects True, False or the name of a checkpoint")


def _fill(value: Any) -> dict[str, str]:
    if value is None:
        return {}
    scalars = (str, int, float)
    if isinstance(value, dict) and all(isinstance(part, scalars) for item in value.items() for part in item):
        return {str(name): str(text) for name, text in value.items()}
    raise ValueError("expects a mapping of names to texts")


def _callbacks(value: Any) -> Any:
    """Old releases of MindFormers misspelt a type."""
    if not isinstance(value, list):
        return [] if value is None else value
    old = {"type": "CheckpointMointor"}
    return [
        {**one, "type": "CheckpointMonitor"} if isinstance(one, dict) and old.items() <= one.items() else one
        for one in value
    ]


class RunConfig(Section):
    """The whole YAML."""

    seed: Whole = Field(0, ge=0, le=2**32 - 1)  # of initialisation, dropout, order and sampling
    output_dir: Folder = "./output"
    run_mode: RunMode = "finetune"  # finetune and train are the same: pet_config says what is trained
    backend: Literal["native", "mindformers"] = "native"  # whose model and trainer (ours)
    load_checkpoint: Path = ""  # Hugging Face folder or a hub's owner/name, or MindSpore .ckpt, .safetensors
    pretrained_model_dir: Path = ""  # MindFormers' second name of load_checkpoint, read where that is not given
    load_adapter: Path = ""  # PEFT adapter folder to go on from, or to predict with (ours)
    hub: Literal["hf", "modelscope"] = "hf"  # where models and data given by name come from (ours)
    revision: Path = ""  # of load_checkpoint by name: branch, tag or commit (ours)
    resume_training: Annotated[bool | str, BeforeValidator(_resume)] = False  # True: the newest; or a checkpoint's name
    overwrite_output_dir: Flag = False  # delete others' files in the folders that a run replaces (ours)
    use_parallel: Flag = False  # one process per card, started by msrun
    do_eval: Flag = False  # evaluate on eval_dataset while training, and at its end
    eval_step_interval: Whole = Field(100, ge=-1)  # optimiser steps between evaluations, -1: none but the last
    eval_epoch_interval: Whole = Field(-1, ge=-1)  # epochs between them; given alone, it stands for the steps
    report_to: Reports = []  # tensorboard, wandb, swanlab, mlflow (ours)
    profile: Flag = False  # MindSpore's profile of these steps, in output_dir/profile, and a table of what costs most
    profile_start_step: Whole = Field(1, ge=1)
    profile_stop_step: Whole = Field(10, ge=1)
    allow_other_template: Flag = False  # use an adapter with another chat template than it was trained with (ours)
    data_fill: Annotated[dict[str, str], BeforeValidator(_fill)] = {}  # {{NAME}} in the data -> text (ours)

    trainer: TrainerKeys = Field(default_factory=TrainerKeys)
    runner_config: RunnerConfig = Field(default_factory=RunnerConfig)
    optimizer: Optimizer = Field(default_factory=Optimizer)
    lr_schedule: LrSchedule = Field(default_factory=LrSchedule)
    train_dataset: Dataset = Field(default_factory=Dataset)
    train_dataset_task: DatasetTask = Field(default_factory=DatasetTask)
    eval_dataset: EvalDataset = Field(default_factory=EvalDataset)
    evaluation: EvaluationKeys = Field(default_factory=EvaluationKeys)
    sequence: TaskSequence = Field(default_factory=TaskSequence)
    eval_dataset_task: DatasetTask = Field(default_factory=DatasetTask)
    parallel: Parallel = Field(default_factory=Parallel)
    parallel_config: ParallelConfig = Field(default_factory=ParallelConfig)
    recompute_config: RecomputeConfig = Field(default_factory=RecomputeConfig)
    objectives: Annotated[list[Term], BeforeValidator(lambda value: [] if value is None else value)] = []  # (ours)
    callbacks: Annotated[list[Callback], BeforeValidator(_callbacks)] = []
    context: Context = Field(default_factory=Context)
    model: Model = Field(default_factory=Model)
    processor: Processor = Field(default_factory=Processor)
    metric: Metric = Field(default_factory=Metric)
    runner_wrapper: RunnerWrapper = Field(default_factory=RunnerWrapper)

    src_strategy_path_or_dir: NoEffect = ""
    auto_trans_ckpt: Flag = False  # either way, each process reads its part of load_checkpoint
    transform_process_num: NoEffect = 1
    only_save_strategy: NoEffect = False
    strategy_load_checkpoint: NoEffect = ""
    load_ckpt_format: NoEffect = "ckpt"  # seen from the file
    load_ckpt_async: NoEffect = False
    use_legacy: NoEffect = True
    eval_callbacks: NoEffect = []
    ignore_data_skip: NoEffect = False
    data_skip_steps: NoEffect = None
    micro_batch_interleave_num: NoEffect = 1
    moe_config: NoEffect = None
    swap_config: NoEffect = None
    monitor_config: NoEffect = None
    auto_tune: NoEffect = False
    filepath_prefix: NoEffect = "./autotune"
    autotune_per_step: NoEffect = 10
    init_start_profile: NoEffect = False
    profile_communication: NoEffect = False
    profile_memory: NoEffect = True
    profiler_level: NoEffect = 1
    layer_scale: NoEffect = False
    layer_decay: NoEffect = 0.65
    lr_scale: NoEffect = False
    lr_scale_factor: NoEffect = 256
    remote_save_url: NoEffect = None
    exclude_cann_cpu: NoEffect = False
    train_precision_sync: NoEffect = None
    infer_precision_sync: NoEffect = None
    print_separate_loss: NoEffect = False
    predict_batch_size: NoEffect = None
    modal_type: NoEffect = None
    adapter_id: NoEffect = None
    register_path: NoEffect = None
    trust_remote_code: NoEffect = False

    _mindformers_sections: dict[str, Any] = PrivateAttr(default_factory=dict)
    _taken_back: list[str] = PrivateAttr(default_factory=list)

    @model_validator(mode="before")
    @classmethod
    def _keys_in_their_place(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = move_pet_config(data)
        if data.get("pretrained_model_dir") and not data.get("load_checkpoint"):
            data = {**data, "load_checkpoint": data["pretrained_model_dir"]}
            del data["pretrained_model_dir"]
        return data

    @model_validator(mode="after")
    def _one_of_each_callback_and_some_steps(self) -> "RunConfig":
        types: list[str] = [callback.type for callback in self.callbacks]
        twice = [name for name in dict.fromkeys(types) if types.count(name) > 1]
        if twice:
            raise ValueError(f"callbacks: {twice[0]} is given twice; keep one")
        terms = [term.type for term in self.objectives]
        twice = [name for name in dict.fromkeys(terms) if terms.count(name) > 1]
        if twice:
            raise ValueError(f"objectives: {twice[0]} is given twice; keep one")
        if terms and self.backend == "mindformers":
            raise ValueError("objectives need backend native: MindFormers' trainer has no further terms of the loss")
        compared = [term.type for term in self.objectives if term.preferences != "none"]
        beside = [term.type for term in self.objectives if term.type in ("contrastive", "kl_anchor")]
        if len(compared) > 1 or (compared and beside):
            both = " and ".join([*compared, *beside])
            raise ValueError(f"objectives: {both} exclude each other: {compared[0]} is the whole loss of the rows")
        sized = [term.type for term in self.objectives if term.compares_rows]
        if sized and self.runner_config.adaptive_batch:
            raise ValueError(
                f"objectives: {sized[0]} compares the rows of a micro-batch, and runner_config.adaptive_batch changes "
                "their number: leave one of them out"
            )
        if sized and self.context.low_memory:
            raise ValueError(
                f"objectives: {sized[0]} compares the rows of a micro-batch, and context.low_memory makes these of one "
                "row: leave one of them out"
            )
        first, last = self.profile_start_step, self.profile_stop_step
        if first > last:
            raise ValueError(f"profile_start_step {first} is after profile_stop_step {last}: swap them")
        return self

    @property
    def mindformers_sections(self) -> dict[str, Any]:
        """Sections that MindFormers reads itself, as they were given; empty with the native backend."""
        return self._mindformers_sections

    @property
    def preferences(self) -> Preferences:
        """Which rows of preferences ``train_dataset`` holds, by the objectives."""
        return preferences_of(self.objectives)

    @property
    def taken_back(self) -> list[str]:
        """Lines on values of the command line that later ones of it replace."""
        return self._taken_back

    @property
    def pet_config(self) -> PetConfig | None:
        """The adapter to train, None to train all parameters."""
        return self.model.sizes.pet_config

    @property
    def learning_rate(self) -> float:
        """Highest learning rate: ``lr_schedule``'s, else ``optimizer``'s, else 1e-4."""
        for rate in (self.lr_schedule.learning_rate, self.optimizer.learning_rate):
            if rate is not None:
                return rate
        return DEFAULT_LEARNING_RATE

    @property
    def batch_size(self) -> int:
        """Training rows per device and micro-batch: ``runner_config``'s, else ``train_dataset``'s, else 1."""
        return self.runner_config.batch_size or self.train_dataset.batch_size or 1

    @property
    def eval_batch_size(self) -> int:
        """Rows per device and evaluation step: ``runner_config``'s, else ``eval_dataset``'s, else ``batch_size``."""
        return self.runner_config.batch_size or self.eval_dataset.batch_size or self.batch_size

    @property
    def save_steps(self) -> int:
        """Optimiser steps between two checkpoints, 0 for none before the end."""
        return self._checkpoint_monitor.save_checkpoint_steps

    @property
    def keep_checkpoint_max(self) -> int:
        """How many of the newest checkpoints are kept."""
        return self._checkpoint_monitor.keep_checkpoint_max

    @property
    def max_grad_norm(self) -> float | None:
        """Global L2 norm to which the gradient is clipped, None for no clipping."""
        return self.runner_wrapper.max_grad_norm if self.runner_wrapper.use_clip_grad else None

    @classmethod
    def given_counts(cls) -> Container[str]:
        return ("do_eval", "eval_step_interval", "eval_epoch_interval", "profile_start_step", "profile_stop_step")

    @property
    def evaluates(self) -> bool:
        """Whether a run evaluates held-out rows: ``do_eval``, an ``EvalCallBack``, or ``validation_split``."""
        return self.do_eval or self._callback(EvalCallBack) is not None or self.train_dataset.validation_split > 0

    @property
    def eval_intervals(self) -> tuple[int, int]:
        """Optimiser steps and epochs between evaluations, 0 for none: ``EvalCallBack``'s, else the top level's."""
        found = self._callback(EvalCallBack) or EvalCallBack()
        of_callback, own = found.model_fields_set, self.model_fields_set
        has_callback = self._callback(EvalCallBack) is not None

        def interval(name: str) -> int:
            is_own = not has_callback or (name not in of_callback and f"eval_{name}" in own)
            return int(getattr(self, f"eval_{name}") if is_own else getattr(found, name))

        steps, epochs = interval("step_interval"), interval("epoch_interval")
        given = "step_interval" in of_callback or "eval_step_interval" in own
        return (0 if epochs > 0 and not given else max(steps, 0)), max(epochs, 0)

    @property
    def logging_steps(self) -> int:
        """Optimiser steps between two logged lines: ``runner_config``'s, else ``MFLossMonitor``'s, else 1."""
        return self.runner_config.logging_steps or (self._callback(LossMonitor) or LossMonitor()).per_print_times

    @property
    def summary(self) -> SummaryMonitor | None:
        """MindSpore's summary file, where it is asked for."""
        return self._callback(SummaryMonitor)

    @property
    def profiling(self) -> ProfileMonitor | None:
        """Which steps are profiled: ``ProfileMonitor``'s, else with ``profile: True`` the top level's; None: none."""
        steps = {"start_step": self.profile_start_step, "stop_step": self.profile_stop_step}
        return self._callback(ProfileMonitor) or (ProfileMonitor(**steps) if self.profile else None)

    def _callback(self, kind: type[Kind]) -> Kind | None:
        return next((callback for callback in self.callbacks if isinstance(callback, kind)), None)

    @property
    def _checkpoint_monitor(self) -> CheckpointMonitor:
        return self._callback(CheckpointMonitor) or CheckpointMonitor()

    def notices(self) -> list[str]:
        """One line with all given keys that change nothing here, sorted; no line where there are none."""
        # of keys without an effect here, many have one with MindFormers
        idle = [] if self.backend == "mindformers" else _changed_without_effect(self, "")
        keys = sorted([*idle, *self._overridden()])
        return [*self.taken_back, *([f"no effect here: {', '.join(keys)}"] if keys else [])]

    def _overridden(self) -> Iterator[str]:
        if self.optimizer.learning_rate not in (None, self.learning_rate):
            yield f"optimizer.learning_rate (lr_schedule.learning_rate {self.learning_rate} is used)"
        if self.pretrained_model_dir:
            yield f"pretrained_model_dir (load_checkpoint {self.load_checkpoint} is used)"
        rows = self.runner_config.batch_size
        for name, dataset in (("train_dataset", self.train_dataset), ("eval_dataset", self.eval_dataset)):
            if rows is not None and dataset.batch_size not in (None, rows):
                yield f"{name}.batch_size (runner_config.batch_size {rows} is used)"
            if dataset.mix and dataset.data_loader.dataset_dir:
                yield f"{name}.data_loader.dataset_dir ({name}.mix is used)"
        if self.sequence.tasks:
            yield "sequence (of lora-ms sequence)"
        for kind, keys in ((EvalCallBack, "eval_{}_interval"), (ProfileMonitor, "profile_{}_step")):
            found = self._callback(kind)
            for field in () if found is None else found.model_fields_set & {*kind.model_fields} - {"type"}:
                key = keys.format(field.split("_")[0])
                if key in self.model_fields_set and getattr(self, key) != getattr(found, field):
                    yield f"{key} ({kind.__name__}'s {field} {getattr(found, field)} is used)"
        if "do_eval" in self.model_fields_set and self.evaluates and not self.do_eval:
            yield "do_eval (there is an EvalCallBack, or a validation_split)"
        if self.run_mode in ("finetune", "train") and not self.evaluates:
            if self.eval_dataset.sources:
                yield "eval_dataset (do_eval is False)"
            if self.evaluation.prompts:
                yield "evaluation.prompts (nothing is evaluated)"
            for key in ("prompts_file", "tasks"):
                if getattr(self.evaluation, key):
                    yield f"evaluation.{key} (of lora-ms eval)"


def key_of(name: str, field: FieldInfo) -> str:
    """The YAML key of a field."""
    return field.alias or name


def without_effect(field: FieldInfo) -> bool:
    """Whether the field is declared ``NoEffect``."""
    return NO_EFFECT in field.metadata


def _changed_without_effect(section: Section, prefix: str) -> Iterator[str]:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        path = f"{prefix}{key_of(name, field)}"
        if isinstance(value, Section):
            yield from _changed_without_effect(value, f"{path}.")
        elif name == "callbacks":
            for callback in value:
                if isinstance(callback, NO_EFFECT_CALLBACKS):
                    yield f"callbacks.{callback.type}"
                else:
                    yield from _changed_without_effect(callback, f"callbacks.{callback.type}.")
        elif without_effect(field) and value != field.get_default(call_default_factory=True):
            yield path

"""The YAML's sections besides ``model``: keys, defaults, units. Sections and keys are MindFormers', "ours" are not."""

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from lora_ms.values import Flag, Memory, NoEffect, Number, Path, Recompute, Section, Text, Texts, Whole


class TrainerKeys(Section):
    """``trainer``: names only."""

    type: NoEffect = "CausalLanguageModelingTrainer"
    model_name: NoEffect = ""


class RunnerConfig(Section):
    """``runner_config``: how long, and how many rows at a time."""

    epochs: Whole = Field(1, ge=1)  # passes over the data
    batch_size: Whole | None = Field(None, ge=1)  # rows per device and micro-batch; overrides the datasets'
    gradient_accumulation_steps: Whole = Field(1, ge=1)  # micro-batches per optimiser step
    max_steps: Whole = Field(-1, ge=-1)  # optimiser steps, -1: as many as epochs make (ours)
    adaptive_batch: Flag = False  # smaller micro-batches above 85% of memory, larger ones below 60% (ours)
    logging_steps: Whole | None = Field(None, ge=1)  # optimiser steps between two logged lines (ours)
    sink_mode: Flag = True  # feed the device without returning to Python
    sink_size: Whole = Field(1, ge=-1)  # steps per sink, -1: an epoch
    num_classes: NoEffect = 1
    stop_step: NoEffect = 0

    @model_validator(mode="after")
    def _zero_steps_train_nothing(self) -> "RunnerConfig":
        if self.max_steps == 0 or self.sink_size == 0:
            raise ValueError("max_steps and sink_size want -1, or 1 and more; got 0")
        return self


def _handlers(value: Any) -> list[dict[str, Any]]:
    handlers = [value] if isinstance(value, dict) else value or []
    fits = isinstance(handlers, list) and all(
        isinstance(handler, dict) and handler.get("type") == "AlpacaInstructDataHandler" for handler in handlers
    )
    if not fits:
        raise ValueError("expects a list of {type: AlpacaInstructDataHandler, …}")
    if any(type(handler.get("seq_length", 2)) is not int for handler in handlers):
        raise ValueError("expects a whole number as seq_length")
    return handlers


class Clean(Section):
    """``train_dataset.clean`` (ours): rows to leave out before they are tokenised, each rule counted."""

    required: Texts = []  # columns that must not be empty
    min_chars: Whole = Field(0, ge=0)  # of a row's questions and answers together
    max_chars: Whole = Field(0, ge=0)  # 0: any number
    trim: Flag = False  # white space around every text
    dedupe: Flag = False  # later rows with the same questions
    skip_faulty: Flag = False  # count rows that cannot be used, and go on; False: the run stops and names them


class Part(Section):
    """One of ``train_dataset.mix`` (ours): a dataset and its share of every step's rows."""

    dataset_dir: Text  # file, folder or glob
    weight: Number = Field(gt=0)  # at the first step, in proportion to the others'
    weight_end: Number | None = Field(None, ge=0)  # at the last step; None: the same
    num_samples: Whole | None = Field(None, ge=1)  # only its first rows; None: as many as train_dataset.num_samples
    role: Literal["domain", "general"] = "domain"  # what is learnt, or what is not to be forgotten


class DataLoader(Section):
    """``train_dataset.data_loader``: where the rows are."""

    type: Text = "MindDataset"  # any: the format is seen from the file
    dataset_dir: Path = ""  # file, folder or glob
    path: Path = ""  # the same, in CommonDataLoader's and HFDataLoader's words; a format name where data_files is given
    data_files: Texts = []  # files
    shuffle: Flag = True  # a new order each epoch, from the seed
    split: Text | None = None  # of a dataset that has several; None: train, and test to evaluate
    handler: Annotated[list[dict[str, Any]], BeforeValidator(_handlers)] = []  # MindFormers' word for the format
    load_func: NoEffect = None


class EvalDataLoader(DataLoader):
    """``eval_dataset.data_loader``."""

    shuffle: Flag = False


class Dataset(Section):
    """``train_dataset``."""

    data_loader: DataLoader = Field(default_factory=DataLoader)
    batch_size: Whole | None = Field(None, ge=1)  # rows; runner_config.batch_size overrides it
    drop_remainder: Flag = False  # leave out the last rows of an epoch that do not fill a batch
    num_samples: Whole | None = Field(None, ge=1)  # only the first rows (ours)
    packing: Flag = True  # several rows in a line, each seeing itself alone: the same numbers, less padding (ours)
    length_buckets: Whole = Field(4, ge=1)  # lengths that rows are padded to where they are not packed (ours)
    fill: Flag = True  # every {{NAME}} in a text needs a value (data_fill); False: one without stays as it is (ours)
    format: Literal["auto", "alpaca", "sharegpt", "messages", "prompt", "text", "tokens"] = "auto"  # (ours)
    columns: Annotated[dict[str, Text], BeforeValidator(lambda value: value or {})] = {}  # our name: the file's (ours)
    label_turns: Literal["all", "last"] = "all"  # assistant turns that are learnt (ours)
    truncation: Literal["error", "drop", "cut"] = "drop"  # of rows longer than seq_length (ours)
    clean: Clean = Field(default_factory=Clean)
    mix: Annotated[list[Part], BeforeValidator(lambda value: value or [])] = []  # datasets by weight (ours)
    validation_split: Number = Field(0.0, ge=0, lt=1)  # share of the rows held out, and evaluated at the end (ours)
    input_columns: NoEffect = ["input_ids", "labels"]
    output_columns: NoEffect = None
    num_parallel_workers: NoEffect = 8
    python_multiprocessing: NoEffect = False
    repeat: NoEffect = 1
    numa_enable: NoEffect = False
    prefetch_size: NoEffect = 1
    seed: NoEffect = 0
    auto_tune: NoEffect = False
    filepath_prefix: NoEffect = "./autotune"
    autotune_per_step: NoEffect = 10
    profile: NoEffect = False
    dynamic_batch: NoEffect = False
    construct_args_key: NoEffect = None

    @property
    def sources(self) -> list[str]:
        """Where the rows are: files, folders or globs; none where no place is named."""
        if self.mix:
            return [part.dataset_dir for part in self.mix]
        loader = self.data_loader
        if loader.data_files and not loader.dataset_dir:
            return loader.data_files
        place = loader.dataset_dir or loader.path
        return [place] if place else []


class EvalDataset(Dataset):
    """``eval_dataset``."""

    data_loader: EvalDataLoader = Field(default_factory=EvalDataLoader)
    input_columns: NoEffect = ["input_ids"]


class EvaluationSet(Section):
    """One of ``evaluation.sets``: rows that a run is scored on before, during and after it."""

    dataset_dir: Text  # file, folder or glob; read as eval_dataset says
    # loss: of their label tokens; exact: rows answered to the token; choice: right answers chosen by log-likelihood
    metric: Literal["loss", "exact", "choice"] = "loss"
    num_samples: Whole | None = Field(None, ge=1)  # only the first rows


class EvaluationKeys(Section):
    """``evaluation`` (ours): of held-out rows while training, with ``do_eval`` or ``validation_split``."""

    sets: Annotated[dict[str, EvaluationSet], BeforeValidator(lambda value: value or {})] = {}  # by name

    prompts: Texts = []  # answered by the model at each evaluation
    prompts_file: Path = ""  # rows with answers that `lora-ms eval` compares the model's with
    max_new_tokens: Whole = Field(64, ge=1)  # of such an answer
    tasks: Texts = []  # of lm-evaluation-harness, for `lora-ms eval`: names, or YAML files
    num_fewshot: Whole | None = Field(None, ge=0)  # examples before each question; None: as the task says
    limit: Whole | None = Field(None, ge=1)  # only the first questions of each task
    keep_best: Flag = True  # the weights of the lowest evaluation loss, in output_dir/best
    patience: Whole = Field(0, ge=0)  # evaluations without a better one before the run stops; 0: never


def _task_name(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch(r"[\w-]{1,60}", value):
        return value
    raise ValueError("expects a name of letters, digits, - and _")


class SequenceTask(Section):
    """One of ``sequence.tasks``."""

    name: Annotated[str, BeforeValidator(_task_name)]
    dataset_dir: Text  # rows to learn: file, folder or glob
    eval_dir: Text  # rows that it is scored on
    metric: Literal["loss", "exact", "choice"] = "exact"  # as of evaluation.sets
    num_samples: Whole | None = Field(None, ge=1)  # only the first rows to learn


class TaskSequence(Section):
    """``sequence`` (ours): tasks that `lora-ms sequence` learns one after another."""

    tasks: Annotated[list[SequenceTask], BeforeValidator(lambda value: value or [])] = []


class DatasetTask(Section):
    """``train_dataset_task``, ``eval_dataset_task``: a second mention of the dataset."""

    type: NoEffect = "CausalLanguageModelDataset"
    dataset_config: NoEffect = None  # dropped on loading where it is the dataset itself (`*train_dataset`)


class Parallel(Section):
    """``parallel``: MindSpore's own parallel context, here replaced by explicit collectives."""

    parallel_mode: NoEffect = 1  # 0 data, 1 semi-auto, 2 auto, 3 hybrid
    gradients_mean: NoEffect = False
    enable_alltoall: NoEffect = False
    full_batch: NoEffect = True
    dataset_strategy: NoEffect = None
    search_mode: NoEffect = "sharding_propagation"
    enable_parallel_optimizer: NoEffect = False
    strategy_ckpt_config: NoEffect = None
    strategy_ckpt_save_file: NoEffect = "./ckpt_strategy.ckpt"
    parallel_optimizer_config: NoEffect = None
    pipeline_config: NoEffect = None


class ParallelConfig(Section):
    """``parallel_config``: of the processes that msrun starts, how many share one model; the rest is data-parallel."""

    data_parallel: Whole = Field(1, ge=1)  # follows from model_parallel: a notice where it differs
    model_parallel: Whole = Field(1, ge=1)  # processes that share one model, each layer split over them
    pipeline_stage: Whole = Field(1, ge=1)  # only 1
    context_parallel: Whole = Field(1, ge=1)  # only 1
    context_parallel_algo: NoEffect = "colossalai_cp"
    ulysses_degree_in_cp: NoEffect = 1
    expert_parallel: NoEffect = 1
    use_seq_parallel: NoEffect = False
    micro_batch_num: NoEffect = 1
    seq_split_num: NoEffect = 1
    vocab_emb_dp: NoEffect = True
    gradient_aggregation_group: NoEffect = 4
    optimizer_shard: NoEffect = None


class RecomputeConfig(Section):
    """``recompute_config``: less memory, more time."""

    recompute: Recompute = False  # layers whose activations are computed again in the backward pass
    select_recompute: NoEffect = False
    select_comm_recompute: NoEffect = False
    select_recompute_exclude: NoEffect = False
    select_comm_recompute_exclude: NoEffect = False
    parallel_optimizer_comm_recompute: NoEffect = False
    mp_comm_recompute: NoEffect = True
    recompute_slice_activation: NoEffect = False


class Context(Section):
    """``context``: the device."""

    device_target: Literal["auto", "Ascend", "CPU"] = "auto"  # auto: Ascend where there is one (ours)
    device_id: Whole = Field(0, ge=0)
    max_device_memory: Memory | None = None  # such as "59GB"
    low_memory: Flag = False  # float16 weights, one line at a time, recomputation, plain operators (ours)
    cpu_operators: Flag = True  # on the CPU, our own operators, compiled at first use where there is a compiler (ours)
    graph_cache: Flag = True  # keep compiled graphs for the next start (ours)
    enable_graph_kernel: Flag = False  # fuse elementwise operators: a slower start, faster steps, less memory
    mode: NoEffect = 0  # 0 graph, 1 PyNative
    max_call_depth: NoEffect = 10000
    save_graphs: NoEffect = False
    save_graphs_path: NoEffect = "./graph"
    graph_kernel_flags: NoEffect = None
    jit_config: NoEffect = None
    jit_level: NoEffect = None
    ascend_config: NoEffect = None
    memory_optimize_level: NoEffect = "O0"
    runtime_num_threads: NoEffect = None
    affinity_cpu_list: NoEffect = None
    mempool_block_size: NoEffect = None
    deterministic: NoEffect = None

    @property
    def max_device_memory_mb(self) -> float | None:
        """In MB of 2^20 bytes."""
        return None if self.max_device_memory is None else float(self.max_device_memory.removesuffix("GB")) * 1024


class LossScale(Section):
    """``runner_wrapper.scale_sense`` as a mapping: loss scaling for float16."""

    type: Literal["DynamicLossScaleUpdateCell", "FixedLossScaleUpdateCell"] = "DynamicLossScaleUpdateCell"
    loss_scale_value: Number = Field(65536, gt=0)  # the first scale
    scale_factor: Whole = Field(2, ge=1)  # multiplies or divides it
    scale_window: Whole = Field(1000, ge=1)  # steps without overflow before it rises


NUMBER, MAPPING = "<number>", "<mapping>"  # never keys: taken out of the places that errors name


class RunnerWrapper(Section):
    """``runner_wrapper``: what happens to a gradient before the optimiser sees it."""

    type: Literal["MFTrainOneStepCell", "MFPipelineWithLossScaleCell"] = "MFTrainOneStepCell"
    scale_sense: Annotated[
        Annotated[Number, Tag(NUMBER)] | Annotated[LossScale, Tag(MAPPING)],
        Discriminator(lambda value: MAPPING if isinstance(value, (dict, LossScale)) else NUMBER),
    ] = 1.0  # fixed factor on the loss, or a LossScale
    use_clip_grad: Flag = True
    max_grad_norm: Number = Field(1.0, gt=0)  # global L2 norm of the gradient above which it is scaled down
    local_norm: NoEffect = False
    calculate_per_token_loss: NoEffect = True
    enable_check_overflow: NoEffect = False
    print_separate_loss: NoEffect = False


class Metric(Section):
    """``metric``."""

    type: NoEffect = "PerplexityMetric"

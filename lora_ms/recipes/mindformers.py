"""``backend: mindformers``: MindFormers' Llama trained by MindFormers' trainer, our data in and a PEFT adapter out."""

import sys
import time
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from mindspore import nn

from lora_ms.adapters.matching import leaf_of
from lora_ms.bridge import model, package, trainer
from lora_ms.bridge.adapters import read_peft
from lora_ms.bridge.settings import write_settings
from lora_ms.bridge.trainer import StepNumbers
from lora_ms.config import PetConfig, RunConfig, dump_config
from lora_ms.errors import LoraMsError
from lora_ms.models.decoder import DecoderConfig
from lora_ms.recipes import adapter, data, session
from lora_ms.recipes.mindformers_network import (
    FOLDER,
    MindFormersModel,
    MindRecordRows,
    check,
    explained,
    rows_of,
    sizes_of,
    start,
)
from lora_ms.recipes.outputs import RUN_LOG, adapter_line
from lora_ms.recipes.settings import settings_of
from lora_ms.recipes.train import PreparedRun
from lora_ms.runtime.device import peak_memory_mb
from lora_ms.train import checkpoint
from lora_ms.train.callbacks import RunState, StepRecord
from lora_ms.train.checkpoint import Weights
from lora_ms.train.evaluation import Scores
from lora_ms.train.log import Tee
from lora_ms.train.loop import Outcome
from lora_ms.train.report import Reporter
from lora_ms.train.settings import TrainSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class MindFormersInputs:
    """What a run starts from, found and checked before the device is started."""

    config: RunConfig
    pet: PetConfig
    sizes: DecoderConfig
    tokenizer: "PreTrainedTokenizerBase | None"


def read_inputs(config: RunConfig) -> MindFormersInputs:
    """Checks ``config``, so that most errors show within seconds. Writes nothing.

    Raises:
        LoraMsError: anything that a user can fix.
    """
    pet = check(config)
    package.installed_version()
    if not config.load_checkpoint:
        raise LoraMsError("load_checkpoint is missing: give the model to put the adapter on")
    adapter.adapter_config(pet)
    data.sources_of(config.train_dataset, "train")
    sizes = sizes_of(config)
    tokenizer = data.tokenizer_for(config, training=True)
    session.check_run_output(config)
    return MindFormersInputs(config, pet, sizes, tokenizer)


def prepare(inputs: MindFormersInputs, log: Tee) -> PreparedRun:
    """Starts the device, writes what MindFormers reads, and builds its model; prints what will be trained.

    Raises:
        LoraMsError: anything that a user can fix, and what MindFormers stops at.
    """
    config = inputs.config
    output_dir = Path(config.output_dir)
    runtime = start(config)
    folder = output_dir / FOLDER
    if not runtime.is_main:
        folder /= f"rank_{runtime.rank}"
    with nullcontext() if runtime.is_main else package.silenced(log):
        built = MindFormersModel(config, inputs.pet, inputs.sizes, runtime, log)
        log.to((output_dir if runtime.is_main else folder) / RUN_LOG)
        train = rows_of(config, "train", inputs.sizes, inputs.tokenizer, folder)
        held_out = rows_of(config, "eval", inputs.sizes, inputs.tokenizer, folder) if config.do_eval else None
        asked = built.settings(train, held_out)
        batch_size = asked["runner_config"]["batch_size"]
        if train.count < batch_size:
            raise LoraMsError(f"{train.count} rows make no batch of {batch_size}: lower runner_config.batch_size")
        file = folder / "mindformers.yaml"
        write_settings(file, asked)
        if runtime.is_main:
            dump_config(config, str(output_dir / "config.yaml"))
        with explained(file), package.silenced(log):
            theirs = built.read(file)
            network = built.network(theirs)
        print(built.describe(network, inputs.pet))
    # it resumes by itself, from load_checkpoint
    settings = replace(settings_of(config, inputs.sizes.max_position_embeddings), resume=False)
    return MindFormersRun(
        built,
        network,
        settings,
        theirs=theirs,
        file=file,
        asked=asked,
        held_out=held_out,
        tokenizer=inputs.tokenizer,
    )


class MindFormersRun:
    """A run of MindFormers' trainer on its ``network``.

    Args:
        built: what made the network.
        theirs: MindFormers' configuration, which it has read from ``file``.
        asked: what was written to ``file``.
        held_out: rows that it evaluates; None for none.
    """

    def __init__(
        self,
        built: MindFormersModel,
        network: nn.Cell,
        settings: TrainSettings,
        *,
        theirs: Any,
        file: Path,
        asked: dict[str, Any],
        held_out: MindRecordRows | None,
        tokenizer: "PreTrainedTokenizerBase | None",
    ):
        self.built = built
        self.network = network
        self.settings = settings
        self.theirs = theirs
        self.file = file
        self.runtime = built.runtime
        self.held_out = held_out
        self.tokenizer = tokenizer
        self.batch_size = asked["runner_config"]["batch_size"]
        self.checkpoint = asked["load_checkpoint"]
        self.progress = StepProgress(self)
        self.shapes = model.shapes(network)
        self.scores: Scores | None = None

    @property
    def total_steps(self) -> int:
        """Known once MindFormers' trainer has begun."""
        return self.progress.state.total_steps

    def begin(self) -> None:
        """MindFormers writes checkpoints of its own, and resumes by itself."""
        output_dir = self.settings.output_dir
        if self.runtime.is_main:
            checkpoint.recover(output_dir)
            if self.settings.overwrite:
                checkpoint.remove_foreign(output_dir)
            checkpoint.check_foreign(output_dir)

    def train(self) -> Outcome:
        tokens = self.batch_size * self.built.length
        callback = trainer.StepReport(self.progress.begin, self.progress.step, tokens)
        try:
            with explained(self.file), package.silenced(self.built.log):
                theirs = self.built.package.Trainer(args=self.theirs, model=self.network, callbacks=[callback])
                theirs.finetune(resume_from_checkpoint=self.checkpoint or None, do_eval=self.held_out is not None)
        finally:
            self.progress.end()
        return Outcome(callback.steps, stopped=False, losses=callback.losses)

    @property
    def in_parts(self) -> bool:
        """Whether MindSpore has left this process a part of the adapter's matrices alone."""
        return model.shapes(self.network) != self.shapes

    def weights(self) -> Weights | None:
        if self.in_parts:
            return None
        return Weights(
            folder="adapter",
            write=lambda path: self.built.save_adapter(self.network, self.tokenizer, path),
            read=lambda path: self.built.load_adapter(self.network, path),
            identity={},
        )

    def end(self) -> None:
        """Scores the held-out rows."""
        if self.held_out is not None and self.runtime.world == 1 and not self.in_parts:
            with package.silenced(self.built.log):
                self.scores = scores_of(self.network, self.held_out, self.batch_size)

    def closing_lines(self) -> list[str]:
        checkpoints = self.settings.output_dir / "checkpoint"
        if self.in_parts:
            return [
                "no adapter was written: its matrices are in parts on the cards; merge MindFormers' checkpoint in "
                f"{checkpoints} with its own tool, then use lora-ms convert-adapter"
            ]
        lines = [] if self.scores is None else [f"held-out rows: {self.scores.line()}"]
        return [*lines, f"{adapter_line(self.settings.output_dir, 'adapter')}   MindFormers' own: {checkpoints}"]


class StepProgress:
    """Reports steps on the user's terminal from inside MindFormers, whose own output goes to the log."""

    def __init__(self, run: MindFormersRun):
        self.out = sys.stdout
        self.err = sys.stderr
        self.run = run
        self.reporter = Reporter(run.settings.logging_steps)
        self.state = RunState(run.network, run.settings.output_dir, 0, run.runtime.is_main)
        self.steps_per_epoch = 0
        self.start = 0  # optimiser steps that were done before; above 0 in a resumed run
        self.clock = 0.0

    def begin(self) -> None:
        """MindFormers' trainer has read its data, and takes its first step."""
        theirs = self.run.theirs
        most = self.run.built.config.runner_config.max_steps
        self.steps_per_epoch = theirs.data_size
        total = self.steps_per_epoch * theirs.runner_config.origin_epochs
        self.start = self.state.step = theirs.runner_config.initial_step or 0
        self.state.total_steps = min(total, most) if most > 0 else total
        with redirect_stdout(self.out), redirect_stderr(self.err):
            if self.state.is_main:
                steps = f"{self.state.total_steps:,} steps, {self.steps_per_epoch:,} per epoch"
                print(f"training with MindFormers' trainer: {steps}")
                print("compiling the training step, which takes a while …", flush=True)
            self.reporter.on_train_begin(self.state)
        self.clock = time.perf_counter()

    def step(self, numbers: StepNumbers) -> bool:
        """One step is done; returns whether it was the last."""
        now = time.perf_counter()
        seconds = now - self.clock
        self.clock = now
        step = self.start + numbers.step
        record = StepRecord(
            step=step,
            epoch=round(step / self.steps_per_epoch, 4),
            loss=numbers.loss,
            grad_norm=numbers.grad_norm,
            learning_rate=numbers.learning_rate,
            tokens=numbers.tokens,
            label_tokens=numbers.label_tokens,
            tokens_per_second=round(numbers.tokens / seconds, 1),
            step_time_s=round(seconds, 4),
            wait_share=0.0,
            peak_memory_mb=round(peak_memory_mb(self.run.runtime.device), 1),
        )
        with redirect_stdout(self.out), redirect_stderr(self.err):
            self.reporter.on_step_end(self.state, record)
        return record.step >= self.state.total_steps

    def end(self) -> None:
        """Training has ended, by its last step or by an error."""
        if self.steps_per_epoch:
            self.reporter.on_train_end(self.state)


def evaluate(config: RunConfig) -> None:
    """``lora-ms eval``: the mean loss of MindFormers' model, with ``load_adapter``, on ``eval_dataset``.

    What MindFormers and MindPet print goes to ``output_dir/run.log``.
    """
    package.installed_version()
    for key in ("prompts_file", "tasks"):
        if getattr(config.evaluation, key):
            raise LoraMsError(f"backend mindformers has no evaluation.{key}: leave it out, or use backend native")
    if config.use_parallel:  # all would write the same files
        raise LoraMsError(
            "eval with backend mindformers is of one process: give --use_parallel False, or use backend native"
        )
    sizes = sizes_of(config)
    tokenizer = data.tokenizer_for(config)
    output_dir = Path(config.output_dir)
    pet = None
    if config.load_adapter:
        factors, scale = read_peft(Path(config.load_adapter))
        leaves = sorted({leaf_of(name) for name in factors})
        pet = PetConfig(lora_rank=scale.lora_rank, lora_alpha=scale.lora_alpha, lora_dropout=0, target_modules=leaves)
    with Tee() as log:
        built = MindFormersModel(config, pet, sizes, start(config), log)
        rows = rows_of(config, "eval", sizes, tokenizer, output_dir / FOLDER)
        log.to(output_dir / RUN_LOG)
        asked = built.settings(rows, None)
        file = output_dir / FOLDER / "mindformers.yaml"
        write_settings(file, asked)
        with explained(file), package.silenced(log):
            network = built.network(built.read(file))
            found = scores_of(network, rows, asked["runner_config"]["batch_size"])
        print(found.line())


def scores_of(network: nn.Cell, rows: MindRecordRows, batch_size: int) -> Scores:
    """Loss and accuracy of the rows' label tokens."""
    import mindspore.dataset as ds

    found = ds.MindDataset(list(map(str, rows.files)), ["input_ids", "labels"], shuffle=False)
    pairs = [(row["input_ids"], row["labels"]) for row in found.create_dict_iterator(num_epochs=1, output_numpy=True)]
    ids, labels = (np.stack(part).astype(np.int32) for part in zip(*pairs, strict=True))
    return Scores(*trainer.scores(network, ids, labels, min(batch_size, len(ids))))

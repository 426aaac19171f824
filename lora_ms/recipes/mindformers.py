"""``backend: mindformers``: MindFormers' Llama trained by MindFormers' trainer, our data in and a PEFT adapter out."""

import sys
import time
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import nn

from lora_ms.adapters.matching import leaf_of
from lora_ms.bridge import model, package, settings, trainer
from lora_ms.bridge.adapters import read_peft
from lora_ms.config import PetConfig, RunConfig, dump_config
from lora_ms.errors import LoraMsError
from lora_ms.recipes import data
from lora_ms.recipes import session as common
from lora_ms.recipes.adapter import adapter_config
from lora_ms.recipes.mindformers_run import FOLDER, Rows, Run, check, explained, rows_of, sizes_of, start
from lora_ms.runtime.device import peak_memory_mb
from lora_ms.train.callbacks import RunState, StepRecord
from lora_ms.train.evaluation import Scores
from lora_ms.train.log import Tee
from lora_ms.train.report import Reporter


class Screen:
    """Reports steps on the user's terminal from inside MindFormers, whose own output goes to the log.

    theirs: MindFormers' configuration, which knows the number of steps once its trainer has begun.
    """

    def __init__(self, run: Run, network: nn.Cell, theirs: Any):
        self.out, self.err, self.run, self.theirs = sys.stdout, sys.stderr, run, theirs
        self.reporter = Reporter(run.config.logging_steps)
        self.state = RunState(network, run.output_dir, 0, run.runtime.is_main)
        self.per_epoch, self.start, self.clock = 0, 0, 0.0

    def begin(self) -> None:
        """Training begins."""
        runner, most = self.theirs.runner_config, self.run.config.runner_config.max_steps
        self.per_epoch = self.theirs.data_size
        total = self.per_epoch * runner.origin_epochs
        self.start = self.state.step = runner.initial_step or 0  # above 0 where a run is gone on with
        self.state.total_steps = min(total, most) if most > 0 else total
        with redirect_stdout(self.out), redirect_stderr(self.err):
            print(f"training with MindFormers' trainer: {self.state.total_steps:,} steps, {self.per_epoch:,} an epoch")
            print("compiling the training step, which takes a while the first time …", flush=True)
            self.reporter.on_train_begin(self.state)
        self.clock = time.perf_counter()

    def end(self) -> None:
        """Training has ended, well or not."""
        if self.per_epoch:
            self.reporter.on_train_end(self.state)

    def step(self, step: int, loss: float, norm: float | None, rate: float, tokens: int, labels: int) -> bool:
        """One step is done; returns whether it was the last."""
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        record = StepRecord(
            step=self.start + step,
            epoch=round((self.start + step) / self.per_epoch, 4),
            loss=loss,
            grad_norm=norm,
            learning_rate=rate,
            tokens=tokens,
            label_tokens=labels,
            tokens_per_second=round(tokens / seconds, 1),
            step_time_s=round(seconds, 4),
            wait_share=0.0,
            peak_memory_mb=round(peak_memory_mb(self.run.runtime.device), 1),
        )
        with redirect_stdout(self.out), redirect_stderr(self.err):
            self.reporter.on_step_end(self.state, record)
        return record.step >= self.state.total_steps


def run(config: RunConfig) -> None:
    """Trains as ``config`` says; outputs as native's, and MindFormers' own checkpoints beside them.

    Raises:
        LoraMsError: anything that a user can mend, and what MindFormers stops at.
    """
    pet, output_dir = check(config), Path(config.output_dir)
    package.found_version()
    if not config.load_checkpoint:
        raise LoraMsError("load_checkpoint is missing: give the model to put the adapter on")
    adapter_config(pet)
    data.sources_of(config.train_dataset, "train")
    sizes = sizes_of(config)
    tokenizer = data.tokenizer_for(config, training=True)
    common.check_output(output_dir)
    with Tee() as log, ExitStack() as stack:
        runtime = start(config)
        folder = output_dir / FOLDER
        if not runtime.is_main:  # it works for itself, and in silence
            folder /= f"rank_{runtime.rank}"
            stack.enter_context(package.silenced(log))
        this = Run(config, pet, sizes, runtime, log)
        train = rows_of(config, "train", sizes, tokenizer, folder)
        held_out = rows_of(config, "eval", sizes, tokenizer, folder) if config.do_eval else None
        log.to((output_dir if runtime.is_main else folder) / "run.log")
        asked = this.prepare(train, held_out)
        batch = asked["runner_config"]["batch_size"]
        if train.count < batch:
            raise LoraMsError(f"{train.count} rows make no batch of {batch}: lower runner_config.batch_size")
        file = folder / "mindformers.yaml"
        settings.write(file, asked)
        if runtime.is_main:
            dump_config(config, str(output_dir / "config.yaml"))
        with explained(file), package.silenced(log):
            theirs = this.begin(file)
            network = this.network(theirs)
        print(this.describe(network, pet))
        screen = Screen(this, network, theirs)
        callback = trainer.StepReport(screen.begin, screen.step, batch * this.length)
        whole = model.shapes(network)
        try:
            with explained(file), package.silenced(log):
                from_file = asked["load_checkpoint"] or None
                theirs_trainer = this.package.Trainer(args=theirs, model=network, callbacks=[callback])
                theirs_trainer.finetune(resume_from_checkpoint=from_file, do_eval=held_out is not None)
        finally:
            screen.end()
        print(f"loss {callback.first_loss:.4f} -> {callback.last_loss:.4f} in {callback.steps:,} steps")
        if model.shapes(network) != whole:
            print(
                "no adapter was written: its matrices are in parts on the cards; merge MindFormers' checkpoint in "
                f"{output_dir / 'checkpoint'} with its own tool, then use lora-ms convert-adapter"
            )
        elif runtime.is_main:
            finish(this, network, tokenizer, held_out, batch)


def finish(this: Run, network: nn.Cell, tokenizer: Any, held_out: Rows | None, batch: int) -> None:
    """Evaluates on ``held_out``, and writes the adapter."""
    if held_out is not None and this.runtime.world == 1:
        with package.silenced(this.log):
            found = scores_of(network, held_out, batch)
        print(f"held-out rows: {found.line()}")
    saved, out = this.save(network, tokenizer), this.output_dir
    print(f"adapter: {saved}   loss plot: {out / 'loss.png'}   MindFormers' own: {out / 'checkpoint'}")


def evaluate_model(config: RunConfig) -> None:
    """``lora-ms eval``: the mean loss of MindFormers' model, with ``load_adapter``, on ``eval_dataset``; what the two
    print beside it goes to ``output_dir/run.log``."""
    package.found_version()
    if config.evaluation.prompts_file:
        raise LoraMsError("backend mindformers answers no prompts_file: leave it out, or the backend native")
    sizes, tokenizer, output_dir = sizes_of(config), data.tokenizer_for(config), Path(config.output_dir)
    pet = None
    if config.load_adapter:
        factors, scale = read_peft(Path(config.load_adapter))
        leaves = sorted({leaf_of(name) for name in factors})
        pet = PetConfig(lora_rank=scale.lora_rank, lora_alpha=scale.lora_alpha, lora_dropout=0, target_modules=leaves)
    with Tee() as log:
        this = Run(config, pet, sizes, start(config), log)
        rows = rows_of(config, "eval", sizes, tokenizer, output_dir / FOLDER)
        log.to(output_dir / "run.log")
        asked = this.prepare(rows, None)
        file = output_dir / FOLDER / "mindformers.yaml"
        settings.write(file, asked)
        with explained(file), package.silenced(log):
            network = this.network(this.begin(file))
            found = scores_of(network, rows, asked["runner_config"]["batch_size"])
        print(found.line())


def scores_of(network: nn.Cell, rows: Rows, batch: int) -> Scores:
    """Loss and accuracy of the rows' label tokens."""
    import mindspore.dataset as ds

    found = ds.MindDataset(str(rows.path), ["input_ids", "labels"], shuffle=False)
    pairs = [(row["input_ids"], row["labels"]) for row in found.create_dict_iterator(num_epochs=1, output_numpy=True)]
    ids, labels = (np.stack(part).astype(np.int32) for part in zip(*pairs, strict=True))
    return Scores(*trainer.scores(network, ids, labels, min(batch, len(ids))))

"""``backend: mindformers``: MindFormers' Llama trained by MindFormers' trainer, our data in and a PEFT adapter out."""

import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
from mindspore import nn

from lora_ms.adapters.matching import leaf_of
from lora_ms.bridge import package, settings, trainer
from lora_ms.bridge.adapters import read_peft
from lora_ms.config import PetConfig, RunConfig, dump_config
from lora_ms.errors import LoraMsError
from lora_ms.runtime import peak_memory_mb
from lora_ms.tasks import common, data
from lora_ms.tasks.bridge_run import FOLDER, Rows, Run, check, explained, rows_of, start
from lora_ms.tasks.finetune import check_output
from lora_ms.train.callbacks import Record, RunState
from lora_ms.train.evaluation import Scores
from lora_ms.train.log import Tee
from lora_ms.train.report import Reporter


class Screen:
    """Reports steps on the user's terminal from inside MindFormers, whose own output goes to the log."""

    def __init__(self, run: Run, network: nn.Cell, total: int, per_epoch: int):
        self.out, self.err, self.run, self.per_epoch = sys.stdout, sys.stderr, run, per_epoch
        self.state = RunState(network, run.output_dir, total, run.runtime.is_main)
        self.reporter = Reporter(run.config.logging_steps)
        self.reporter.on_train_begin(self.state)
        self.clock = time.perf_counter()

    def step(self, step: int, loss: float, norm: float | None, rate: float, tokens: int, labels: int) -> None:
        """One step is done."""
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        record = Record(
            step=step,
            epoch=round(step / self.per_epoch, 4),
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


def run(config: RunConfig) -> None:
    """Trains as ``config`` says; outputs as native's, and MindFormers' own checkpoints beside them.

    Raises:
        LoraMsError: anything that a user can mend, and what MindFormers stops at.
    """
    pet, output_dir = check(config), Path(config.output_dir)
    package.found_version()
    if not config.load_checkpoint:
        raise LoraMsError("load_checkpoint is missing: give the model to put the adapter on")
    common.lora_config(pet)
    data.sources_of(config.train_dataset, "train")
    sizes = common.read_sizes(config)
    tokenizer = data.tokenizer_for(config, training=True)
    check_output(output_dir)
    with Tee() as log:
        runtime = start(config)
        this = Run(config, pet, sizes, runtime, log)
        folder = output_dir / FOLDER
        train = rows_of(config, "train", sizes, tokenizer, folder)
        held_out = rows_of(config, "eval", sizes, tokenizer, folder) if config.do_eval else None
        log.to(output_dir / "run.log")
        asked = this.prepare(train, held_out)
        batch = asked["runner_config"]["batch_size"]
        if train.count < batch:
            raise LoraMsError(f"{train.count} rows make no batch of {batch}: lower runner_config.batch_size")
        per_epoch = train.count // batch
        total = per_epoch * config.runner_config.epochs
        most = config.runner_config.max_steps
        total = min(total, most) if most > 0 else total
        file = folder / "mindformers.yaml"
        settings.write(file, asked)
        dump_config(config, str(output_dir / "config.yaml"))
        with explained(file), package.silenced(log):
            theirs = this.begin(file)
            network = this.network(theirs)
        print(this.describe(network, pet))
        print(f"training with MindFormers' trainer: {total:,} steps of {batch} rows")
        print("compiling the training step, which takes a while the first time …", flush=True)
        screen = Screen(this, network, total, per_epoch)
        callback = trainer.StepReport(screen.step, total, batch, this.length)
        try:
            with explained(file), package.silenced(log):
                resume = asked["load_checkpoint"] or False
                theirs_trainer = this.package.Trainer(args=theirs, model=network, callbacks=[callback])
                theirs_trainer.finetune(finetune_checkpoint=resume, do_eval=held_out is not None)
        finally:
            screen.reporter.on_train_end(screen.state)
        print(f"loss {callback.first_loss:.4f} -> {callback.last_loss:.4f} in {callback.steps:,} steps")
        if held_out is not None:
            with package.silenced(log):
                found = scores_of(network, held_out, batch)
            print(f"held-out rows: {found.line()}")
        saved = this.save(network, tokenizer)
        print(
            f"adapter: {saved}   loss plot: {output_dir / 'loss.png'}   MindFormers' own: {output_dir / 'checkpoint'}"
        )


def evaluate_model(config: RunConfig) -> None:
    """``lora-ms eval``: the mean loss of MindFormers' model, with ``load_adapter``, on ``eval_dataset``; what the two
    print beside it goes to ``output_dir/run.log``."""
    package.found_version()
    if config.evaluation.prompts_file:
        raise LoraMsError("backend mindformers answers no prompts_file: leave it out, or the backend native")
    sizes, tokenizer, output_dir = common.read_sizes(config), data.tokenizer_for(config), Path(config.output_dir)
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

"""Answers to a file of prompts, as a file that grows by whole lines and is gone on with after an interruption."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lora_ms import saving
from lora_ms.config import RunConfig
from lora_ms.data.example import Message
from lora_ms.data.prompts import PromptRow, read_prompts
from lora_ms.data.template import encode_prompt
from lora_ms.errors import LoraMsError
from lora_ms.infer.generate import Speaker
from lora_ms.recipes.data import check_path
from lora_ms.recipes.session import check_output
from lora_ms.text import counted

ANSWERS = "answers.jsonl"  # in output_dir


class PromptFile:
    """The prompts of a file, and the file of their answers, which may hold the first of them already.

    Args:
        output: of the answers; "" for ``answers.jsonl`` in ``output_dir``.
        system: a message before each conversation that has none.

    Raises:
        LoraMsError: a row that is no prompt, or an output that other prompts or other settings have made.
    """

    def __init__(self, config: RunConfig, file: str, output: str, system: str | None):
        check_path(file, "predict_file")
        self.rows = read_prompts(file)
        self.system = system
        self.output = Path(output or Path(config.output_dir) / ANSWERS)
        self.settings = _digest(config, system)
        check_output(self.output.parent)
        self._answered()

    def _answered(self) -> tuple[int, int]:
        """How many answers are there, and how many bytes they have: half a line at the end, which a crash may leave,
        is none."""
        count = size = 0
        try:
            if self.output.exists():
                with open(self.output, "rb") as lines:
                    for line in lines:
                        if line.endswith(b"\n"):
                            self._check(line, count + 1)
                            count, size = count + 1, size + len(line)
        except OSError as error:
            raise LoraMsError(f"{self.output} cannot be read: {error.strerror}") from None
        return count, size

    def _check(self, line: bytes, number: int) -> None:
        advice = "give another --predict_output, or remove the file"
        try:
            before: Any = json.loads(line)
            found = before["prompt"], before["settings"], before.get("system")
        except (ValueError, KeyError, TypeError, RecursionError):
            raise LoraMsError(f"{self.output}:{number} is no answer of lora-ms predict: {advice}") from None
        row = self.rows[number - 1] if number <= len(self.rows) else None
        if row is None or found[0] != row.shown or found[2] not in (None, row.system):
            raise LoraMsError(f"{self.output}:{number} answers another prompt than the file has there: {advice}")
        if found[1] != self.settings:
            other = "another model, adapter or system message, or other settings"
            raise LoraMsError(f"{self.output}:{number} was made with {other}: {advice}")

    def tokens(self, speaker: Speaker) -> list[list[int]]:
        """Of all prompts. Raises LoraMsError where one leaves no room for an answer."""
        found = []
        for row in self.rows:
            try:
                tokens = encode_prompt(speaker.tokenizer, self._turns(row), row.input)
                speaker.limit(tokens)
            except LoraMsError as error:
                raise LoraMsError(f"{row.where}: {error}") from None
            found.append(tokens)
        return found

    def _turns(self, row: PromptRow) -> Sequence[Message]:
        has_system = row.messages[0].role == "system"
        return row.messages if has_system or not self.system else (Message("system", self.system), *row.messages)

    def run(self, speaker: Speaker) -> None:
        """Asks what has no answer yet, and appends each answer as soon as it and those before it are there."""
        tokens = self.tokens(speaker)
        self.output.parent.mkdir(parents=True, exist_ok=True)
        with saving.locked(self.output.parent):
            done, size = self._answered()
            if done:
                print(f"{self.output}: {counted(done, 'answer')} of {len(tokens):,} are there")
            try:
                if self.output.exists():
                    saving.cut(self.output, size)
                with tqdm(total=len(tokens), initial=done, unit=" answers") as bar:
                    for row, answer in zip(self.rows[done:], speaker.in_turn(tokens, done), strict=True):
                        line = {"row": row.where, "prompt": row.shown, "answer": answer.text, "finish": answer.finish}
                        line |= {"system": row.system} if row.system else {}
                        line |= {"settings": self.settings}
                        saving.append(self.output, json.dumps(line, ensure_ascii=False) + "\n")
                        bar.update()
                saving.sync(self.output)
            except OSError as error:
                raise LoraMsError(f"{self.output} cannot be written: {error.strerror}") from None
        print(f"answers: {self.output}")


def _digest(config: RunConfig, system: str | None) -> str:
    """Of all that decides an answer, besides the prompt and the files of the model and the adapter."""
    sizes = config.model.sizes
    chosen = {
        "model": os.path.realpath(config.load_checkpoint),
        "adapter": os.path.realpath(config.load_adapter) if config.load_adapter else None,
        "sizes": sizes.model_dump(mode="json"),
        "tokenizer": config.processor.tokenizer.model_dump(mode="json"),
        "seed": config.seed,
        "system": system,
    }
    return hashlib.sha256(json.dumps(chosen, sort_keys=True, default=str).encode()).hexdigest()[:16]

"""Models and tokenizers by folder, with transformers' names."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor
from numpy.typing import NDArray

from lora_ms.data.tokenizer import load_tokenizer
from lora_ms.errors import LoraMsError
from lora_ms.infer.engine import prompt_name
from lora_ms.infer.generate import Generator, pad_rows
from lora_ms.infer.sampling import Sampling
from lora_ms.models.decoder import CausalLM
from lora_ms.models.hub import NUMPY_DTYPES, load_directory, save_directory
from lora_ms.quant.settings import read_quantisation
from lora_ms.recipes.download import local_folder
from lora_ms.runtime import device

SAMPLING_NAMES = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "seed")


class ModelForCausalLM(CausalLM):
    """A decoder that also generates and saves itself."""

    def generate(
        self,
        input_ids: Tensor | NDArray | Sequence[Sequence[int]],
        max_new_tokens: int | None = None,
        attention_mask: Tensor | NDArray | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int = 0,
        generator: Generator | None = None,
        max_length: int | None = None,
        **sampling,
    ) -> NDArray[np.int32]:
        """Prompts continued: [batch, prompt + new] token ids, as in transformers.

        Args:
            input_ids: [batch, prompt] ids, or a list of rows of any lengths (padded on the left in the result).
            max_new_tokens: most new tokens of a row; None: 64, or as many as ``max_length`` leaves.
            attention_mask: [batch, prompt] of 0 and 1; 0 marks padding.
            eos_token_id: one or more ids that end a row; None for the model's own. Without any, rows run on.
            pad_token_id: fills the rest of a row that has ended.
            generator: holds the compiled graphs; None for the model's own.
            max_length: most tokens of a row and its answer together, padding not counted.
            sampling: do_sample, temperature, top_k, top_p, repetition_penalty, seed (see ``Sampling``).

        Raises:
            LoraMsError: an empty prompt, one longer than the model or ``max_length``, or a setting out of range.
            TypeError: an unknown setting.
        """
        unknown = set(sampling) - set(SAMPLING_NAMES)
        if unknown:
            raise TypeError(f"generate() got unknown settings: {', '.join(sorted(unknown))}")
        rows = _rows(input_ids, attention_mask)
        ends = self.config.eos_token_ids if eos_token_id is None else eos_token_id
        ends = (ends,) if isinstance(ends, int) else tuple(ends)
        if generator is None:
            # in __dict__, past Cell's own attributes: the generator holds this model
            generator = self.__dict__.get("generator") or Generator(self)
            self.__dict__["generator"] = generator
        training = self.training
        limits = _limits(rows, self.config.longest, max_new_tokens, max_length)
        new = generator.generate(rows, limits, Sampling(**sampling), ends)
        self.set_train(training)
        return pad_rows(rows, new, pad_token_id, max(map(len, input_ids)))

    def cells_have_changed(self) -> None:
        """Forgets the compiled graphs of generation: they hold the cells that were in the model before."""
        self.__dict__.pop("generator", None)

    def save_pretrained(self, path: str | os.PathLike) -> None:
        """Writes a Hugging Face folder in the type of the weights; transformers and vLLM load it."""
        save_directory(self, path, NUMPY_DTYPES[self.dtype])


def _limits(
    rows: Sequence[Sequence[int]], longest: int, max_new_tokens: int | None, max_length: int | None
) -> list[int]:
    """Most new tokens of each row.

    Raises:
        LoraMsError: a row is longer than ``longest``, or leaves no room for an answer.
    """
    limits = []
    for number, row in enumerate(rows, 1):
        name = prompt_name(number, len(rows))
        if len(row) > longest:
            raise LoraMsError(f"{name} has {len(row):,} tokens, and the model takes {longest:,}: shorten it")
        if max_length is None:
            limits.append(64 if max_new_tokens is None else max_new_tokens)
            continue
        room = max_length - len(row)
        if room < 1:
            raise LoraMsError(f"{name} has {len(row):,} tokens: max_length {max_length:,} leaves no room for an answer")
        limits.append(room if max_new_tokens is None else min(room, max_new_tokens))
    return limits


def _rows(input_ids, attention_mask) -> list[list[int]]:
    ids = [np.asarray(row.asnumpy() if isinstance(row, Tensor) else row) for row in input_ids]
    if attention_mask is None:
        return [row.tolist() for row in ids]
    return [
        row[np.asarray(mask.asnumpy() if isinstance(mask, Tensor) else mask) == 1].tolist()
        for row, mask in zip(ids, attention_mask, strict=True)
    ]


class AutoModelForCausalLM:
    """Models by folder."""

    @staticmethod
    def from_pretrained(
        path: str | os.PathLike,
        ms_dtype: ms.Type = ms.float32,
        quantization_config: Mapping[str, Any] | str | None = None,
        *,
        hub: str = "hf",
        revision: str | None = None,
    ) -> ModelForCausalLM:
        """The model of a Hugging Face folder, with weights of ``ms_dtype`` (float32, float16 or bfloat16).

        On the CPU all arithmetic is float32, whatever the weights are.

        Args:
            path: the folder, or ``owner/name`` on a hub: its files are fetched into the hub's cache, and no code.
            hub: hf or modelscope.
            revision: branch, tag or commit of a model given by name.
            quantization_config: loads the layers' weights in four bits: transformers' keys (``load_in_4bit: True,
                bnb_4bit_quant_type: nf4, bnb_4bit_use_double_quant, llm_int8_skip_modules``), or ``nf4``,
                ``nf4-double``. A folder that is quantised already stays so without it.

        Raises:
            LoraMsError: not such a folder, an unsupported architecture, tensors that do not fit, or a name that no
                hub has.
        """
        quantisation = None
        if quantization_config is not None:
            try:
                quantisation = read_quantisation(quantization_config)
            except ValueError as problem:
                raise LoraMsError(f"quantization_config: {problem}") from None
        folder = local_folder(path, "model", hub, revision)
        runtime, _ = device.setup()
        model = load_directory(
            folder, ms_dtype, ModelForCausalLM, operators=runtime.operators, quantisation=quantisation
        )
        for line in model.notices:
            print(line)
        return model


class AutoTokenizer:
    """Tokenizers by folder."""

    @staticmethod
    def from_pretrained(path: str | os.PathLike, *, hub: str = "hf", revision: str | None = None):
        """transformers' own tokenizer of a folder, or of a model's name (see ``AutoModelForCausalLM``)."""
        return load_tokenizer(local_folder(path, "model", hub, revision))

"""Models and tokenizers by folder, with transformers' names."""

import difflib
import os
from collections.abc import Mapping, Sequence
from enum import Enum
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
from lora_ms.quant.settings import Quantisation, read_quantisation
from lora_ms.recipes.download import local_folder
from lora_ms.runtime import device

# transformers' arguments that change nothing here
UNUSED_IN_LOADING = (
    *("device_map", "trust_remote_code", "attn_implementation", "low_cpu_mem_usage", "use_cache", "use_safetensors"),
    *(
        "cache_dir",
        "token",
        "force_download",
        "local_files_only",
        "max_memory",
        "offload_folder",
        "use_flash_attention_2",
    ),
)
DTYPES = {"float32": ms.float32, "float16": ms.float16, "bfloat16": ms.bfloat16}
SAMPLING_NAMES = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "seed")


class ModelForCausalLM(CausalLM):
    """A decoder that also generates and saves itself.

    Attributes:
        has_trained: whether a ``Trainer`` has changed it, or an adapter in it.
    """

    has_trained = False

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
        """Continues prompts: returns [batch, prompt + new] token ids, as in transformers.

        Args:
            input_ids: [batch, prompt] ids, or a list of rows of any length (padded on the left in the result).
            max_new_tokens: limit of new tokens per row; None: 64, or as many as ``max_length`` leaves.
            attention_mask: [batch, prompt] of 0 and 1; 0 marks padding.
            eos_token_id: one or more ids that end a row; None for the model's own. Without any, rows run to the limit.
            pad_token_id: fills the rest of a row that has ended.
            generator: holds the compiled graphs; None for the model's own.
            max_length: limit of a row and its answer together, without padding.
            sampling: do_sample, temperature, top_k, top_p, repetition_penalty, seed (see ``Sampling``). Of
                transformers' names, ``num_beams``, ``num_return_sequences`` and the like may only be 1.

        Raises:
            LoraMsError: an empty prompt, one longer than the model or ``max_length``, or a setting out of range.
            TypeError: an unknown setting.
        """
        for name in ("use_cache", "token_type_ids"):  # what a tokenizer gives besides, and what is always so
            sampling.pop(name, None)
        for name in ("num_beams", "num_return_sequences"):
            if sampling.pop(name, 1) != 1:
                raise LoraMsError(f"generate: {name} above 1 is not supported: leave it out")
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

    @property
    def device(self) -> str:
        """The device it computes on: CPU or Ascend. Inputs need not be moved there."""
        return device.setup()[0].device

    def __repr__(self) -> str:
        sizes = self.config
        numbers = sum(parameter.size for parameter in self.get_parameters())
        return (
            f"{type(self).__name__}({self.source or 'without a folder'}: {sizes.num_hidden_layers} layers of "
            f"{sizes.hidden_size}, vocabulary {sizes.vocab_size:,}; {numbers:,} numbers, {str(self.dtype).lower()})"
        )

    def cells_have_changed(self) -> None:
        """Forgets the compiled graphs of generation, which hold the cells that the model had before."""
        self.__dict__.pop("generator", None)

    def save_pretrained(self, path: str | os.PathLike) -> None:
        """Writes a Hugging Face folder, in the weights' own type; transformers and vLLM load it."""
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
    """Loads models from Hugging Face folders."""

    @staticmethod
    def from_pretrained(
        path: str | os.PathLike,
        ms_dtype: ms.Type = ms.float32,
        quantization_config: Mapping[str, Any] | str | None = None,
        *,
        hub: str = "hf",
        revision: str | None = None,
        dtype: Any = None,
        torch_dtype: Any = None,
        **others: Any,
    ) -> ModelForCausalLM:
        """The model of a Hugging Face folder, with weights of ``ms_dtype`` (float32, float16 or bfloat16).

        On the CPU all arithmetic is float32, whatever the weights are.

        Args:
            path: the folder, or ``owner/name`` on a hub, whose files (but no code) are fetched into the hub's cache.
            hub: hf or modelscope.
            revision: branch, tag or commit of a model given by name.
            quantization_config: loads the layers' weights in four bits: transformers' keys (``load_in_4bit: True,
                bnb_4bit_quant_type: nf4, bnb_4bit_use_double_quant, llm_int8_skip_modules``), or ``nf4``,
                ``nf4-double``. A folder that is already quantised needs none.
            dtype, torch_dtype: transformers' names for ``ms_dtype``: a type of MindSpore or torch, or its name.
            others: transformers' arguments without an effect here; one line names them.

        Raises:
            LoraMsError: no such folder, an unsupported architecture, tensors that do not fit, or a name that the
                hub does not have.
        """
        ms_dtype = _dtype(ms_dtype, dtype, torch_dtype)
        _check_unused(others)
        quantisation = _quantisation(quantization_config)
        folder = local_folder(path, "model", hub, revision)
        runtime, _ = device.setup()
        model = load_directory(
            folder, ms_dtype, ModelForCausalLM, operators=runtime.operators, quantisation=quantisation
        )
        for line in model.notices:
            print(line)
        return model


def _dtype(ms_dtype: ms.Type, *named: Any) -> ms.Type:
    """The type that is asked for by one of transformers' names, else ``ms_dtype``."""
    given = [value for value in named if value is not None]
    if not given:
        return ms_dtype
    name = str(given[0]).rpartition(".")[2].lower()
    if name == "auto":
        print("dtype auto is float32 here, in which all adapters train; give float16 or bfloat16 for smaller weights")
        return ms.float32
    if name not in DTYPES:
        raise LoraMsError(f"dtype {given[0]} is not supported for weights; supported: {', '.join(DTYPES)}")
    return DTYPES[name]


def _quantisation(given: Mapping[str, Any] | str | None) -> Quantisation | None:
    """Raises LoraMsError where it is not NF4's settings."""
    if given is None:
        return None
    try:
        return read_quantisation(given if isinstance(given, str | Mapping) else given.to_dict())
    except ValueError as problem:
        raise LoraMsError(f"quantization_config: {problem}") from None


def _check_unused(others: Mapping[str, Any]) -> None:
    """Raises LoraMsError for an unknown argument of ``from_pretrained``; prints a line of what has no effect."""
    for name in others:
        if name not in UNUSED_IN_LOADING:
            known = ("ms_dtype", "dtype", "torch_dtype", "quantization_config", "hub", "revision", *UNUSED_IN_LOADING)
            near = difflib.get_close_matches(name, known, 1, 0.0)[0]
            raise LoraMsError(f"from_pretrained: unknown argument {name}; the nearest is {near}")
    if others:
        print(f"no effect here: {', '.join(others)} of from_pretrained")


class BitsAndBytesConfig(dict[str, Any]):
    """transformers' settings for 4-bit weights, with its keys; only NF4 (``bnb_4bit_quant_type="nf4"``).

    Raises:
        LoraMsError: another type of weights, or an unknown key.
    """

    def __init__(self, load_in_4bit: bool = False, **keys: Any):
        super().__init__(load_in_4bit=load_in_4bit, **keys)
        _quantisation(self)


class TaskType(str, Enum):
    """PEFT's names of tasks; only causal language modelling is supported."""

    CAUSAL_LM = "CAUSAL_LM"


class AutoTokenizer:
    """Loads tokenizers from Hugging Face folders."""

    @staticmethod
    def from_pretrained(
        path: str | os.PathLike,
        *,
        hub: str = "hf",
        revision: str | None = None,
        use_fast: bool = True,
        trust_remote_code: bool = False,
        padding_side: str | None = None,
    ):
        """transformers' own tokenizer, for a folder or a model's name (see ``AutoModelForCausalLM``).

        Whichever library ``return_tensors`` names, the arrays are NumPy's, which ``generate`` accepts.

        Args:
            padding_side: left or right; None: what the folder says.
            use_fast, trust_remote_code: no effect: it is always fast, and no code of the folder runs.
        """
        tokenizer = load_tokenizer(local_folder(path, "model", hub, revision))
        from lora_ms.python.arrays import with_arrays  # transformers, whose advice load_tokenizer has silenced

        if padding_side is not None:
            tokenizer.padding_side = padding_side
        return with_arrays(tokenizer)

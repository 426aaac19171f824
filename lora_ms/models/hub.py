"""Models from and to Hugging Face directories and MindFormers checkpoints."""

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn
from mindspore.common import np_dtype
from mindspore.common.initializer import initializer
from numpy.typing import DTypeLike

from lora_ms import saving, storage, weights
from lora_ms.errors import LoraMsError
from lora_ms.hf_folder import (
    CONFIG,
    EMBEDDING,
    GENERATION,
    HEAD,
    ModelFolder,
    base_name,
    end_tokens,
    generation_config,
    model_config,
    open_model,
    says_tied,
    untied_notice,
)
from lora_ms.models.decoder import CausalLM, DecoderConfig, weight_shapes
from lora_ms.models.llama import REQUIRED, llama_config
from lora_ms.models.mindformers_names import hugging_face_name
from lora_ms.models.mistral import mistral_config
from lora_ms.models.qwen import ATTENTION, qwen2_config, qwen3_config
from lora_ms.models.smollm3 import smollm3_config
from lora_ms.nn.int4 import Int4Projection
from lora_ms.nn.layers import projection
from lora_ms.nn.nf4 import NF4Projection
from lora_ms.nn.parallel import WHOLE, Shard, split_axis
from lora_ms.nn.projection import DenseProjection, Projection, vector_dtype
from lora_ms.nn.quantised import QuantisedProjection
from lora_ms.ops import PORTABLE, Operators
from lora_ms.quant import int4, nf4
from lora_ms.quant.folder import StoredNF4, planned_nf4, quantised_entry
from lora_ms.quant.int4 import Int4
from lora_ms.quant.int4_folder import METHODS, GroupSettings, StoredInt4, read_groups
from lora_ms.quant.nf4 import NF4
from lora_ms.quant.settings import Quantisation, read_quantisation
from lora_ms.reading import opened, readable
from lora_ms.storage import Entry
from lora_ms.text import listed
from lora_ms.weights import WeightMemory

FAMILIES = {
    "LlamaForCausalLM": llama_config,
    "MistralForCausalLM": mistral_config,
    "Qwen2ForCausalLM": qwen2_config,
    "Qwen3ForCausalLM": qwen3_config,
    "SmolLM3ForCausalLM": smollm3_config,
}
FREQUENCIES = "rotary_emb.inv_freq"  # end of names in old Llama files: numbers that are computed anew
NUMPY_DTYPES: dict[ms.Type, DTypeLike] = {
    ms.float32: np.float32,
    ms.float16: np.float16,
    ms.bfloat16: np_dtype.bfloat16,
}
READERS = 2  # tensors that are read at once: 540 MB take 0.2 s, one after another 0.4


def read_config(path: Path) -> tuple[DecoderConfig, dict]:
    """The decoder's sizes and the parsed config.json of a Hugging Face directory.

    An answer ends with an ``eos_token_id`` of config.json or of generation_config.json.
    """
    hf = model_config(path)
    names = hf.get("architectures") or ["none"]
    if names[0] not in FAMILIES:
        raise LoraMsError(f"{path}: architecture {names[0]} is not supported; supported: {', '.join(FAMILIES)}")
    missing = [key for key in REQUIRED if hf.get(key) is None]
    if missing:
        raise LoraMsError(f"{path / CONFIG}: {missing[0]!r} is missing")
    with readable(path / CONFIG, "the sizes of a model"):
        config = FAMILIES[names[0]](hf)
    ends = end_tokens(generation_config(path), str(path / GENERATION))
    return replace(config, eos_token_ids=tuple(dict.fromkeys((*config.eos_token_ids, *ends)))), hf


def check_names(expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], where: str) -> None:
    """Raises one LoraMsError that counts the tensors that are missing, surplus or of another shape, and lists some."""
    faults = [f"missing {name} {shape}" for name, shape in expected.items() if name not in found]
    faults += [f"surplus {name} {shape}" for name, shape in found.items() if name not in expected]
    faults += [
        f"{name} is {found[name]}, should be {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if faults:
        raise LoraMsError(f"{where}: {len(faults)} tensors do not fit the model: {listed(faults)}")


def check_dtype(dtype: ms.Type, operators: Operators) -> None:
    """Raises LoraMsError where weights cannot have ``dtype`` with these operators."""
    if dtype not in NUMPY_DTYPES:
        raise LoraMsError(f"type {dtype} is not supported for weights; supported: float32, float16, bfloat16")
    if dtype == ms.bfloat16 and not operators.reads_bfloat16:
        raise LoraMsError(
            "weights in bfloat16 need a C++ compiler on the CPU, as MindSpore has no operators for them there: install "
            "g++ or clang++, or choose float32"
        )


def load_directory(
    path: str | os.PathLike,
    ms_dtype: ms.Type = ms.float32,
    model_class: type[CausalLM] = CausalLM,
    flash_attention: bool = True,
    operators: Operators = PORTABLE,
    shard: Shard = WHOLE,
    quantisation: Quantisation | None = None,
) -> CausalLM:
    """The model of a Hugging Face directory, its weights converted to ``ms_dtype``.

    operators: what it computes with, ``runtime.device.setup``'s.
    shard: with which ranks the model is shared; each reads its own part.
    quantisation: which linear layers are quantised as they are read. A folder that is quantised stays as it is.

    Raises:
        LoraMsError: not such a folder, or tensors that do not fit the model; ``quantisation`` of a quantised folder.
    """
    check_dtype(ms_dtype, operators)
    path = Path(path)
    config, hf = read_config(path)
    folder = open_model(path, hf)
    check_quantised(path, hf, folder, quantisation is not None)
    config = replace(config, tie_word_embeddings=folder.tied)
    entries = {name: entry for name, entry in folder.entries.items() if not name.endswith(FREQUENCIES)}
    check_names(weight_shapes(config), {n: e.shape for n, e in entries.items()}, str(path))
    stored = QuantisedWeights(entries, folder.quantised, quantisation, ms_dtype, operators, shard)
    config = replace(config, flash_attention=flash_attention)
    model = model_class(config, ms_dtype, operators, shard, stored.make)
    quantised = {parameter for cell in quantised_layers(model).values() for parameter in cell.weights()}
    whole: list[Parameter] = []
    for name, parameter in model.parameters_and_names():
        parameter.name = name
        if parameter in quantised:
            values = parameter.asnumpy()
            parameter.set_data(Tensor.from_numpy(stored.memory.copy(values, values.dtype)))
        else:
            whole.append(parameter)
    with ThreadPoolExecutor(READERS) as readers:
        arrays = readers.map(lambda parameter: stored.read(parameter.name, NUMPY_DTYPES[parameter.dtype]), whole)
        for parameter, array in zip(whole, arrays, strict=True):
            parameter.set_data(Tensor.from_numpy(array))
    weights.forget_ahead()
    model.source = base_name(path)
    model.hf_config = hf
    if quantisation is not None:
        model.hf_config = {**hf, "quantization_config": quantisation.to_config()}
    if folder.tied != says_tied(hf):
        model.hf_config = {**model.hf_config, "tie_word_embeddings": folder.tied}
    model.generation_config = generation_config(path)
    model.notices = folder.notices
    if quantisation is not None:
        model.notices = [*folder.notices, *quantisation.notices(str(ms_dtype).lower())]
    return model


class QuantisedWeights:
    """The weights of a folder, some of which have four bits there, or come into NF4 as they are read.

    Args:
        entries: the folder's tensors, by name.
        stored: those among them that are stored in four bits.
        quantisation: which of the others are quantised.
        dtype: of those that are not.
    """

    def __init__(
        self,
        entries: Mapping[str, Entry],
        stored: Mapping[str, StoredNF4 | StoredInt4],
        quantisation: Quantisation | None,
        dtype: ms.Type,
        operators: Operators,
        shard: Shard,
    ):
        self.entries = entries
        self.stored = stored
        self.quantisation = quantisation
        self.dtype = dtype
        self.operators = operators
        self.shard = shard
        self.memory = WeightMemory()

    def read(self, name: str, dtype: DTypeLike) -> np.ndarray:
        """This rank's part of a tensor; one in four bits where the model has it whole is decoded."""
        entry = self.entries[name]
        if name in self.stored:
            return self.memory.copy(self.shard.part(name, self.stored[name].numbers()), dtype)
        if self.shard.count > 1 and split_axis(name) is not None:
            return self.memory.copy(storage.read_part(entry, self.shard.slices(name, entry.shape), dtype), dtype)
        return weights.read(entry, dtype, self.memory)

    def make(self, path: str, in_channels: int, out_channels: int, has_bias: bool) -> Projection:
        """The projection at ``path``, of these sizes on this rank: with its weight where that has four bits, else to
        be filled."""
        name = f"{path}.weight"
        weight, original = self._quantised(path, name)
        if weight is None:
            return projection(in_channels, out_channels, has_bias, self.dtype, self.operators)
        if self.shard.count > 1:
            rows, columns = self.shard.slices(name, weight.shape)
            try:
                if isinstance(weight, NF4):
                    weight = nf4.part(weight, rows, columns)
                else:
                    weight = int4.part(weight, rows, columns)
            except ValueError as problem:
                raise LoraMsError(
                    f"{name} of four bits cannot be shared by {self.shard.count} processes: {problem}"
                ) from None
        bias_dtype = vector_dtype(self.dtype, self.operators)
        bias = Parameter(initializer("zeros", (out_channels,), bias_dtype), name="bias") if has_bias else None
        if isinstance(weight, Int4):
            return Int4Projection(weight, bias, self.operators)
        return NF4Projection(weight, bias, self.operators, original=original)

    def _quantised(self, path: str, name: str) -> tuple[NF4 | Int4 | None, Callable[[], np.ndarray] | None]:
        """The whole weight in four bits, and what reads the one that it was made of, if it is at hand."""
        if name in self.stored:
            return self.stored[name].read(), None
        if self.quantisation is None or not self.quantisation.quantises(path):
            return None, None
        entry = self.entries[name]
        place = self.shard.slices(name, entry.shape)
        original = partial(storage.read_part, entry, place, np.float32)
        if np.prod(entry.shape) % 2:
            raise LoraMsError(f"{name} {list(entry.shape)} has an odd number of numbers: NF4 stores them in pairs")
        return quantised_entry(name, entry, self.quantisation.double), original


def quantised_layers(model: nn.Cell) -> dict[str, QuantisedProjection]:
    """The projections of ``model`` with weights of four bits, by path."""
    return {name: cell for name, cell in model.cells_and_names() if isinstance(cell, QuantisedProjection)}


def stored_quantisation(path: Path, hf: Mapping[str, Any]) -> Quantisation | GroupSettings | None:
    """How the weights of the folder ``path``, with config.json ``hf``, are quantised; None where they are whole.

    Raises:
        LoraMsError: another kind of four bits.
    """
    stored = hf.get("quantization_config")
    if stored is None:
        return None
    try:
        if isinstance(stored, dict) and stored.get("quant_method") in METHODS:
            return read_groups(stored)
        return read_quantisation(stored, strict=False)
    except ValueError as problem:
        raise LoraMsError(f"{path / CONFIG}: quantization_config: {problem}") from None


def check_quantised(path: Path, hf: Mapping[str, Any], folder: ModelFolder, asked: bool) -> None:
    """Raises LoraMsError for a kind of four bits that is not read, and for quantised weights that are to be quantised.

    asked: whether the weights are to be quantised as they are read.
    """
    if (stored_quantisation(path, hf) is not None or folder.quantised) and asked:
        raise LoraMsError(f"{path} is quantised already: leave quantization_config out, or give the original model")


def load_checkpoint(
    path: Path,
    config: DecoderConfig,
    ms_dtype: ms.Type = ms.float32,
    operators: Operators = PORTABLE,
    shard: Shard = WHOLE,
) -> CausalLM:
    """The model of a MindSpore ``.ckpt`` or ``.safetensors`` file with MindFormers' names."""
    form = "safetensors" if path.suffix == ".safetensors" else "ckpt"
    if form == "safetensors":
        storage.read_header(path)  # refuses what contradicts itself
    with opened(path), readable(path, "a checkpoint"):
        stored = ms.load_checkpoint(str(path), format=form)
    tensors = {hugging_face_name(name): value for name, value in stored.items()}
    tensors = {name: value for name, value in tensors.items() if not name.endswith(FREQUENCIES)}
    notices: tuple[str, ...] = ()
    if config.tie_word_embeddings and HEAD in tensors:
        head = tensors[HEAD]
        shared = tensors.setdefault(EMBEDDING, head)
        if shared is head or np.array_equal(head.asnumpy(), shared.asnumpy()):
            del tensors[HEAD]
        else:
            config = replace(config, tie_word_embeddings=False)
            notices = (untied_notice(path),)
    check_names(weight_shapes(config), {n: tuple(w.shape) for n, w in tensors.items()}, str(path))
    model = CausalLM(config, ms_dtype, operators, shard)
    memory = WeightMemory()
    for name, parameter in model.parameters_and_names():
        parameter.name = name
        part = shard.part(name, tensors.pop(name).asnumpy())
        parameter.set_data(Tensor.from_numpy(memory.copy(part, NUMPY_DTYPES[parameter.dtype])))
    model.source = str(path)
    model.hf_config = hf_config(config, ms_dtype)
    model.generation_config = {}
    model.notices = notices
    return model


def new_model(config: DecoderConfig, ms_dtype: ms.Type, seed: int, operators: Operators = PORTABLE) -> CausalLM:
    """A model to train from nothing: matrices normal with variance 1 / hidden_size, norms one, biases zero."""
    model = CausalLM(config, ms_dtype, operators)
    rng = np.random.default_rng(seed)
    memory = WeightMemory()
    for name, parameter in model.parameters_and_names():
        parameter.name = name
        if parameter.ndim == 2:
            value = rng.standard_normal(parameter.shape, np.float32) * config.hidden_size**-0.5
            parameter.set_data(Tensor.from_numpy(memory.copy(value, NUMPY_DTYPES[parameter.dtype])))
    model.source = None
    model.hf_config = hf_config(config, ms_dtype)
    model.generation_config = {}
    model.notices = ()
    return model


def restore(model: CausalLM, path: str | os.PathLike) -> None:
    """Reads the weights of directory ``path`` into ``model``, which has the same ones."""
    entries = storage.open_dir(Path(path))
    expected = {name: tuple(p.shape) for name, p in model.parameters_and_names()}
    check_names(expected, {n: e.shape for n, e in entries.items()}, str(path))
    for name, parameter in model.parameters_and_names():
        parameter.set_data(Tensor.from_numpy(storage.read(entries[name], NUMPY_DTYPES[parameter.dtype])))


def hf_config(config: DecoderConfig, ms_dtype: ms.Type) -> dict:
    """A config.json for a model that came without one."""
    architecture = architecture_of(config)
    names = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "head_dim rms_norm_eps rope_theta rope_scaling max_position_embeddings tie_word_embeddings"
    ).split()
    hf = {name: getattr(config, name) for name in names}
    eos = list(config.eos_token_ids)
    return {
        "architectures": [architecture],
        "model_type": architecture.removesuffix("ForCausalLM").lower(),
        "hidden_act": "silu",
        "eos_token_id": (eos[0] if len(eos) == 1 else eos) if eos else None,
        "torch_dtype": np.dtype(NUMPY_DTYPES[ms_dtype]).name,
        **hf,
        **window_keys(config),
        **rotation_keys(config),
    }


def architecture_of(config: DecoderConfig) -> str:
    """The family that has what ``config`` asks for."""
    if config.unrotated_layers:
        return "SmolLM3ForCausalLM"
    if config.qk_norm:
        return "Qwen3ForCausalLM"
    if config.attention_bias:
        return "Qwen2ForCausalLM"
    return "MistralForCausalLM" if config.sliding_layers else "LlamaForCausalLM"


def rotation_keys(config: DecoderConfig) -> dict:
    """The key of config.json for layers that do not rotate, if there are any; a 1 rotates, whatever its name says."""
    if not config.unrotated_layers:
        return {}
    return {"no_rope_layers": [int(i not in config.unrotated_layers) for i in range(config.num_hidden_layers)]}


def window_keys(config: DecoderConfig) -> dict:
    """The keys of config.json for a sliding window, if there is one; a Mistral has it in all layers."""
    if not config.sliding_layers:
        return {}
    if not (config.qk_norm or config.attention_bias or config.unrotated_layers):
        return {"sliding_window": config.sliding_window}
    kinds = [ATTENTION[window > 0] for window in config.layer_windows]
    return {"use_sliding_window": True, "sliding_window": config.sliding_window, "layer_types": kinds}


def check_plain(model: CausalLM) -> None:
    """Raises LoraMsError where ``model`` has parameters that a Hugging Face directory of its kind has no place for."""
    biased = ("q_proj.bias", "k_proj.bias", "v_proj.bias") if model.config.attention_bias else ()
    packed = {parameter for cell in quantised_layers(model).values() for parameter in cell.weights()}
    odd = [
        name
        for name, parameter in model.parameters_and_names()
        if parameter not in packed and not name.endswith((".weight", *biased))
    ]
    if odd:
        why = "a bias that config.json cannot ask for" if odd[0].endswith(".bias") else "of an adapter: merge it first"
        raise LoraMsError(f"the model cannot be saved as it is: {odd[0]} is {why}")


def quantisation_of(model: CausalLM, quantised: Mapping[str, QuantisedProjection]) -> Quantisation:
    """Which layers of ``model`` are whole, and which are in NF4."""
    whole = [name for name, cell in model.model.cells_and_names() if type(cell) is DenseProjection]
    double = any(isinstance(cell, NF4Projection) and cell.double for cell in quantised.values())
    return Quantisation(double, tuple(f"model.{name}" for name in whole))


def stored_blocks(parameter: Parameter, dtype: str) -> Iterator[np.ndarray]:
    """The parameter's values as they are written."""
    yield storage.encoded(parameter.asnumpy(), dtype)


def planned_tensors(model: CausalLM, dtype: DTypeLike) -> dict[str, storage.Planned]:
    """What ``write_directory`` writes, by name."""
    stored = storage.STORED[np.dtype(dtype).name]
    quantised = quantised_layers(model)
    packed = {parameter for cell in quantised.values() for parameter in cell.weights()}
    planned = {
        name: storage.Planned(stored, tuple(p.shape), partial(stored_blocks, p, stored))
        for name, p in model.parameters_and_names()
        if p not in packed
    }
    for name, cell in quantised.items():
        if not isinstance(cell, NF4Projection):
            raise LoraMsError(f"the model cannot be saved as it is: {name} is in four bits that are read only")
        shape = (cell.out_channels, cell.in_channels)
        planned |= planned_nf4(f"{name}.weight", shape, np.dtype(dtype).name, cell.double, cell.stored)
    return planned


def write_directory(
    model: CausalLM, folder: Path, dtype: DTypeLike = np.float32, shard_size: int = storage.SHARD_SIZE
) -> None:
    """Writes ``config.json`` and the weights, in files of at most ``shard_size`` bytes: transformers loads the result.

    A head that has come apart from the embedding is written beside it.

    Raises:
        LoraMsError: an adapter stands in the model, or the directory cannot be written.
    """
    check_plain(model)
    name_of_type = np.dtype(dtype).name
    planned, quantised = planned_tensors(model, dtype), quantised_layers(model)
    hf = {k: v for k, v in model.hf_config.items() if k not in ("torch_dtype", "dtype", "quantization_config")}
    if quantised:
        hf["quantization_config"] = quantisation_of(model, quantised).to_config()
    hf["dtype" if "rope_parameters" in hf else "torch_dtype"] = name_of_type
    if model.config.tie_word_embeddings and "lm_head.weight" in planned:
        hf["tie_word_embeddings"] = False
    for _ in storage.write_model(folder, planned, shard_size):
        pass
    if model.generation_config:
        storage.write_json(folder / GENERATION, model.generation_config)
    storage.write_json(folder / "config.json", hf)


def save_directory(
    model: CausalLM,
    path: str | os.PathLike,
    dtype: DTypeLike = np.float32,
    shard_size: int = storage.SHARD_SIZE,
    add: Callable[[Path], None] = lambda folder: None,
) -> None:
    """``write_directory`` into a folder that is written whole or not at all; ``add`` writes what stands beside it."""
    check_plain(model)
    size = sum(tensor.size for tensor in planned_tensors(model, dtype).values())
    with saving.new_folder(Path(path), size, storage.MODEL_FILES) as folder:
        write_directory(model, folder, dtype, shard_size)
        add(folder)

"""MindFormers' Llama with weights and a LoRA adapter, and what was trained of it under PEFT's names."""

from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from mindspore import Parameter, Tensor, nn
from numpy.typing import NDArray

from lora_ms import saving, storage
from lora_ms.adapters.inject import adapted_layers, freeze_all, install
from lora_ms.adapters.matching import check_listed
from lora_ms.adapters.methods.base import AdapterConfig, Target
from lora_ms.adapters.peft_config import Adapted, to_peft
from lora_ms.adapters.peft_files import CONFIG, WEIGHTS, by_module, read_adapter_config, read_entries
from lora_ms.adapters.peft_format import by_key
from lora_ms.bridge import adapters, weights
from lora_ms.bridge.adapters import module_parts
from lora_ms.bridge.files import decoded, in_memory, of_entry, planned
from lora_ms.bridge.layout import Heads, inverse
from lora_ms.bridge.settings import ALONE
from lora_ms.errors import LoraMsError
from lora_ms.hf_folder import model_config, open_model
from lora_ms.models.decoder import DecoderConfig
from lora_ms.models.hub import check_names
from lora_ms.models.mindformers_names import FUSED, mindformers_module, split_name
from lora_ms.nn.parallel import WHOLE
from lora_ms.ops import Operators

Array = NDArray[np.float32]
MINDPET_FACTORS = {"mindpet_delta_lora_a": "lora_A.weight", "mindpet_delta_lora_b": "lora_B.weight"}


def llama_sizes(sizes: DecoderConfig, seq_length: int) -> dict[str, Any]:
    """LlamaConfig's arguments for a model of ``sizes``.

    Raises:
        LoraMsError: a model that MindFormers' Llama cannot be.
    """
    if sizes.qk_norm:
        raise LoraMsError("backend mindformers: Qwen3 is none of MindFormers' Llama models; leave the backend native")
    if sizes.unrotated_layers:
        raise LoraMsError(
            "backend mindformers: MindFormers' Llama rotates queries and keys in all layers, this model in some; leave "
            "the backend native"
        )
    if sizes.head_dim * sizes.num_attention_heads != sizes.hidden_size:
        raise LoraMsError(
            f"backend mindformers: head_dim {sizes.head_dim} times {sizes.num_attention_heads} heads is not "
            f"hidden_size {sizes.hidden_size}, as MindFormers' Llama has it; leave the backend native"
        )
    if sizes.sliding_layers and sizes.sliding_window < seq_length:
        raise LoraMsError(
            f"backend mindformers: a sliding window of {sizes.sliding_window} tokens is not computed there on rows of "
            f"{seq_length}; leave the backend native"
        )
    found: dict[str, Any] = {
        "seq_length": seq_length,
        "hidden_size": sizes.hidden_size,
        "num_layers": sizes.num_hidden_layers,
        "num_heads": sizes.num_attention_heads,
        "n_kv_heads": sizes.num_key_value_heads,
        "intermediate_size": sizes.intermediate_size,
        "vocab_size": sizes.vocab_size,
        "rms_norm_eps": sizes.rms_norm_eps,
        "theta": sizes.rope_theta,
        "qkv_has_bias": sizes.attention_bias,
        "tie_word_embeddings": sizes.tie_word_embeddings,
        "pad_token_id": -1,  # no id: MindFormers would mask every token of that id, and labels mask all there is to
    }
    scaling = dict(sizes.rope_scaling or {})
    kind = scaling.pop("rope_type", None)
    if kind == "llama3":
        longest = sizes.max_position_embeddings
        found |= {"extend_method": "LLAMA3", "scaling_factor": scaling, "max_position_embedding": longest}
    elif kind == "linear":
        found |= {"extend_method": "PI", "scaling_factor": scaling["factor"]}
    elif kind not in (None, "default"):
        raise LoraMsError(f"backend mindformers: rope_scaling {kind} is not supported; leave the backend native")
    return found


def parallel_config(package: SimpleNamespace, theirs: Any) -> Any:
    """LlamaConfig's ``parallel_config``, recomputation included, of MindFormers' configuration ``theirs``."""
    copy = deepcopy(theirs)
    if not copy.use_parallel:
        copy.parallel_config.update(dict.fromkeys(ALONE, 1), use_seq_parallel=False)
    package.build_parallel_config(copy)
    return copy.parallel_config


def heads_of(sizes: DecoderConfig) -> Heads:
    """What joint matrices of the model are made of."""
    return Heads(sizes.num_attention_heads, sizes.num_key_value_heads, sizes.head_dim)


def fill(network: nn.Cell, folder: Path, heads: Heads, fused: bool) -> None:
    """Reads the weights of the Hugging Face ``folder`` into MindFormers' bare ``network``, one at a time.

    Raises:
        LoraMsError: they are not the network's.
    """
    found = open_model(folder, model_config(folder))
    stored = {name: of_entry(entry) for name, entry in found.entries.items()}
    parameters = dict(network.parameters_and_names())
    tensors = weights.to_mindformers(stored, "legacy", fused, heads, None, folder)
    if "lm_head.weight" not in parameters:
        tensors.pop("lm_head.weight", None)
    expected = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    check_names(expected, {name: tensor.shape for name, tensor in tensors.items()}, str(folder))
    for name, parameter in parameters.items():
        words = in_memory(tensors[name])
        parameter.set_data(Tensor(decoded(tensors[name].dtype, words), parameter.dtype))


def linear_layers(package: SimpleNamespace, network: nn.Cell) -> dict[str, tuple[str, nn.Cell]]:
    """MindFormers' linear layers by Hugging Face's path: their own path, and the cell."""
    found = {}
    for path, cell in network.cells_and_names():
        split = split_name(f"{path}.weight")
        if type(cell) is package.Linear and split is not None and split.module != "lm_head":
            found[split.module] = (path, cell)
    return found


def inject(package: SimpleNamespace, network: nn.Cell, config: AdapterConfig, operators: Operators) -> None:
    """Puts our adapter cells in the place of MindFormers' linear layers; the adapter alone trains afterwards.

    Raises:
        LoraMsError: what the choice of modules can be wrong about, or a kind of adapter that only native trains.
    """
    unsupported = [] if config.WITH_MINDFORMERS else [config.title]
    unsupported += config.keys_beside
    unsupported += ["bias all"] if config.trains_all_biases else []
    if unsupported:
        raise LoraMsError(f"backend mindformers does not support {', '.join(unsupported)}: use backend native")
    layers, cells = linear_layers(package, network), {}
    specs = config.specs(layers)
    check_listed("target_modules", config.target_modules, list(layers))
    for module, spec in specs.items():
        path, linear = layers[module]
        target = Target(module, linear, WHOLE, operators, compute_dtype=linear.dtype)
        cells[path] = config.build(target, spec)
    freeze_all(network)
    install(network, cells)


def factor_parameters(network: nn.Cell) -> dict[str, dict[str, Parameter]]:
    """What is trained of an adapter, MindPet's or ours, by Hugging Face's module path and PEFT's name."""
    found: dict[str, dict[str, Parameter]] = {}
    for path, cell in adapted_layers(network).items():
        found[_module(path)] = dict(cell.tensors())
    for parameter in network.get_parameters():
        path, _, leaf = parameter.name.rpartition(".")
        if leaf in MINDPET_FACTORS:
            found.setdefault(_module(path), {})[MINDPET_FACTORS[leaf]] = parameter
    return found


def legacy_path(module: str) -> str:
    """MindFormers' path of Hugging Face's ``module``."""
    return mindformers_module(module, "legacy") or module


def _module(path: str) -> str:
    split = split_name(f"{path}.weight")
    if split is None:
        raise LoraMsError(f"an adapter on {path}, which is no module of Hugging Face's models")
    return split.module


def load_factors(network: nn.Cell, adapter: Path, config: AdapterConfig, heads: Heads, fused: bool) -> None:
    """Reads the PEFT ``adapter`` into the adapter of ``config`` in ``network``.

    Raises:
        LoraMsError: it is another in its modules, ranks, alphas or kind; all differences are listed.
    """
    stored = read_adapter_config(adapter)
    modules = by_module(read_entries(adapter))
    found = {f"{m}.{factor}": of_entry(entry) for m, tensors in modules.items() for factor, entry in tensors.items()}
    ours = {name: planned([tensor]) for name, tensor in found.items()}
    if fused:
        joint = adapters.mindformers_tensors(adapters.read_peft(adapter)[0], "mindpet", True, heads, adapter)
        split = [(_module(name.rpartition(".")[0]), name.rpartition(".")[2], t) for name, t in joint.items()]
        ours = {f"{module}.{MINDPET_FACTORS[leaf]}": tensor for module, leaf, tensor in split}
    wanted = {f"{m}.{factor}": p for m, ps in factor_parameters(network).items() for factor, p in ps.items()}
    expected = {name: tuple(parameter.shape) for name, parameter in wanted.items()}
    check_names(expected, {name: tensor.shape for name, tensor in ours.items()}, f"load_adapter {adapter}")
    specs = {_module(path): cell.spec for path, cell in adapted_layers(network).items()}
    for module in factor_parameters(network):
        part = parts_of(module)[0]
        here, there = specs.get(module, config.spec(module)), stored.spec(part)
        if here != there or config.scaling(module) != stored.scaling(part):
            raise LoraMsError(
                f"load_adapter {adapter}: {module}: {there} and scaling {stored.scaling(part):g} in the adapter, "
                f"{here} and scaling {config.scaling(module):g} in pet_config"
            )
    for name, parameter in wanted.items():
        parameter.set_data(Tensor(decoded(ours[name].dtype, in_memory(ours[name])), parameter.dtype))


def shapes(network: nn.Cell) -> dict[str, tuple[int, ...]]:
    """Of the adapter's parameters: they shrink where MindSpore leaves each card a part."""
    found = factor_parameters(network)
    return {f"{m}.{factor}": tuple(p.shape) for m, parameters in found.items() for factor, p in parameters.items()}


def adapter_arrays(network: nn.Cell, config: AdapterConfig, heads: Heads) -> dict[str, dict[str, Array]]:
    """The trained adapter by Hugging Face's module path and PEFT's name, joint matrices split."""
    cells = {_module(path): cell for path, cell in adapted_layers(network).items()}
    found: dict[str, dict[str, Array]] = {}
    for module, parameters in factor_parameters(network).items():
        values = {factor: p.asnumpy().astype(np.float32) for factor, p in parameters.items()}
        if module in cells:
            values = config.pack(module, cells[module].export())
        prefix, inside = module_parts(module)
        if inside not in FUSED:
            found[module] = values
            continue
        rows = next(len(values[tensor]) for tensor in config.ROW_TENSORS if tensor in values)
        start = 0
        back = inverse(heads.order(module, rows))
        for part, height in zip(FUSED[inside], heads.heights(module, rows), strict=True):
            own = back[start : start + height]
            found[prefix + part] = {k: v[own] if k in config.ROW_TENSORS else v for k, v in values.items()}
            start += height
    return found


def parts_of(module: str) -> tuple[str, ...]:
    """The modules that a joint one stands for, or the module itself."""
    prefix, inside = module_parts(module)
    return tuple(prefix + part for part in FUSED[inside]) if inside in FUSED else (module,)


def save_adapter(
    network: nn.Cell, folder: Path, config: AdapterConfig, heads: Heads, linear: list[str], base: str
) -> None:
    """Writes the trained adapter as a PEFT directory, each file atomically.

    linear: paths of all layers that could have one. base: the model it belongs to.

    Raises:
        LoraMsError: a value that is not finite; nothing is written then.
    """
    arrays = adapter_arrays(network, config, heads)
    tensors = by_key(arrays)
    for name, value in tensors.items():
        if not np.isfinite(value).all():
            raise LoraMsError(f"{name} holds NaN or infinity; {saving.final_of(folder)} was not written")
    specs: dict[str, Any] = {module: config.spec(module) for module in arrays}  # MindPet's, which has no cells of ours
    for path, cell in adapted_layers(network).items():
        specs |= dict.fromkeys(parts_of(_module(path)), cell.spec)
    plain = tuple(part for module in linear for part in parts_of(module) if part not in specs)
    storage.write_tensors(folder / WEIGHTS, tensors)
    storage.write_json(folder / CONFIG, to_peft(config, Adapted(specs, (), plain), base))

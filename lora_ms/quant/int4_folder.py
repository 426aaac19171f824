"""GPTQ's and AWQ's weights in folders: ``X.qweight``, ``X.qzeros``, ``X.scales`` and, of GPTQ, ``X.g_idx``."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_ms import storage
from lora_ms.errors import LoraMsError
from lora_ms.quant import int4
from lora_ms.quant.int4 import Int4
from lora_ms.storage import Entry

METHODS = ("gptq", "awq")
TYPE = "INT4"  # dtype of an ``Entry`` that stands for a weight in groups
PARTS = (".qweight", ".qzeros", ".scales", ".g_idx")


class GroupSettings(NamedTuple):
    """How the weights of a folder are packed."""

    method: str  # of ``METHODS``
    group_size: int  # inputs of a group; -1: all
    zero_offset: int  # added to the stored zeros

    def name(self) -> str:
        """For the user."""
        return self.method.upper()

    def quantises(self, module: str) -> bool:
        """Whether the linear layer at the dotted path ``module`` is quantised, as far as the settings tell."""
        return True

    @property
    def width(self) -> float:
        """Bytes of a number: half of one, and a scale and a zero for each group."""
        return 0.5 + (3 / self.group_size if self.group_size > 0 else 0)


def read_groups(value: Mapping[str, Any]) -> GroupSettings:
    """``quantization_config`` of a GPTQ or AWQ folder.

    Raises:
        ValueError: another number of bits, or a layout that is not read.
    """
    method = value["quant_method"]
    bits, size = value.get("bits", value.get("w_bit", 4)), value.get("group_size", value.get("q_group_size", 128))
    if bits != 4:
        raise ValueError(f"{method} of {bits!r:.80} bits is not supported: 4 bits are")
    if type(size) is not int or not (size == -1 or 1 < size < 2**20):
        raise ValueError(f"group_size {size!r:.80}: expects a number of inputs, or -1")
    offset = 0
    if method == "awq":
        version, zeros = value.get("version") or "gemm", value.get("zero_point", True)
        if not isinstance(version, str) or version.lower() != "gemm" or zeros is not True:
            raise ValueError(f"awq's version {version!r:.80} with zero_point {zeros!r:.20} is not supported: gemm is")
    else:
        form = value.get("checkpoint_format") or "gptq"
        if form not in ("gptq", "gptq_v2"):
            raise ValueError(f"checkpoint_format {form!r:.80} is not supported: gptq and gptq_v2 are")
        if value.get("dynamic"):
            raise ValueError("dynamic (settings for single modules) is not supported")
        offset = int(form == "gptq")
    return GroupSettings(method, size, offset)


class StoredInt4(NamedTuple):
    """Where a weight in groups lies, checked against its shape."""

    name: str  # of the weight
    shape: tuple[int, int]  # [out, in]
    parts: Mapping[str, Entry]  # by what follows the module's name
    settings: GroupSettings

    @property
    def dtype(self) -> str:
        """Of the weight before it was quantised, as far as the folder tells."""
        return "float16"

    @property
    def entry(self) -> Entry:
        """The packed weight's place, with the type ``TYPE`` and the shape of the weight that it stands for."""
        return self.parts[".qweight"]._replace(dtype=TYPE, shape=self.shape)

    def read(self) -> Int4:
        """The weight. Raises LoraMsError where a scale is not finite, or groups do not fit."""
        qweight, qzeros = self._words(".qweight"), self._words(".qzeros")
        scales = storage.read(self.parts[".scales"], np.float16)
        where = f"{self.parts['.qweight'].file}: {self.name}"
        if not np.isfinite(scales).all():
            raise LoraMsError(f"{where}: a scale is not finite")
        if self.settings.method == "awq":
            return int4.from_awq(qweight, qzeros, scales)
        groups = self._words(".g_idx") if ".g_idx" in self.parts else None
        try:
            return int4.from_gptq(qweight, qzeros, scales, groups, self.settings.zero_offset)
        except ValueError as problem:
            raise LoraMsError(f"{where}: {problem}") from None

    def numbers(self) -> NDArray[np.float32]:
        """The weight [out, in]."""
        return int4.dequantise(self.read())

    def _words(self, part: str) -> NDArray[np.int32]:
        entry = self.parts[part]
        return np.array(storage.read_raw(entry)).view(np.int32).reshape(entry.shape)


def split_groups(
    entries: Mapping[str, Entry], value: Any, biased: tuple[str, ...] = ()
) -> tuple[dict[str, Entry], dict[str, StoredInt4]]:
    """The tensors that are stored whole, and the weights in groups, by the name that they have whole.

    Args:
        value: ``quantization_config`` of the folder.
        biased: names of layers that have a bias. Beside others one of zeros is left out: AutoGPTQ puts one everywhere.

    Raises:
        LoraMsError: parts that are missing or do not fit, or settings that are not read.
    """
    modules = [key.removesuffix(".qweight") for key in entries if key.endswith(".qweight")]
    if not modules:
        return dict(entries), {}
    file = entries[f"{modules[0]}.qweight"].file
    if not isinstance(value, Mapping) or value.get("quant_method") not in METHODS:
        raise LoraMsError(f"{file}: {modules[0]}.qweight, but config.json does not say that it is of {METHODS}")
    try:
        settings = read_groups(value)
    except ValueError as problem:
        raise LoraMsError(f"{file.parent}: quantization_config: {problem}") from None
    plain, found = dict(entries), {}
    for module in modules:
        parts = {part: plain.pop(module + part) for part in PARTS if module + part in plain}
        found[f"{module}.weight"] = _stored(module, parts, settings)
        bias = plain.get(f"{module}.bias")
        if (
            bias is not None
            and not module.endswith(biased)
            and not any(block.any() for block in storage.read_blocks(bias))
        ):
            del plain[f"{module}.bias"]
    return plain, found


def _stored(module: str, parts: Mapping[str, Entry], settings: GroupSettings) -> StoredInt4:
    file = parts[".qweight"].file
    for part in (".qzeros", ".scales"):
        if part not in parts:
            raise LoraMsError(f"{file}: {module}{part} is missing: the folder is not complete")
    first = parts[".qweight"].shape
    if len(first) != 2:
        raise LoraMsError(f"{file}: {module}.qweight is {list(first)}: expects two sizes")
    outputs, inputs = (8 * first[1], first[0]) if settings.method == "awq" else (first[1], 8 * first[0])
    size = inputs if settings.group_size == -1 else settings.group_size
    if not inputs or not outputs or inputs % size or outputs % 8 or size % 2:
        raise LoraMsError(f"{file}: {module}: groups of {size} do not divide its {inputs} inputs, or 8 its {outputs}")
    groups = inputs // size
    expected = {
        ".qweight": ("I32", first),
        ".qzeros": ("I32", (groups, outputs // 8)),
        ".scales": ("F16", (groups, outputs)),
        ".g_idx": ("I32", (inputs,)),
    }
    for part, entry in parts.items():
        if (entry.dtype, entry.shape) != expected[part]:
            dtype, shape = expected[part]
            raise LoraMsError(
                f"{file}: {module}{part} is {entry.dtype} {list(entry.shape)}, should be {dtype} {list(shape)}"
            )
    return StoredInt4(f"{module}.weight", (outputs, inputs), parts, settings)

"""NF4 weights in folders, by the names of bitsandbytes: ``X.weight`` and, beside it, ``X.weight.absmax`` and others."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_ms import storage
from lora_ms.errors import LoraMsError
from lora_ms.quant.nf4 import (
    BLOCK,
    CODES,
    NESTED_BLOCK,
    NF4,
    Nested,
    blocks_of,
    dequantise,
    quantise,
)
from lora_ms.reading import parse_json
from lora_ms.storage import Entry, Planned

STATE = ".quant_state.bitsandbytes__"
PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
STATE_SIZE = 10_000  # bytes of JSON that are read
DTYPES = ("float32", "float16", "bfloat16")  # of the weight before it was quantised
# weights that are quantised: of the linear layers, but for the head
LINEAR = re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight")
TYPE = "NF4"  # dtype of an ``Entry`` that stands for a quantised weight


class StoredNF4(NamedTuple):
    """Where a quantised weight lies, checked against its shape."""

    name: str  # of the weight
    shape: tuple[int, int]  # [out, in]
    parts: Mapping[str, Entry]  # by what follows the weight's name; "" is the packed weight
    offset: float | None  # of the absmax, where they are quantised
    dtype: str  # of ``DTYPES``, of the weight before it was quantised

    @property
    def entry(self) -> Entry:
        """The packed weight's place, with the type ``TYPE`` and the shape of the weight that it stands for."""
        return self.parts[""]._replace(dtype=TYPE, shape=self.shape)

    def read(self) -> NF4:
        """The weight. Raises LoraMsError where an absmax is negative or not finite."""
        packed = np.array(storage.read_raw(self.parts[""]))
        if self.offset is None:
            absmax = self._floats(".absmax")
            self._check(absmax, absmax.min(initial=0) >= 0)
            return NF4(self.shape, packed, absmax)
        nested = Nested(self._floats(".nested_absmax"), self._floats(".nested_quant_map"), np.float32(self.offset))
        for values in nested[:2]:
            self._check(values)
        return NF4(self.shape, packed, np.array(storage.read_raw(self.parts[".absmax"])), nested)

    def numbers(self) -> NDArray[np.float32]:
        """The weight [out, in]."""
        return dequantise(self.read())

    def _floats(self, part: str) -> NDArray[np.float32]:
        return storage.read(self.parts[part], np.float32)

    def _check(self, values: NDArray, sound: Any = True) -> None:
        if not sound or not np.isfinite(values).all():
            raise LoraMsError(f"{self.parts[''].file}: {self.name}: an absmax is negative or not finite")


def split(entries: Mapping[str, Entry]) -> tuple[dict[str, Entry], dict[str, StoredNF4]]:
    """The tensors that are stored whole, and the quantised weights, by name.

    Raises:
        LoraMsError: FP4, or parts that are missing or do not fit each other.
    """
    quantised: dict[str, StoredNF4] = {}
    plain = dict(entries)
    for key in entries:
        name, found, kind = key.rpartition(STATE)
        if found:
            parts = {part: plain.pop(name + part) for part in ("", *PARTS) if name + part in plain}
            quantised[name] = _stored(name, kind, parts, plain.pop(key))
    return plain, quantised


def _stored(name: str, kind: str, parts: Mapping[str, Entry], state: Entry) -> StoredNF4:
    where = f"{state.file}: {name}"
    if kind != "nf4":
        raise LoraMsError(f"{where} is of the type {kind:.80}, which is not supported: nf4 is")
    found = _state(where, state)
    shape = found["shape"]
    numbers = shape[0] * shape[1]
    blocks = blocks_of(numbers)
    double = "nested_offset" in found
    expected = {"": (None, blocks_of(numbers, 2)), ".quant_map": ("F32", 4 * len(CODES))}
    expected[".absmax"] = ("U8", blocks) if double else ("F32", 4 * blocks)
    if double:
        expected[".nested_absmax"] = ("F32", 4 * blocks_of(blocks, NESTED_BLOCK))
        expected[".nested_quant_map"] = ("F32", 4 * 256)
    for part, (dtype, size) in expected.items():
        if part not in parts:
            raise LoraMsError(f"{where}{part} is missing: the folder is not complete")
        entry = parts[part]
        if (dtype is not None and entry.dtype != dtype) or entry.end - entry.start != size:
            given = f"{entry.dtype} of {entry.end - entry.start:,} bytes"
            raise LoraMsError(f"{where}{part} is {given}, should be {dtype or 'U8'} of {size:,} for {list(shape)}")
    if not np.array_equal(storage.read(parts[".quant_map"], np.float32).reshape(-1), CODES):
        raise LoraMsError(f"{where}.quant_map holds other numbers than NF4's")
    return StoredNF4(name, shape, parts, found["nested_offset"] if double else None, found["dtype"])


def _state(where: str, entry: Entry) -> dict[str, Any]:
    """The JSON beside a weight."""
    what = f"{where}{STATE}nf4"
    if entry.dtype != "U8" or entry.end - entry.start > STATE_SIZE:
        raise LoraMsError(f"{what} is no JSON text of at most {STATE_SIZE:,} bytes")
    try:
        state = parse_json(storage.read_raw(entry).tobytes().decode())
    except (ValueError, RecursionError) as problem:
        raise LoraMsError(f"{what} is not valid JSON ({problem})") from None
    if not isinstance(state, dict):
        raise LoraMsError(f"{what} is no JSON object")
    wanted = {"quant_type": "nf4", "blocksize": BLOCK}
    if "nested_offset" in state:
        wanted |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
    for key, value in wanted.items():
        if state.get(key) != value:
            raise LoraMsError(f"{what}: {key} {state.get(key)!r:.80} is not supported: {value} is")
    shape, offset = state.get("shape"), state.get("nested_offset", 0.0)
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int and 0 < n < 2**31 for n in shape):
        raise LoraMsError(f"{what}: shape {shape!r:.80}: expects two sizes")
    if state.get("dtype") not in DTYPES:
        raise LoraMsError(f"{what}: dtype {state.get('dtype')!r:.80} is none of {', '.join(DTYPES)}")
    if type(offset) not in (int, float) or not abs(offset) < 1e30:
        raise LoraMsError(f"{what}: nested_offset {offset!r:.80} is no number")
    return {**state, "shape": (shape[0], shape[1])}


def planned_nf4(
    name: str, shape: tuple[int, int], dtype: str, double: bool, weight: Callable[[], NF4]
) -> dict[str, Planned]:
    """The tensors to write for the weight ``name`` [out, in], which had the type ``dtype`` of ``DTYPES``.

    weight: makes it when its first tensor is written; it is forgotten with its last one.
    """
    numbers = shape[0] * shape[1]
    blocks = blocks_of(numbers)
    nested = blocks_of(blocks, NESTED_BLOCK)
    made: list[NF4] = []

    def values(part: str) -> Iterator[NDArray]:
        if not made:
            made.append(weight())
        yield _tensors(made[0], dtype)[part]
        if part == last:
            made.clear()

    found = {"": Planned("U8", (blocks_of(numbers, 2), 1), partial(values, ""))}
    found[".absmax"] = Planned("U8" if double else "F32", (blocks,), partial(values, ".absmax"))
    if double:
        found[".nested_absmax"] = Planned("F32", (nested,), partial(values, ".nested_absmax"))
        found[".nested_quant_map"] = Planned("F32", (256,), partial(values, ".nested_quant_map"))
    found[".quant_map"] = Planned("F32", (len(CODES),), partial(values, ".quant_map"))
    last = f"{STATE}nf4"
    found[last] = Planned("U8", (_state_size(shape, dtype, double),), partial(values, last))
    return {name + part: plan for part, plan in found.items()}


def _tensors(weight: NF4, dtype: str) -> dict[str, NDArray]:
    state: dict[str, Any] = _state_of(weight.shape, dtype)
    found = {"": weight.packed.reshape(-1, 1), ".absmax": weight.absmax, ".quant_map": CODES}
    if weight.nested is not None:
        state |= _nested_state(float(weight.nested.offset))
        found |= {".nested_absmax": weight.nested.absmax, ".nested_quant_map": weight.nested.codes}
    text = json.dumps(state).ljust(_state_size(weight.shape, dtype, weight.nested is not None))
    return {**found, f"{STATE}nf4": np.frombuffer(text.encode(), np.uint8)}


def _state_of(shape: tuple[int, int], dtype: str) -> dict[str, Any]:
    return {"quant_type": "nf4", "blocksize": BLOCK, "dtype": dtype, "shape": list(shape)}


def _nested_state(offset: float) -> dict[str, Any]:
    return {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}


def _state_size(shape: tuple[int, int], dtype: str, double: bool) -> int:
    """Bytes of the JSON beside a weight, which is filled up with spaces: an offset has up to 24 characters."""
    state = _state_of(shape, dtype) | (_nested_state(0.0) if double else {})
    return len(json.dumps(state)) + 24


def quantised_entry(name: str, entry: Entry, double: bool) -> NF4:
    """The weight ``name``, which is stored whole, quantised as it is stored.

    Raises:
        LoraMsError: it holds NaN or infinity.
    """
    found = quantise(storage.read(entry, np.float32), double)
    # NaN and infinity show in the largest number of their block, and in the mean of these
    values = found.absmax if found.nested is None else found.nested.offset
    if not np.isfinite(values).all():
        raise LoraMsError(f"{entry.file}: {name} holds NaN or infinity")
    return found

"""Base weights under Hugging Face's names and under MindFormers': what is copied, and what is fused or split."""

from collections.abc import Mapping
from pathlib import Path

from lora_ms.bridge.adapters import module_parts
from lora_ms.bridge.files import Stored, planned
from lora_ms.bridge.layout import Heads, inverse
from lora_ms.errors import LoraMsError
from lora_ms.models.mindformers_names import FUSED, hugging_face_name, mindformers_name, split_name
from lora_ms.storage import Planned

OPTIONAL = "rotary_emb.inv_freq"  # old Llama files carry the frequencies


def to_mindformers(
    tensors: Mapping[str, Stored], style: str, fuse: bool, heads: Heads, dtype: str | None, where: Path
) -> dict[str, Planned]:
    """MindFormers' tensors of a Hugging Face model.

    Raises:
        LoraMsError: a name that MindFormers has no place for.
    """
    groups: dict[str, list[str]] = {}  # fused name under Hugging Face's scheme -> its parts
    for name in tensors:
        module, _, leaf = name.rpartition(".")
        prefix, inside = module_parts(module)
        whole = next((whole for whole, parts in FUSED.items() if fuse and inside in parts), None)
        groups.setdefault(f"{prefix}{whole}.{leaf}" if whole else name, []).append(name)
    result, strange = {}, []
    for name, sources in groups.items():
        theirs = mindformers_name(name, style)
        if theirs is None:
            strange += [] if name.endswith(OPTIONAL) else [name]
            continue
        module = name.rpartition(".")[0]
        prefix, inside = module_parts(module)
        if inside in FUSED:
            leaf = name.rpartition(".")[2]
            parts = [tensors[f"{prefix}{part}.{leaf}"] for part in FUSED[inside]]
            result[theirs] = planned(parts, dtype, heads.order(module, sum(len(part.words) for part in parts)))
        else:
            result[theirs] = planned([tensors[sources[0]]], dtype)
    if strange:
        raise LoraMsError(f"{where}: MindFormers has no place for {len(strange)} tensors, such as {strange[0]}")
    return result


def to_hugging_face(
    tensors: Mapping[str, Stored], heads: Heads, dtype: str | None, where: Path
) -> tuple[dict[str, Planned], list[str]]:
    """Hugging Face's tensors of a MindFormers model, and the names of those that are left out: an adapter's, an
    optimiser's, counters.

    Raises:
        LoraMsError: no weight of a model.
    """
    result: dict[str, Planned] = {}
    left = []
    for name, tensor in tensors.items():
        found = split_name(name)
        ours = hugging_face_name(name)
        if found is None or not ours.endswith((".weight", ".bias")) or "lora_" in name.lower():
            left.append(name)
            continue
        prefix, inside = module_parts(found.module)
        if inside not in FUSED:
            result[ours] = planned([tensor], dtype)
            continue
        rows, leaf, start = len(tensor.words), ours.rpartition(".")[2], 0
        back = inverse(heads.order(found.module, rows))
        for part, height in zip(FUSED[inside], heads.heights(found.module, rows), strict=True):
            result[f"{prefix}{part}.{leaf}"] = planned([tensor], dtype, back[start : start + height])
            start += height
    if not result:
        raise LoraMsError(f"{where}: holds no weight of a Llama or Qwen model by MindFormers' names")
    return result, left

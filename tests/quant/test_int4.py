"""GPTQ's and AWQ's weights against the formulas of their formats, number by number."""

import json
from pathlib import Path

import numpy as np
import pytest

from lora_ms import storage
from lora_ms.errors import LoraMsError
from lora_ms.hf_folder import open_model
from lora_ms.quant import int4

RNG = np.random.default_rng(5)
IN, OUT, GROUP = 64, 24, 16
AWQ = [0, 4, 1, 5, 2, 6, 3, 7]  # where output 8 j + i is among the eight numbers of word j, from the lowest


def words(shape: tuple[int, ...]) -> np.ndarray:
    return RNG.integers(-(2**31), 2**31, shape).astype(np.int32)


def number(word: int, place: int) -> int:
    """The four bits of ``word`` at ``place``, from the lowest."""
    return (int(word) & 0xFFFFFFFF) >> (4 * place) & 15


def gptq_numbers(q, z, scales, groups, plus: int) -> np.ndarray:
    """``scale[g] (q - (z + plus))``: a word of q holds eight inputs, one of z eight outputs."""
    found = np.empty((OUT, IN))
    for o in range(OUT):
        for i in range(IN):
            g = groups[i]
            zero = (number(z[g, o // 8], o % 8) + plus) % 16  # of four bits
            found[o, i] = float(scales[g, o]) * (number(q[i // 8, o], i % 8) - zero)
    return found


def awq_numbers(q, z, scales) -> np.ndarray:
    """``scale[g] (q - z)``: words hold eight outputs, in AWQ's order."""
    found = np.empty((OUT, IN))
    for o in range(OUT):
        for i in range(IN):
            g, place = i // GROUP, AWQ[o % 8]
            found[o, i] = float(scales[g, o]) * (number(q[i, o // 8], place) - number(z[g, o // 8], place))
    return found


def gptq_parts(act_order: bool) -> dict[str, np.ndarray]:
    groups = np.repeat(np.arange(IN // GROUP), GROUP).astype(np.int32)
    return {
        "qweight": words((IN // 8, OUT)),
        "qzeros": words((IN // GROUP, OUT // 8)),
        "scales": RNG.uniform(0.001, 0.1, (IN // GROUP, OUT)).astype(np.float16),
        "g_idx": RNG.permutation(groups) if act_order else groups,
    }


def awq_parts() -> dict[str, np.ndarray]:
    return {**gptq_parts(False), "qweight": words((IN, OUT // 8))} | {"g_idx": None}


@pytest.mark.parametrize("plus", [0, 1])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq(act_order, plus):
    parts = gptq_parts(act_order)
    found = int4.from_gptq(*parts.values(), zero_offset=plus)
    assert (found.order is not None) is act_order
    wanted = gptq_numbers(*parts.values(), plus)
    np.testing.assert_allclose(int4.dequantise(found), wanted, rtol=1e-6)
    if not act_order:
        bare = int4.from_gptq(parts["qweight"], parts["qzeros"], parts["scales"], None, plus)
        np.testing.assert_array_equal(int4.dequantise(bare), int4.dequantise(found))


def test_awq():
    parts = awq_parts()
    q, z, scales = parts["qweight"], parts["qzeros"], parts["scales"]
    np.testing.assert_allclose(int4.dequantise(int4.from_awq(q, z, scales)), awq_numbers(q, z, scales), rtol=1e-6)


# --- folders


def write(folder: Path, parts: dict[str, np.ndarray | None], **more: np.ndarray) -> None:
    kinds = {"int32": "I32", "float16": "F16", "float32": "F32"}
    tensors = {f"model.layers.0.mlp.up_proj.{name}": value for name, value in parts.items() if value is not None}
    tensors |= {f"model.layers.0.mlp.up_proj.{name}": value for name, value in more.items()}
    planned = {
        name: storage.Planned(kinds[value.dtype.name], value.shape, lambda value=value: [value])
        for name, value in tensors.items()
    }
    storage.write_blocks(folder / "model.safetensors", planned)


def settings(method: str, **changes) -> dict:
    return {"quantization_config": {"quant_method": method, "bits": 4, "group_size": GROUP, **changes}}


@pytest.mark.parametrize("form", ["gptq", "gptq_v2", None])
def test_a_gptq_folder(tmp_path, form):
    parts = gptq_parts(True)
    write(tmp_path, parts, bias=np.zeros(OUT, np.float16))
    found = open_model(tmp_path, settings("gptq", desc_act=True, checkpoint_format=form))
    weight = found.quantised["model.layers.0.mlp.up_proj.weight"]
    assert found.entries.keys() == {"model.layers.0.mlp.up_proj.weight"}  # a bias of zeros is left out
    assert weight.shape == weight.entry.shape == (OUT, IN)
    np.testing.assert_allclose(weight.numbers(), gptq_numbers(*parts.values(), form != "gptq_v2"), rtol=1e-6)


def test_an_awq_folder(tmp_path):
    parts = awq_parts()
    write(tmp_path, parts, bias=np.ones(OUT, np.float16))
    found = open_model(tmp_path, settings("awq", version="gemm", zero_point=True))
    assert "model.layers.0.mlp.up_proj.bias" in found.entries
    wanted = awq_numbers(parts["qweight"], parts["qzeros"], parts["scales"])
    np.testing.assert_allclose(found.quantised["model.layers.0.mlp.up_proj.weight"].numbers(), wanted, rtol=1e-6)


@pytest.mark.parametrize(
    ("method", "changes", "line"),
    [
        ("gptq", {"bits": 8}, "gptq of 8 bits is not supported: 4 bits are"),
        ("gptq", {"group_size": 24}, "groups of 24 do not divide its 64 inputs, or 8 its 24"),
        ("gptq", {"group_size": 32}, ".qzeros is I32 [4, 3], should be I32 [2, 3]"),
        ("gptq", {"group_size": "x"}, "group_size 'x': expects a number of inputs, or -1"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not supported: gptq and gptq_v2 are"),
        ("gptq", {"dynamic": {"+:x": {}}}, "dynamic (settings for single modules) is not supported"),
        ("awq", {"version": "gemv"}, "awq's version 'gemv' with zero_point True is not supported: gemm is"),
        ("awq", {"zero_point": False}, "awq's version 'gemm' with zero_point False is not supported: gemm is"),
        ("aqlm", {}, "but config.json does not say that it is of ('gptq', 'awq')"),
    ],
)
def test_other_layouts_are_refused(tmp_path, method, changes, line):
    write(tmp_path, awq_parts() if method == "awq" else gptq_parts(False))
    with pytest.raises(LoraMsError) as error:
        open_model(tmp_path, settings(method, **changes))
    assert line in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"scales": None}, "up_proj.scales is missing: the folder is not complete"),
        ({"scales": np.full((4, OUT), np.inf, np.float16)}, "a scale is not finite"),
        ({"scales": np.ones((4, OUT), np.float32)}, "up_proj.scales is F32 [4, 24], should be F16 [4, 24]"),
        ({"g_idx": np.zeros(IN, np.int32)}, "g_idx does not name 4 groups of 16 inputs each"),
        ({"g_idx": np.full(IN, -7, np.int32)}, "g_idx does not name 4 groups of 16 inputs each"),
        ({"g_idx": np.zeros(IN - 1, np.int32)}, "up_proj.g_idx is I32 [63], should be I32 [64]"),
        ({"qzeros": words((4, 2))}, "up_proj.qzeros is I32 [4, 2], should be I32 [4, 3]"),
        ({"qweight": words((8,))}, "up_proj.qweight is [8]: expects two sizes"),
    ],
)
def test_parts_that_do_not_fit(tmp_path, changes, line):
    write(tmp_path, {**gptq_parts(False), **changes})
    with pytest.raises(LoraMsError) as error:
        for weight in open_model(tmp_path, settings("gptq")).quantised.values():
            weight.read()
    assert line in str(error.value)


def test_json_is_what_transformers_writes():
    """The keys of a folder as GPTQModel and AutoAWQ write it."""
    from lora_ms.quant.int4_folder import read_groups

    gptq = (
        '{"bits": 4, "group_size": 128, "damp_percent": 0.01, "desc_act": false, "static_groups": false, "sym": true, '
        '"true_sequential": true, "model_name_or_path": null, "model_file_base_name": "model", "quant_method": "gptq"}'
    )
    assert read_groups(json.loads(gptq)) == ("gptq", 128, 1)
    awq = (
        '{"bits": 4, "group_size": 128, "modules_to_not_convert": null, "quant_method": "awq", "version": "gemm", '
        '"zero_point": true}'
    )
    assert read_groups(json.loads(awq)) == ("awq", 128, 0)

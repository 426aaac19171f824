"""NF4 against bitsandbytes' own folders, and by its definition."""

import hashlib
import json

import numpy as np
import pytest

from lora_ms import storage
from lora_ms.quant import folder, nf4

KINDS = pytest.mark.parametrize("kind", ["plain", "double"])


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).standard_normal(shape, np.float32) * 0.02


def by_definition(weight: np.ndarray) -> np.ndarray:
    """The numbers that NF4 has in the place of ``weight``: of each block, the nearest of 16 parts of its largest."""
    flat = weight.reshape(-1).astype(np.float64)
    blocks = [flat[start : start + 64] for start in range(0, flat.size, 64)]
    codes = nf4.CODES.astype(np.float64)
    decoded = [codes[abs(b[:, None] / abs(b).max() - codes).argmin(1)] * abs(b).max() for b in blocks]
    return np.concatenate(decoded).reshape(weight.shape)


@pytest.mark.parametrize("shape", [(4, 64), (6, 48), (5, 26), (3, 3000)])
def test_quantised_is_the_nearest(shape):
    weight = random(*shape)
    np.testing.assert_allclose(nf4.dequantise(nf4.quantise(weight)), by_definition(weight), rtol=1e-6)


def test_the_larger_code_is_the_upper_half_of_a_byte():
    found = nf4.quantise(np.array([[1.0, -1.0, 0.0, 0.5]], np.float32))
    assert found.packed.tolist() == [0xF0, 0x7C]  # 0.44 is nearer to a half than 0.56 is: 0.0593 against 0.0626
    assert found.absmax.tolist() == [1.0]
    assert nf4.dequantise(found).ravel().tolist() == pytest.approx([1, -1, 0, 0.4407098])


def test_a_block_of_zeros_stays_one():
    weight = random(2, 64)
    weight[0] = 0
    for double in (False, True):
        found = nf4.quantise(weight, double)
        assert set(found.packed[:32].tolist()) == {0x77}
        assert not nf4.dequantise(found)[0].any()


def test_double_quantisation_stores_absmax_in_bytes():
    weight = random(300, 640)  # 3,000 blocks: twelve blocks of absmax, the last not full
    plain, double = nf4.quantise(weight), nf4.quantise(weight, double=True)
    np.testing.assert_array_equal(double.packed, plain.packed)
    assert double.absmax.dtype == np.uint8 and double.nested.absmax.shape == (12,)
    # the map's steps are at most a 64th of the largest
    widest = np.repeat(double.nested.absmax, 256)[:3000] / 64
    assert (abs(nf4.plain_absmax(double) - plain.absmax) <= widest).all()
    assert double.nbytes < plain.nbytes - 2 * 3000


@pytest.mark.parametrize(("rows", "columns"), [(slice(2, 4), slice(None)), (slice(None), slice(64, 128))])
@pytest.mark.parametrize("double", [False, True])
def test_a_part_has_the_same_numbers(rows, columns, double):
    whole = nf4.quantise(random(6, 192), double)
    part = nf4.part(whole, rows, columns)
    np.testing.assert_array_equal(nf4.dequantise(part), nf4.dequantise(whole)[rows, columns])


def test_no_part_begins_amid_a_block():
    for shape, columns in (((6, 192), slice(96, 192)), ((6, 96), slice(None))):
        with pytest.raises(ValueError, match="do not begin and end with a block of 64"):
            nf4.part(nf4.quantise(random(*shape)), slice(None), columns)


def test_pieces_do_not_show(monkeypatch):
    weight = random(40, 100)
    whole = nf4.quantise(weight)
    monkeypatch.setattr(nf4, "PIECE", 256)
    pieces = nf4.quantise(weight)
    np.testing.assert_array_equal(pieces.packed, whole.packed)
    np.testing.assert_array_equal(pieces.absmax, whole.absmax)
    np.testing.assert_array_equal(nf4.dequantise(pieces), nf4.dequantise(whole))


# --- folders


@KINDS
def test_bitsandbytes_weights_are_read_to_the_bit(reference, kind):
    stored = folder.split(storage.open_dir(reference / "nf4" / kind))[1]
    digests = json.loads((reference / "nf4" / f"{kind}.json").read_text())
    assert stored.keys() == digests.keys()
    for name, weight in stored.items():
        numbers = nf4.dequantise(weight.read())
        assert numbers.dtype == np.float32
        assert hashlib.sha256(numbers.tobytes()).hexdigest() == digests[name], name


@KINDS
def test_the_same_bytes_are_written(reference, kind, tmp_path):
    """Quantised from the model's weights, every tensor is bitsandbytes', byte for byte but for the nested absmax: the
    map of these depends on the processor in the last bit."""
    theirs = storage.open_dir(reference / "nf4" / kind)
    whole = storage.open_dir(reference / "models" / "qwen2")
    double = kind == "double"
    names = list(folder.split(theirs)[1])
    planned = {}
    for name in names:
        entry = whole[name]
        planned |= folder.planned_nf4(
            name,
            entry.shape,
            "bfloat16",
            double,
            lambda name=name, entry=entry: folder.quantised_entry(name, entry, double),
        )
    storage.write_blocks(tmp_path / "model.safetensors", planned)
    ours = storage.open_dir(tmp_path)
    assert ours.keys() == {key for key in theirs if key.startswith(tuple(names))}
    for key, entry in ours.items():
        found, wanted = storage.read_raw(entry), storage.read_raw(theirs[key])
        if "quant_state" in key:
            one, other = (json.loads(raw.tobytes()) for raw in (found, wanted))
            assert one.pop("nested_offset", 0) == pytest.approx(other.pop("nested_offset", 0), rel=1e-6)
            assert one == other
        elif double and key.endswith(("nested_quant_map", "nested_absmax")):
            found, wanted = found.view(np.float32), wanted.view(np.float32)
            np.testing.assert_allclose(found, wanted, rtol=3e-6, atol=1e-9, err_msg=key)
        elif double and key.endswith(".absmax"):
            assert abs(found.astype(int) - wanted).max() <= 1, key
        else:
            np.testing.assert_array_equal(found, wanted, err_msg=key)


@KINDS
def test_what_is_written_is_read_to_the_bit(kind, tmp_path):
    weight = nf4.quantise(random(24, 96), kind == "double")
    storage.write_blocks(
        tmp_path / "model.safetensors",
        folder.planned_nf4("x.weight", (24, 96), "float16", kind == "double", lambda: weight),
    )
    found = folder.split(storage.open_dir(tmp_path))[1]["x.weight"]
    assert (found.shape, found.entry.shape) == ((24, 96), (24, 96))
    np.testing.assert_array_equal(nf4.dequantise(found.read()), nf4.dequantise(weight))

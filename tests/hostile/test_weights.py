"""safetensors files that contradict themselves, held against the library's own verdict."""

import json
import random

import numpy as np
import pytest
from safetensors import deserialize
from safetensors.numpy import save

from lora_ms.errors import LoraMsError
from lora_ms.storage import read_header

GOOD = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.zeros(4, np.float16),
    "c": np.zeros((0, 5), np.float32),
}


def parts(content: bytes) -> tuple[dict, bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def library_takes(content: bytes) -> bool:
    try:
        deserialize(content)
    except Exception:
        return False
    return True


def error_of(tmp_path, content: bytes) -> str:
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(LoraMsError) as error:
        read_header(file)
    assert str(error.value).startswith(f"{file}: ")
    return str(error.value)


def changed(**keys: object):
    return lambda header: header["a"].update(keys)


CONTRADICTIONS = {
    "before the data": changed(data_offsets=[-8, 16]),
    "into the header": changed(data_offsets=[-24, 0]),
    "backwards": changed(data_offsets=[24, 0]),
    "fractions": changed(data_offsets=[0.5, 24.5]),
    "texts": changed(data_offsets=["0", "24"]),
    "booleans": changed(data_offsets=[False, 24]),
    "one offset": changed(data_offsets=[0]),
    "three offsets": changed(data_offsets=[0, 12, 24]),
    "no offsets": changed(data_offsets=None),
    "beyond the end": changed(data_offsets=[0, 2**40]),
    "beyond 64 bits": changed(data_offsets=[0, 2**64 + 24]),
    "overlap": changed(data_offsets=[8, 32]),
    "the same place": lambda header: header["b"].update(data_offsets=[16, 24]),
    "another type": changed(dtype="F16"),
    "unknown type": changed(dtype="F33"),
    "lower case": changed(dtype="f32"),
    "type as a list": changed(dtype=["F32"]),
    "another shape": changed(shape=[2, 4]),
    "shape of text": changed(shape="ab"),
    "negative shape": changed(shape=[-2, -3]),
    "shape of fractions": changed(shape=[2.0, 3.0]),
    "shape beyond 64 bits": changed(shape=[2**70, 0]),
    "overflowing shape": changed(shape=[2**63, 2, 0]),
    "no shape": lambda header: header["a"].pop("shape"),
    "no type": lambda header: header["a"].pop("dtype"),
    "no entry": lambda header: header.update(a=None),
    "a list": lambda header: header.update(a=[]),
    "hole": lambda header: header.pop("a"),
    "metadata of numbers": lambda header: header.update(__metadata__={"a": 1}),
    "metadata as a list": lambda header: header.update(__metadata__=[]),
    "metadata as text": lambda header: header.update(__metadata__="x"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictions(tmp_path, name):
    header, data = parts(save(GOOD))
    CONTRADICTIONS[name](header)
    content = joined(header, data)
    assert not library_takes(content)
    error_of(tmp_path, content)


HEADERS = {
    "minus zero": lambda text: text.replace(b"[0,", b"[-0,", 1),
    "NaN": lambda text: text.replace(b"[0,", b"[NaN,", 1),
    "with a mark of order": lambda text: b"\xef\xbb\xbf" + text,
    "two values": lambda text: text.strip() + b"{}",
    "zeros behind": lambda text: text.strip() + b"\0" * 8,
    "half a surrogate": lambda text: text.replace(b'"a"', b'"\\ud800"', 1),
    "not UTF-8": lambda text: text.replace(b'"a"', b'"\xff"', 1),
    "UTF-16": lambda text: text.decode().encode("utf-16"),
    "a list": lambda text: b"[" + text.strip() + b"]",
    "key twice": lambda text: text.replace(b'"dtype":"F32"', b'"dtype":"F32","dtype":"F32"', 1),
    "nested": lambda text: b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "empty": lambda text: b"",
    "comment": lambda text: text.strip()[:-1] + b"/**/}",
    "comma behind": lambda text: text.strip()[:-1] + b",}",
    "control character": lambda text: text.replace(b'"a"', b'"a\n"', 1),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers(tmp_path, name):
    content = save(GOOD)
    length = int.from_bytes(content[:8], "little")
    spoilt = joined(HEADERS[name](content[8 : 8 + length]), content[8 + length :])
    assert not library_takes(spoilt)
    error_of(tmp_path, spoilt)


def test_what_the_library_takes_and_we_refuse(tmp_path):
    header, data = parts(save(GOOD))
    text = json.dumps(header)
    entry = json.dumps(header["a"])
    assert "stands twice" in error_of(tmp_path, joined(f'{{"a": {entry}, {text[1:]}'.encode(), data))
    header["a" * 1001] = header.pop("a")
    assert "a name of 1,001 characters" in error_of(tmp_path, joined(header, data))
    header, data = parts(save(GOOD))
    header["c"]["shape"] = [0] * 33
    assert "33 axes" in error_of(tmp_path, joined(header, data))
    assert "no JSON object" in error_of(tmp_path, joined(b" " + json.dumps(parts(save(GOOD))[0]).encode(), data))


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"", "the header"),
        (b"\x08\0\0\0", "the header reaches beyond"),
        (b"\xff" * 8, "a header of 18,446,744,073,709,551,615 bytes: at most 100,000,000 are read"),
        ((100_000_001).to_bytes(8, "little"), "a header of 100,000,001 bytes"),
        ((1000).to_bytes(8, "little") + b"{}", "the header reaches beyond the end of the file"),
        (save(GOOD)[:-1], "truncated: b ends at byte"),
        (save(GOOD) + b"\0", "the tensors end at byte"),
    ],
    ids=range(7),
)
def test_lengths(tmp_path, content, wanted):
    assert not library_takes(content)
    assert wanted in error_of(tmp_path, content)


def test_good_files_are_read(tmp_path):
    file = tmp_path / "x.safetensors"
    for tensors in ({}, GOOD, {"": np.zeros((), np.float32)}):
        file.write_bytes(save(tensors, metadata={"format": "pt"}))
        assert {name: entry.shape for name, entry in read_header(file).items()} == {
            n: t.shape for n, t in tensors.items()
        }
    header, data = parts(save(GOOD))
    file.write_bytes(joined(json.dumps(header | {"__metadata__": None}).encode() + b" \n", data))
    assert read_header(file).keys() == GOOD.keys()


def test_no_file_that_the_library_refuses_is_read(tmp_path):
    """Numbers of a header exchanged at random: some hundred files that the library takes, and many that it does not."""
    rng = random.Random(5)
    header, data = parts(save(GOOD))
    numbers = [0, 1, 2, 3, 4, 5, 6, 8, 16, 24, 25, 32, 33, 2**31, 2**63, 2**64, -1, 1.0]
    taken = 0
    for _ in range(3000):
        found = json.loads(json.dumps(header))
        for _ in range(rng.choice((1, 1, 2, 3))):
            entry = found[rng.choice("abc")]
            values = entry[rng.choice(("shape", "data_offsets"))]
            place = rng.randrange(len(values) + 1)
            values[place : place + rng.choice((0, 1, 1, 1))] = [rng.choice(numbers)]
            entry["dtype"] = rng.choice((entry["dtype"], entry["dtype"], "F16", "F32", "BF16", "F64", "BOOL", "F4"))
        content = joined(found, data[: rng.choice((len(data), len(data), 24))])
        (tmp_path / "x").write_bytes(content)
        try:
            read_header(tmp_path / "x")
        except LoraMsError:
            huge = any(str(number).encode() in content for number in (2**31, 2**63))  # beyond NumPy's arrays
            assert huge or not library_takes(content)
            continue
        taken += 1
        assert library_takes(content)
    assert taken > 30

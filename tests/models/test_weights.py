"""Where weights lie in memory, and reading them before they are asked for."""

import time

import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_ms import storage, weights
from lora_ms.config import load_config
from lora_ms.recipes import reading_ahead
from lora_ms.storage import Entry
from lora_ms.weights import BLOCK, LARGE, LINE, WeightMemory, WeightsAhead


def test_arrays_lie_apart_and_begin_with_a_line():
    memory = WeightMemory()
    shapes = [(3, 5), (7,), (1,), (4, 4)]
    arrays = [memory.take(shape, kind) for kind in (np.float32, np.float16, np.uint8) for shape in shapes]
    for number, array in enumerate(arrays):
        array[...] = number
    for number, array in enumerate(arrays):
        assert array.ctypes.data % LINE == 0 and (array == number).all()


def test_blocks_follow_one_another_and_vectors_and_large_arrays_have_their_own():
    memory = WeightMemory()
    shapes = [(1024, 512)] * (BLOCK // (1024 * 512 * 4)) + [(LARGE // 8, 8), (7,), (1024, 512), (3, 3)]
    arrays = [memory.take(shape, np.float32) for shape in shapes]
    for number, array in enumerate(arrays):
        array[...] = number
    for number, array in enumerate(arrays):
        assert array.ctypes.data % LINE == 0 and (array == number).all()
    owners = [id(owner_of(array)) for array in arrays]
    block, large, vector, next_block, small = *{*owners[:-4]}, *owners[-4:]
    assert len({block, large, vector, next_block}) == 4 and small == next_block


def owner_of(array: np.ndarray) -> np.ndarray:
    """The array whose memory it has."""
    return array if array.base is None else owner_of(array.base)


@pytest.fixture
def entries(tmp_path) -> dict[str, Entry]:
    rng = np.random.default_rng(0)
    tensors = {f"w{i}": rng.normal(size=(i + 1, 6)).astype(np.float16) for i in range(20)}
    save_file(tensors, tmp_path / "model.safetensors")
    return storage.open_dir(tmp_path)


def test_what_is_read_ahead_is_what_is_read(entries):
    ahead = WeightsAhead(entries.values(), np.float32)
    for entry in reversed(entries.values()):  # some were read, some are asked for before
        np.testing.assert_array_equal(ahead.take(entry), storage.read(entry, np.float32))
    assert ahead.size == 0
    assert all(ahead.take(entry) is None for entry in entries.values())


def test_what_nobody_asked_for_is_counted_and_forgotten(entries):
    weights.read_ahead(entries.values(), np.float32)
    wanted = 4 * sum(6 * (i + 1) for i in range(20))
    end = time.monotonic() + 30
    while weights.size_ahead() < wanted and time.monotonic() < end:
        time.sleep(0.01)
    assert weights.size_ahead() == wanted
    weights.forget_ahead()
    assert weights.size_ahead() == 0


def test_another_type_is_read_from_the_file(entries):
    weights.read_ahead(entries.values(), np.float32)
    entry = entries["w3"]
    found = weights.read(entry, np.float16, WeightMemory())
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, storage.read(entry, np.float16))
    weights.forget_ahead()


def test_a_fault_is_raised_where_the_tensor_is_asked_for(entries):
    beyond = replace_end(entries["w19"])
    ahead = WeightsAhead([entries["w0"], beyond, entries["w1"]], np.float32)
    with pytest.raises((ValueError, OSError)):
        ahead.take(beyond)
    for name in ("w0", "w1"):
        np.testing.assert_array_equal(ahead.take(entries[name]), storage.read(entries[name], np.float32))


def replace_end(entry: Entry) -> Entry:
    """The tensor with more rows than the file has."""
    return entry._replace(shape=(10**6, *entry.shape[1:]))


@pytest.fixture
def begun(monkeypatch) -> list:
    """The calls of ``read_ahead``."""
    found: list = []
    monkeypatch.setattr(weights, "read_ahead", lambda entries, dtype: found.append((len(list(entries)), dtype)))
    return found


def config_of(model, *flags):
    return load_config(None, flags={"load_checkpoint": str(model), "run_mode": "finetune"}, free_form=list(flags))


def test_a_run_reads_its_model_ahead(reference, begun):
    config = config_of(reference / "models" / "qwen2")
    reading_ahead.begin(config, "finetune")
    assert [dtype for _, dtype in begun] == [np.float32]
    reading_ahead.begin(config, "estimate")
    assert len(begun) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"load_checkpoint": ""},
        {"load_checkpoint": "/nowhere"},
        {"backend": "mindformers"},
        {"use_parallel": True},
    ],
    ids=["no model", "no folder", "another's model", "several processes"],
)
def test_a_run_that_does_not_begin_with_the_whole_model_reads_nothing(reference, begun, change):
    reading_ahead.begin(config_of(reference / "models" / "qwen2").model_copy(update=change), "finetune")
    assert begun == []


def test_a_model_that_does_not_fit_is_not_read_ahead(reference, begun, monkeypatch):
    monkeypatch.setattr(reading_ahead.host, "available", lambda: 0.0)
    reading_ahead.begin(config_of(reference / "models" / "qwen2"), "finetune")
    assert begun == []

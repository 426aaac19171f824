"""NEFTune: how large the noise is, where it is, and where it is not."""

import numpy as np
import pytest
from mindspore import Tensor, set_seed

from lora_ms.adapters.inject import inject
from lora_ms.adapters.methods.lora import LoraConfig
from lora_ms.models.hub import load_directory
from lora_ms.nn.noise import EmbeddingNoise, NoisyEmbedding

pytestmark = pytest.mark.usefixtures("graph_mode")
IDS = np.arange(96, dtype=np.int32)


@pytest.fixture
def decoder(reference):
    return load_directory(reference / "models" / "qwen2").model


def drawn(decoder, seed: int, alpha: float = 5.0, line: int = 24) -> list[np.ndarray]:
    """The noise [96, 64] of two calls, lines of 24 tokens."""
    set_seed(seed)
    noise = EmbeddingNoise(decoder, alpha)
    clean = decoder.embed_tokens(Tensor(IDS)).asnumpy()
    with noise.on(line):
        cell = decoder.embed_tokens
        return [cell(Tensor(IDS)).asnumpy() - clean for _ in range(2)]


def test_noise_is_uniform_and_as_large_as_the_formula_says(decoder):
    size = 5.0 / np.sqrt(24 * 64)
    for noise in drawn(decoder, 0):
        values = np.sort(noise.ravel()) / size
        assert -1.00001 <= values[0] < -0.995 and 0.995 < values[-1] <= 1.00001
        # the distribution function of 6144 draws is within 0.03 of the straight line with a probability beyond 0.9999
        np.testing.assert_allclose(np.linspace(-1, 1, len(values)), values, rtol=0, atol=0.06)
        columns, rows = (np.corrcoef(noise, rowvar=by_row) for by_row in (False, True))
        for matrix in (columns, rows):
            assert np.abs(matrix[~np.eye(len(matrix), dtype=bool)]).mean() < 0.15


def test_an_adapter_on_the_embedding_gets_noise_too(reference):
    model = load_directory(reference / "models" / "qwen2")
    inject(model, LoraConfig(2, target_modules=("embed_tokens",)))
    first, _ = drawn(model.model, 3)
    assert 0 < np.abs(first).max() <= 5.00001 / np.sqrt(24 * 64)


def test_the_seed_alone_decides(decoder):
    first, again, other = drawn(decoder, 3), drawn(decoder, 3), drawn(decoder, 4)
    for one, two in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, two)
    assert np.abs(first[0] - first[1]).mean() > 0.01  # every call draws anew
    assert np.abs(first[0] - other[0]).mean() > 0.01


def test_the_plain_embedding_is_back_after_the_step(decoder):
    plain = decoder.embed_tokens
    names = [(name, p.name) for name, p in decoder.parameters_and_names()]
    noise = EmbeddingNoise(decoder, 5.0)
    with pytest.raises(ZeroDivisionError), noise.on(16):
        assert isinstance(decoder.embed_tokens, NoisyEmbedding)
        assert {p.name for p in decoder.get_parameters()} >= {p.name for p in plain.get_parameters()}
        raise ZeroDivisionError
    assert decoder.embed_tokens is plain
    assert [(name, p.name) for name, p in decoder.parameters_and_names()] == names


def test_a_run_with_noise(train, plain_run, tmp_path):
    first, again = (train(tmp_path / name, neftune_noise_alpha=5.0, save_steps=3, max_steps=3) for name in "12")
    assert first.records == again.records
    assert sorted(first.adapter) == sorted(plain_run.adapter)
    for name, value in first.adapter.items():
        np.testing.assert_array_equal(again.adapter[name], value, err_msg=name)
    # noise moves the loss of the very first step, before anything is trained
    assert 1e-4 < abs(first.losses[0] - plain_run.losses[0]) < 0.5
    assert abs(train(tmp_path / "3", max_steps=1).losses[0] - plain_run.losses[0]) < 1e-6

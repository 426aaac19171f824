"""Weights in bfloat16: two bytes a number, and the arithmetic of float32 unless products are asked to round."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from lora_ms.adapters.inject import inject
from lora_ms.adapters.merge import merge
from lora_ms.adapters.methods.lora import LoraConfig
from lora_ms.config import load_config
from lora_ms.errors import LoraMsError
from lora_ms.infer.generate import Generator
from lora_ms.infer.sampling import Sampling
from lora_ms.models.hub import NUMPY_DTYPES, load_directory, save_directory
from lora_ms.ops import PORTABLE, select
from lora_ms.recipes.model import compute_dtype
from lora_ms.runtime import native_build
from lora_ms.runtime.device import Runtime, setup

IDS = np.random.default_rng(0).integers(0, 128, (2, 24)).astype(np.int32)


@pytest.fixture(scope="module", params=["llama3", "qwen2", "qwen3"])
def folder(request, reference, tmp_path_factory):
    """A model's folder whose numbers are bfloat16."""
    folder = tmp_path_factory.mktemp("bfloat16") / request.param
    whole = load_directory(reference / "models" / request.param)
    save_directory(whole, folder, np.dtype(NUMPY_DTYPES[ms.bfloat16]))
    return folder


def logits(model) -> np.ndarray:
    return model(Tensor(IDS)).asnumpy()


@pytest.fixture(scope="module")
def library() -> str:
    library, why = native_build.build()
    assert library is not None, why
    return str(library)


def test_logits_are_those_of_the_widened_weights(folder, library):
    operators = select("CPU", library=library)
    model = load_directory(folder, ms.bfloat16, operators=operators)
    for name, parameter in model.parameters_and_names():  # norms and biases are vectors
        assert parameter.dtype == (ms.bfloat16 if parameter.ndim == 2 else ms.float32), name
    np.testing.assert_allclose(logits(model), logits(load_directory(folder, operators=operators)), atol=1e-5)


def test_rounded_products_are_near(folder, library):
    """Each factor of a product moves by at most 2^-9 of its size, and at the end of all the layers the logits by less
    than 2^-6 of theirs."""
    exact = logits(load_directory(folder, ms.bfloat16, operators=select("CPU", library=library)))
    near = logits(load_directory(folder, ms.bfloat16, operators=select("CPU", library=library, bfloat16=True)))
    moved = np.linalg.norm(near - exact) / np.linalg.norm(exact)
    assert moved < 2**-6
    assert (moved > 1e-5) == native_build.rounds_to_bfloat16(library)


def test_a_model_is_saved_as_it_was_read(folder, library, tmp_path, raw_tensors):
    model = load_directory(folder, ms.bfloat16, operators=select("CPU", library=library))
    save_directory(model, tmp_path / "again", np.dtype(NUMPY_DTYPES[ms.bfloat16]))
    before, after = raw_tensors(folder), raw_tensors(tmp_path / "again")
    assert before.keys() == after.keys()
    for name, values in before.items():
        np.testing.assert_array_equal(values, after[name], err_msg=name)


def test_without_a_compiler_bfloat16_is_refused(folder):
    with pytest.raises(LoraMsError, match="weights in bfloat16 need a C\\+\\+ compiler"):
        load_directory(folder, ms.bfloat16, operators=PORTABLE)


def test_a_processor_without_the_instructions_is_named(monkeypatch):
    monkeypatch.setattr(native_build, "rounds_to_bfloat16", lambda library: False)
    _, notices = setup("CPU", bfloat16=True)
    assert any("this processor cannot multiply in it" in line for line in notices)


def test_a_token_that_is_none_of_the_model_stops_it(folder, library):
    model = load_directory(folder, ms.bfloat16, operators=select("CPU", library=library))
    with pytest.raises(RuntimeError, match="embedding"):
        model(Tensor(np.full((2, 24), 128, np.int32))).asnumpy()


@pytest.mark.parametrize("operators, wanted", [(PORTABLE, ms.float32), (select("CPU", library="any"), ms.bfloat16)])
def test_the_type_that_a_yaml_asks_for(operators, wanted, capsys):
    config = load_config(None, options=["model.model_config.compute_dtype=bfloat16"])
    assert compute_dtype(config, Runtime("CPU", operators=operators)) == wanted
    assert ("needs a C++ compiler" in capsys.readouterr().out) == (wanted == ms.float32)


def test_answers_are_those_of_the_widened_weights(folder, library):
    """qwen2's head is its embedding."""
    operators = select("CPU", library=library)
    rows = [IDS[0, :7].tolist(), IDS[1, :3].tolist()]
    answers = []
    for dtype in (ms.bfloat16, ms.float32):
        model = load_directory(folder, dtype, operators=operators)
        answers.append(Generator(model).generate(rows, [6, 6], Sampling(), ()))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("target", ["embed_tokens", "q_proj"])
def test_an_adapter_on_such_weights_is_merged(folder, library, target):
    model = load_directory(folder, ms.bfloat16, operators=select("CPU", library=library))
    inject(model, LoraConfig(4, 8.0, 0.0, [target]))
    rng = np.random.default_rng(0)
    for name, parameter in model.parameters_and_names():
        if "lora" in name:
            parameter.set_data(Tensor(0.05 * rng.standard_normal(parameter.shape).astype(np.float32)))
    adapted = logits(model)
    merge(model)
    assert np.linalg.norm(logits(model) - adapted) < 2**-6 * np.linalg.norm(adapted)  # the sums are rounded

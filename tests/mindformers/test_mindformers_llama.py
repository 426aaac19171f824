"""Logits and checkpoints of our decoder against MindFormers' ``LlamaForCausalLM``."""

import mindspore as ms
import pytest
from mindspore import Tensor
from numpy.testing import assert_allclose, assert_array_equal

from lora_ms.models.hub import load_checkpoint

pytestmark = pytest.mark.mindformers


def test_logits(base, golden):
    input_ids = Tensor(golden["input_ids"])
    theirs = base.theirs(input_ids)[0].asnumpy()
    assert_allclose(theirs, golden["logits"], rtol=0, atol=1e-4)  # else their model was set up wrongly here
    assert_allclose(base.ours(input_ids).asnumpy(), theirs, rtol=0, atol=1e-4)


def test_logits_of_rows_padded_on_the_right(base, golden):
    input_ids, mask = golden["right_input_ids"], golden["right_attention_mask"]
    assert ((input_ids != 0) == (mask == 1)).all()  # MindFormers takes the mask from the padding's id
    theirs = base.theirs(Tensor(input_ids))[0].asnumpy()
    ours = base.ours(Tensor(input_ids), Tensor(mask)).asnumpy()
    assert_allclose(ours[mask == 1], theirs[mask == 1], rtol=0, atol=1e-4)


def test_checkpoints_that_mindformers_wrote(base, golden, tmp_path):
    weights = {name: p.asnumpy() for name, p in base.ours.parameters_and_names()}
    for form in ("safetensors", "ckpt"):
        file = tmp_path / f"model.{form}"
        ms.save_checkpoint(base.theirs, str(file), format=form)
        loaded = load_checkpoint(file, base.ours.config).set_train(False)
        found = {name: p.asnumpy() for name, p in loaded.parameters_and_names()}
        assert set(found) == set(weights)
        for name, value in found.items():
            assert_array_equal(value, weights[name], f"{form}: {name}")
    theirs = base.theirs(Tensor(golden["input_ids"]))[0].asnumpy()
    assert_allclose(loaded(Tensor(golden["input_ids"])).asnumpy(), theirs, rtol=0, atol=1e-4)

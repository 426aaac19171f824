"""Activations computed again: the same numbers, with dropout, with a tied head, in any choice of layers."""

import numpy as np
import pytest

from lora_ms.errors import LoraMsError
from lora_ms.train.recompute import LayerGradients, recomputed_layers


@pytest.mark.parametrize(
    ("recompute", "layers"), [(True, [0, 1, 2]), (False, []), (0, []), (2, [0, 1]), ([0, 2], [0, 2])]
)
def test_layers_that_are_meant(recompute, layers):
    assert recomputed_layers(recompute, 3) == layers


@pytest.mark.parametrize("recompute", [4, [0, 3]])
def test_a_layer_that_is_not_there(recompute):
    with pytest.raises(LoraMsError, match="3 layers"):
        recomputed_layers(recompute, 3)


def test_dropout_meets_the_same_zeros(train, tmp_path):
    kept = train(tmp_path / "kept", dropout=0.3, max_steps=3)
    again = train(tmp_path / "again", dropout=0.3, max_steps=3, recompute=True)
    np.testing.assert_allclose(again.losses, kept.losses, rtol=1e-6)
    np.testing.assert_allclose(*([r["grad_norm"] for r in run.records] for run in (again, kept)), rtol=1e-5)


@pytest.mark.parametrize("trained", ["everything", "the upper layer"])
def test_gradients_of_a_tied_model(graph_mode, trained):
    """Each part of the model trained, the first layer alone computed again; or nothing below the last layer."""
    import mindspore as ms
    from mindspore import Parameter, Tensor, ops

    from lora_ms.models.decoder import DecoderConfig
    from lora_ms.models.hub import new_model
    from lora_ms.train.step import SummedLoss

    count = 2
    sizes = DecoderConfig(40, 16, 24, count, 4, 2, 4, 1e-6, 1e4, tie_word_embeddings=True, attention_bias=True)
    model = new_model(sizes, ms.float32, 0)
    for name, parameter in model.parameters_and_names():
        parameter.requires_grad = trained == "everything" or f"layers.{count - 1}." in name
    params = ms.ParameterTuple([p for p in model.get_parameters() if p.requires_grad])
    loss = SummedLoss(model, model.config.vocab_size).set_train()
    rng = np.random.default_rng(0)
    ids = rng.integers(0, model.config.vocab_size, (2, 8)).astype(np.int32)
    batch = (ids, np.tile(np.arange(8, dtype=np.int32), (2, 1)), np.arange(16, dtype=np.int32)[::2], ids.ravel()[1::2])
    batch = [Tensor(value) for value in batch]
    wanted, expected = ops.value_and_grad(loss, None, params)(*batch)
    scale = Parameter(Tensor(2.0, ms.float32), name="scale", requires_grad=False)
    found, gradients = LayerGradients(loss, params, scale, [0])(*batch)
    np.testing.assert_allclose(found.asnumpy(), wanted.asnumpy(), rtol=1e-6)
    assert len(gradients) == len(expected) > 0
    for parameter, here, there in zip(params, gradients, expected, strict=True):
        assert np.abs(there.asnumpy()).max() > 0, parameter.name
        np.testing.assert_allclose(here.asnumpy(), 2 * there.asnumpy(), rtol=1e-4, atol=1e-6, err_msg=parameter.name)

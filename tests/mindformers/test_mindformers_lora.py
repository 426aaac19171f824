"""Logits, loss and gradients with adapters against MindFormers' Llama under MindPet's LoRA."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from numpy.testing import assert_allclose

from lora_ms.data.example import TokenRow
from lora_ms.data.mindrecord import write_mindrecord
from lora_ms.train.parts import SummedLoss

pytestmark = pytest.mark.mindformers

PROMPTS, LENGTHS = (3, 1, 4), (13, 9, 6)  # ids of three rows of 13, of which the last is only a target


@pytest.fixture(scope="module")
def rows() -> tuple[np.ndarray, np.ndarray]:
    """ids, and labels at their own token's place: -100 on prompt and padding."""
    ids = np.random.default_rng(1).integers(4, 128, (3, 13)).astype(np.int32)
    labels = ids.copy()
    for row, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        ids[row, length:] = 0
        labels[row, length:] = labels[row, :prompt] = -100
    return ids, labels


def test_logits(base, lora, golden):
    input_ids = Tensor(golden["input_ids"])
    theirs = lora.theirs.set_train(False)(input_ids)[0].asnumpy()
    ours = lora.ours.set_train(False)(input_ids).asnumpy()
    assert np.abs(theirs - golden["logits"]).mean() > 0.1  # the adapter speaks
    assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def test_loss_and_gradients(lora, rows):
    ids, labels = rows
    our_factors, their_factors = zip(*lora.factors.values(), strict=True)

    # MindFormers: mean over the labels; it drops the last id and shifts the labels itself
    their_step = ms.value_and_grad(lora.theirs.set_train(), None, list(their_factors))
    their_loss, their_grads = their_step(Tensor(ids), Tensor(labels))

    # ours: sum over the labels, shifted before
    targets = labels[:, 1:].reshape(-1)
    index = np.flatnonzero(targets != -100).astype(np.int32)
    assert index.size == sum(LENGTHS) - sum(PROMPTS)
    loss = SummedLoss(lora.ours, lora.ours.config.vocab_size).set_train()
    our_step = ms.value_and_grad(loss, None, list(our_factors))
    positions = np.tile(np.arange(ids.shape[1] - 1, dtype=np.int32), (len(ids), 1))
    our_loss, our_grads = our_step(Tensor(ids[:, :-1]), Tensor(positions), Tensor(index), Tensor(targets[index]))

    assert_allclose(our_loss.asnumpy() / index.size, their_loss.asnumpy().item(), rtol=0, atol=1e-4)
    assert len(our_grads) == len(their_grads) == 16  # A and B of four projections in two layers
    for name, ours, theirs in zip(lora.factors, our_grads, their_grads, strict=True):
        expected = theirs.asnumpy()
        largest = np.abs(expected).max()
        assert largest > 1e-4, name
        assert_allclose(ours.asnumpy() / index.size, expected, rtol=0, atol=1e-4 * largest, err_msg=name)


def test_mindformers_trains_on_our_files(lora, rows, tmp_path):
    """A file in its convention, read by MindDataset, gives the loss that the rows themselves give."""
    import mindspore.dataset as ds

    ids, labels = rows
    whole = [TokenRow("", ids[i, :n], labels[i, :n]) for i, n in enumerate(LENGTHS)]
    write_mindrecord(tmp_path / "rows.mindrecord", whole, ids.shape[1], pad_id=0)
    dataset = ds.MindDataset(str(tmp_path / "rows.mindrecord"), ["input_ids", "labels"], shuffle=False).batch(3)
    (found,) = dataset.create_tuple_iterator(num_epochs=1)
    model = lora.theirs.set_train()
    assert_allclose(model(*found).asnumpy(), model(Tensor(ids), Tensor(labels)).asnumpy(), rtol=1e-6)

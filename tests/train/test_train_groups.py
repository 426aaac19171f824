"""Learning rates and weight decay of their own for some parameters."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor

from lora_ms.errors import LoraMsError
from lora_ms.train.groups import Group, assign, describe, kind_of, rates_and_decays
from lora_ms.train.optimizer import FlatAdamW

Q = "model.layers.0.self_attn.q_proj"
NAMES = [f"{Q}.lora_a", f"{Q}.lora_b", f"{Q}.bias", "model.norm.weight", "lm_head.weight", "lm_head.lora_a"]


def test_kinds():
    assert [kind_of(name) for name in NAMES] == ["adapters", "adapters", "base", "base", "head", "adapters"]


def test_the_first_group_that_fits_counts():
    groups = [Group(r".*\.lora_b", 1.0), Group("adapters", 2.0), Group("base", 3.0)]
    found = [None if group is None else group.learning_rate for group in assign(NAMES, groups)]
    assert found == [2.0, 1.0, 3.0, 3.0, None, 2.0]
    params = {name: Parameter(Tensor(np.zeros((2, 3), np.float32)), name=name) for name in NAMES}
    groups = [Group("adapters", 2e-4), Group("head", None, 0.5)]
    rates, decays = rates_and_decays(params, groups, 1e-5, 0.1)
    assert rates == pytest.approx([20, 20, 1, 1, 1, 20])
    assert decays == [0.1, 0.1, 0.1, 0.1, 0.5, 0.1]
    assert describe(params, groups, 1e-5, 0.1) == [
        "optimizer: adapters: 18 numbers, learning rate 0.0002, weight decay 0.1",
        "optimizer: head: 6 numbers, learning rate 1e-05, weight decay 0.5",
        "optimizer: the rest: 12 numbers, learning rate 1e-05, weight decay 0.1",
    ]


def test_a_group_of_nothing_is_an_error():
    for groups in ([Group("lora_a", 1.0)], [Group("adapters"), Group(r".*lora_b", 1.0)]):  # whole names; none left
        with pytest.raises(LoraMsError) as caught:
            assign(NAMES, groups)
        assert str(caught.value) == (
            f"optimizer.groups: params {groups[-1].params!r} matches no trainable parameter outside the "
            f"earlier groups; trainable: adapters, head, base (such as {NAMES[0]})"
        )
    with pytest.raises(LoraMsError, match="learning_rate is 0: set it above 0"):
        rates_and_decays({}, [Group("adapters", 1.0)], 0.0, 0.0)


def test_rates_and_decays_against_float64(native):
    """w and v at rates and decays of their own, b of one dimension never decays."""
    beta1, beta2, eps, shapes = 0.8, 0.95, 1e-6, {"w": (3, 2), "b": (4,), "v": (2, 2)}
    rng = np.random.default_rng(0)
    values = [rng.standard_normal(shape, np.float32) for shape in shapes.values()]
    params = {name: Parameter(Tensor(v), name=name) for name, v in zip(shapes, values, strict=True)}
    rates, decays = rates_and_decays(params, [Group("w", 0.02, 0.3), Group("b", 0.005, 0.7)], 0.01, 0.1)
    optimizer = FlatAdamW(
        list(params.values()),
        betas=(beta1, beta2),
        eps=eps,
        weight_decay=decays,
        rate_factors=rates,
        max_grad_norm=None,
        operators=native,
    )
    spread = [6, 4, 4]
    rate, decay = np.repeat([0.02, 0.005, 0.01], spread), np.repeat([0.3, 0.0, 0.1], spread)
    x = np.concatenate([v.ravel() for v in values]).astype(np.float64)
    m, v = np.zeros(14), np.zeros(14)
    for number, share in enumerate([1.0, 0.5, 2.0], start=1):  # of the schedule, whose rate is 0.01
        g = np.random.default_rng(number).standard_normal(14)
        optimizer.grad.set_data(Tensor(g.astype(np.float32)))
        optimizer(Tensor(0.01 * share, ms.float32), Tensor(1.0, ms.float32))
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        update = (m / (1 - beta1**number)) / (np.sqrt(v / (1 - beta2**number)) + eps)
        x = x - rate * share * (decay * x + update)
        found = np.concatenate([p.asnumpy().ravel() for p in optimizer.params])
        np.testing.assert_allclose(found, x, rtol=0, atol=2e-6)


def test_a_run_keeps_to_its_groups(train, tmp_path, capsys):
    """AdamW's first step moves every number with a gradient by its rate, whatever the gradient."""
    seen = {}

    def free(model):
        trained = {
            name: p for name, p in model.parameters_and_names() if name in ("lm_head.weight", "model.norm.weight")
        }
        for p in trained.values():
            p.requires_grad = True
        seen.update({name: (p, p.asnumpy().copy()) for name, p in model.parameters_and_names() if p.requires_grad})

    groups = (Group("adapters", 2e-3), Group("head", 1e-3, 0.5), Group(r"model\.norm\.weight", 1e-5))
    steps = {"max_steps": 1, "warmup_steps": 0, "schedule_steps": 8, "save_steps": 1, "name": "llama2"}
    train(tmp_path, prepare=free, groups=groups, loraplus_lr_ratio=4.0, **steps)
    assert {"lm_head.weight", "model.norm.weight"} < set(seen)
    for name, (parameter, before) in seen.items():
        leaf = name.rpartition(".")[2]
        # a rate of the group, times LoRA+'s 4 for B and what has one dimension; the run's own decay is 0.1
        rate, decay = {"lora_a": (2e-3, 0.1), "lora_b": (8e-3, 0.1)}.get(leaf, (0, 0))
        rate, decay = {"lm_head.weight": (1e-3, 0.5), "model.norm.weight": (4e-5, 0.0)}.get(name, (rate, decay))
        moved = parameter.asnumpy().astype(np.float64) - before.astype(np.float64) * (1 - rate * decay)
        wanted = 0 if leaf == "lora_a" else rate  # A's gradient is 0 while B is
        assert np.abs(moved).max() == pytest.approx(wanted, rel=2e-3, abs=1e-7), name
    assert "optimizer: head: " in capsys.readouterr().out
    with pytest.raises(
        LoraMsError, match=r"other settings: groups: \[\['adapters', 0.002, None\], .*\]\] there, \[\] here"
    ):
        train(tmp_path, prepare=free, loraplus_lr_ratio=4.0, resume=True, **steps)

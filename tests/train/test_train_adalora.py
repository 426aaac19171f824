"""AdaLoRA's schedule, its choice of triplets, and the plain LoRA made of what it reached."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from mindspore import Tensor

from lora_ms.adapters.inject import adapted_layers, freeze, inject
from lora_ms.adapters.methods.adalora import AdaLoraConfig, best, triplet_scores
from lora_ms.adapters.methods.adalora_cells import Orthogonality, RankAllocator, Span
from lora_ms.adapters.peft_format import load_adapter, save_adapter, save_as_lora, stored_tensors
from lora_ms.errors import LoraMsError
from lora_ms.models.hub import load_directory

TRACE = AdaLoraConfig(4, 4, target_rank=2, tinit=2, tfinal=3, delta_t=2, total_steps=12)


def test_the_budget_is_pefts(golden):
    wanted = golden("trace_adalora_qwen2")["budget"].tolist()
    assert [TRACE.budget(6, step) for step in range(12)] == wanted
    assert [step for step in range(12) if TRACE.is_cut(step)] == [4, 6, 8, 9]


@pytest.mark.parametrize(
    ("total", "tinit", "tfinal", "found"),
    [(100, None, None, (10, 30)), (8, None, None, (0, 2)), (3, None, None, (0, 1)), (100, 5, None, (5, 30)),
     (100, None, 1, (10, 1)), (100, 40, 59, (40, 59))],
)  # fmt: skip
def test_shares_of_the_run(total, tinit, tfinal, found):
    config = AdaLoraConfig(4, 4, target_rank=2, tinit=tinit, tfinal=tfinal).for_run(total)
    assert (config.tinit, config.tfinal, config.total_steps) == (*found, total)
    assert config.budget(5, config.last_cut) == 10 and config.is_cut(config.last_cut)


@pytest.mark.parametrize(("total", "tinit", "tfinal"), [(10, 5, 5), (1, None, None), (4, 9, None)])
def test_a_run_too_short_to_cut(total, tinit, tfinal):
    with pytest.raises(LoraMsError, match=rf"leave no step of {total} for ranks to fall in"):
        AdaLoraConfig(4, 4, target_rank=2, tinit=tinit, tfinal=tfinal).for_run(total)


def test_triplets_are_scored_by_hand():
    a = np.array([[1.0, 3.0], [0.0, 2.0]], np.float32)  # rank 2, in 2
    b = np.array([[3.0, 0.0], [0.0, 6.0], [0.0, 0.0]], np.float32)  # out 3
    np.testing.assert_allclose(triplet_scores(a, b, np.array([[10.0], [20.0]], np.float32)), [13, 23])


@pytest.mark.parametrize(
    ("scores", "number", "kept"),
    [([1, 3, 2], 2, "011"), ([1, 1, 1, 1], 2, "1100"), ([0, 0, 5], 1, "001"), ([2, 1], 2, "11"), ([2, 2, 1], 1, "100")],
)
def test_the_budget_is_exact_even_among_equals(scores, number, kept):
    assert best(np.array(scores, np.float32), number).tolist() == [flag == "1" for flag in kept]


def test_orthogonality_against_its_definition_and_its_differences(graph_mode, numerical_gradient):
    """Two modules, of which the second is larger; numbers before, between and after them take no part."""
    rng, spans, start = np.random.default_rng(5), [], 3
    for shape in ((2, 5), (4, 2), (2, 5), (6, 2), (3, 4), (4, 3)):
        spans.append(Span(start, shape))
        start = spans[-1].stop + 2
    flat, a, b = rng.standard_normal(start + 1).astype(np.float32), spans[0::2], spans[1::2]

    def penalty(x: np.ndarray) -> float:
        factors = [span.of(x) for span in a] + [span.of(x).T for span in b]
        return 0.3 * float(np.mean([np.linalg.norm(f @ f.T - np.eye(len(f))) for f in factors]))

    value, grad = Orthogonality(a, b, len(flat), 0.3)(Tensor(flat))
    np.testing.assert_allclose(float(value.asnumpy()), penalty(flat.astype(np.float64)), rtol=1e-6)
    np.testing.assert_allclose(grad.asnumpy(), numerical_gradient(penalty, flat), rtol=0, atol=1e-6)
    inside = np.zeros(len(flat), bool)
    for span in spans:
        inside[span.start : span.stop] = True
    assert (grad.asnumpy()[~inside] == 0).all() and (grad.asnumpy()[inside] != 0).any()


def test_orthogonal_factors_have_no_gradient_and_no_nan(graph_mode):
    cell = Orthogonality([Span(0, (2, 2))], [Span(4, (2, 2))], 8, 0.5)
    value, grad = cell(Tensor(np.tile(np.eye(2, dtype=np.float32).ravel(), 2)))
    assert float(value.asnumpy()) == 0
    np.testing.assert_array_equal(grad.asnumpy(), 0)


@pytest.fixture(scope="module")
def cut_model(native, reference):
    """Qwen2 with random AdaLoRA of rank 4 on six modules, of which 7 triplets are left, none in one module."""
    model = load_directory(reference / "models" / "qwen2", operators=native)
    config = AdaLoraConfig(4, 6.0, target_rank=2, target_modules=("q_proj", "v_proj", "down_proj"), total_steps=9)
    inject(model, config)
    allocator = RankAllocator(model, config)
    allocator.objectives(model.trainable_params())
    allocator.observer(model.trainable_params())
    rng, layers = np.random.default_rng(2), adapted_layers(model)
    for layer in layers.values():
        for parameter in layer.tensors().values():
            parameter.set_data(Tensor(rng.standard_normal(parameter.shape).astype(np.float32) * 0.3))
    kept = np.array([[1, 0, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 1]], np.float32)
    allocator.importance.kept.set_data(Tensor(kept.ravel()))
    return model, allocator


def test_nothing_is_left_out_before_it_is_zero(cut_model):
    model, allocator = cut_model
    layer = next(iter(adapted_layers(model).values()))
    assert layer.lora_e.asnumpy()[1] != 0
    assert allocator.config().kept == {}
    allocator.cut()
    np.testing.assert_array_equal(layer.lora_e.asnumpy()[1:3], 0)
    assert (layer.lora_e.asnumpy()[[0, 3]] != 0).all()
    assert [sum(mask) for mask in allocator.config().kept.values()] == [2, 0, 1, 1, 2, 1]
    assert allocator.summary() == "ranks: 0 to 2, 1.17 on average, 7 in all"


def test_adalora_and_plain_lora_on_disk_compute_the_same(cut_model, reference, golden, tmp_path):
    model, allocator = cut_model
    allocator.cut()
    config, input_ids = allocator.config(), Tensor(golden("adapter_logits_qwen2")["input_ids"])
    wanted = model.set_train(False)(input_ids).asnumpy()
    base = load_directory(reference / "models" / "qwen2", operators=model.operators)
    assert np.abs(base(input_ids).asnumpy() - wanted).mean() > 0.05
    save_adapter(model, tmp_path / "adapter", config)
    assert save_as_lora(model, tmp_path / "plain", config)
    for folder in ("adapter", "plain"):
        other = load_directory(reference / "models" / "qwen2", operators=model.operators)
        load_adapter(other, tmp_path / folder)
        np.testing.assert_allclose(other(input_ids).asnumpy(), wanted, rtol=0, atol=2e-5, err_msg=folder)


def test_plain_lora_scales_all_modules_alike(cut_model):
    model, allocator = cut_model
    allocator.cut()
    config = allocator.config()
    _, specs, tensors = config.as_lora(stored_tensors(model, config))
    assert sorted(spec.lora_rank for spec in specs.values()) == [1, 1, 1, 2, 2]
    assert {spec.lora_alpha / spec.lora_rank for spec in specs.values()} == {1.5}
    assert len(set(adapted_layers(model)) - set(specs)) == 1
    assert tensors.keys() == specs.keys()


def test_a_frozen_factor_is_refused(graph_mode, reference):
    model = load_directory(reference / "models" / "qwen2")
    config = AdaLoraConfig(4, 6.0, target_rank=2, target_modules=("q_proj",), total_steps=9)
    inject(model, config)
    freeze(model, ["*layers.1*lora_e"])
    with pytest.raises(LoraMsError) as caught:
        RankAllocator(model, config).objectives(model.trainable_params())
    assert str(caught.value) == (
        "AdaLoRA trains A, B and E of every module, and model.layers.1.self_attn.q_proj is frozen in part"
    )


@pytest.mark.parametrize(
    ("init_r", "given", "found"), [(6, {}, 6), (6, {"target_r": 8}, 6), (12, {}, 8), (6, {"target_r": 2}, 2)]
)
def test_the_target_of_pefts_settings(init_r, given, found):
    """PEFT writes its default of 8 beside a smaller rank, too."""
    config = AdaLoraConfig.from_peft({"init_r": init_r, "lora_alpha": 6, "target_modules": ["q_proj"], **given})
    assert config.target_rank == found


SCHEDULE = {"target_rank": 1, "delta_t": 5, "beta1": 0.5, "beta2": 0.6, "orth_reg_weight": 0.1}
KEYS = SimpleNamespace(**SCHEDULE, tinit=1, tfinal=2, lora_dropout=0.0)


def test_a_schedule_given_anew():
    found = TRACE.continued(KEYS, SCHEDULE.keys())
    assert {name: getattr(found, name) for name in SCHEDULE} == SCHEDULE and (found.tinit, found.tfinal) == (1, 2)
    assert TRACE.continued(KEYS, ()) == replace(TRACE, tinit=1, tfinal=2)


def test_a_schedule_that_is_over():
    over = replace(TRACE, kept={"model.layers.0.self_attn.q_proj": (True, False, True, False)})
    assert over.continued(KEYS, ()) == over
    assert over.continued(SimpleNamespace(target_rank=2, lora_dropout=0.0), ("target_rank",)) == over
    with pytest.raises(LoraMsError) as caught:
        over.continued(KEYS, ("target_rank", "beta1"))
    assert str(caught.value) == (
        "target_rank: 1 in pet_config, 2 in the adapter; beta1: 0.5 in pet_config, 0.85 in the adapter, whose ranks "
        "are shared out"
    )

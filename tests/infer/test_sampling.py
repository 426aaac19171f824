"""Each step of sampling as a small table, worked out by hand."""

import numpy as np
import pytest

from lora_ms.errors import LoraMsError
from lora_ms.infer.sampling import (
    Sampling,
    adjusted,
    choose,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    log_softmax,
    penalise,
    softmax,
)

INF = np.inf


def test_the_penalty_divides_what_is_positive_and_multiplies_what_is_negative():
    logits = np.array([2.0, -1.0, 0.5, 4.0])
    np.testing.assert_allclose(penalise(logits, np.array([0, 1, 1]), 2.0), [1.0, -2.0, 0.5, 4.0])
    np.testing.assert_array_equal(logits, [2.0, -1.0, 0.5, 4.0])  # the input is left alone


def test_top_k_keeps_the_largest():
    logits = np.array([0.1, 3.0, 2.0, -1.0])
    np.testing.assert_array_equal(keep_top_k(logits, 2), [-INF, 3.0, 2.0, -INF])
    for every in (0, 4, 9):
        np.testing.assert_array_equal(keep_top_k(logits, every), logits)


def test_top_p_keeps_the_fewest_tokens_that_reach_the_sum():
    logits = np.log(np.array([0.1, 0.5, 0.15, 0.25]))
    for p, kept in ((0.4, [1]), (0.5, [1]), (0.6, [1, 3]), (0.8, [1, 2, 3]), (1.0, [0, 1, 2, 3]), (0.001, [1])):
        assert np.flatnonzero(np.isfinite(keep_top_p(logits, p - 1e-9 if p < 1 else p))).tolist() == kept


def test_draws_follow_the_probabilities():
    logits, rng = np.log(np.array([0.1, 0.2, 0.7])), np.random.default_rng(0)
    draws = [choose(logits, np.array([0]), Sampling(do_sample=True), rng) for _ in range(4000)]
    np.testing.assert_allclose(np.bincount(draws) / 4000, [0.1, 0.2, 0.7], atol=0.025)
    cold = [choose(logits, np.array([0]), Sampling(do_sample=True, temperature=0.5), rng) for _ in range(4000)]
    np.testing.assert_allclose(np.bincount(cold) / 4000, np.array([0.01, 0.04, 0.49]) / 0.54, atol=0.025)


def test_softmax_of_large_logits():
    np.testing.assert_allclose(softmax(np.array([1000.0, 1000.0, 0.0])), [0.5, 0.5, 0.0])


@pytest.mark.parametrize("zero", [{"temperature": 0}, {"top_p": 0}, {"temperature": 0, "top_p": 0, "top_k": 3}])
def test_no_temperature_and_no_probability_take_the_likeliest_token(zero):
    logits = np.array([0.1, 0.4, 0.39, 0.2])
    sampling = Sampling(do_sample=True, **zero)
    assert sampling.greedy and not sampling.needs_logits
    draws = {choose(logits, np.array([0]), sampling, np.random.default_rng(seed)) for seed in range(50)}
    assert draws == {1}
    penalised = Sampling(do_sample=True, repetition_penalty=2.0, **zero)
    assert penalised.needs_logits and choose(logits, np.array([1]), penalised, np.random.default_rng(0)) == 2


def test_min_p_is_a_share_of_the_likeliest():
    logits = np.log(np.array([0.1, 0.25, 0.6, 0.05]))
    np.testing.assert_array_equal(keep_min_p(logits, 0.4) > -INF, [False, True, True, False])
    np.testing.assert_array_equal(keep_min_p(logits, 1.0) > -INF, [False, False, True, False])
    assert keep_min_p(logits, 0.0) is logits


def test_penalties_of_the_answer_and_biases():
    """The prompt is [0, 1], the answer [2, 2, 3]: each time counts for the frequency, once for the presence."""
    logits, seen = np.zeros(5), np.array([0, 1, 2, 2, 3])
    s = Sampling(presence_penalty=1.0, frequency_penalty=0.25, logit_bias=((4, 2.5), (0, -1.0)))
    np.testing.assert_allclose(adjusted(logits, seen, s, answered=3), [-1.0, 0.0, -1.5, -1.25, 2.5])
    np.testing.assert_allclose(adjusted(logits, seen[:2], s, answered=0), [-1.0, 0.0, 0.0, 0.0, 2.5])
    assert s.needs_logits and not Sampling().needs_logits and not logits.any()
    assert choose(np.array([3.0, 1.0, 0.0]), seen, Sampling(logit_bias=((0, -100.0),)), np.random.default_rng(0)) == 1


def test_logarithms_of_probabilities():
    logits = np.array([[1000.0, 1000.0, 0.0], [0.0, np.log(3.0), -INF]])
    np.testing.assert_allclose(log_softmax(logits)[:, :2], np.log([[0.5, 0.5], [0.25, 0.75]]))


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"top_k": -1},
        {"top_p": 1.1},
        {"top_p": -0.1},
        {"repetition_penalty": 0},
        {"min_p": -0.1},
        {"min_p": 1.5},
        {"min_p": float("nan")},
        {"presence_penalty": 2.5},
        {"frequency_penalty": float("nan")},
        {"logit_bias": ((3, 1e9),)},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(LoraMsError, match=f"{next(iter(wrong))} .* out of range"):
        Sampling(**wrong)

"""The engine against transformers' greedy tokens, whatever else runs beside a request and whatever ran before it."""

import random

import numpy as np
import pytest

from lora_ms.errors import LoraMsError
from lora_ms.infer.engine import Engine, Event, Request
from lora_ms.infer.sampling import Sampling
from lora_ms.models.hub import load_directory
from lora_ms.ops import PORTABLE
from lora_ms.runtime.device import setup

MODELS = ("llama3", "qwen2", "qwen3")
PIECE = 4  # of prompts of 6 tokens


def prompts_of(golden, prefix: str) -> list[tuple[int, ...]]:
    ids, mask = golden[f"{prefix}_input_ids"], golden[f"{prefix}_attention_mask"]
    return [tuple(row[real == 1].tolist()) for row, real in zip(ids, mask, strict=True)]


def cases_of(golden) -> list[tuple[Request, list[int]]]:
    """Requests, and transformers' answers to them."""
    cases = []
    for prefix in ("prompt", "left_prompt"):
        for kind, sampling in (("greedy", Sampling()), ("penalty", Sampling(repetition_penalty=1.2))):
            answers = golden[f"{prefix}_{kind}"][:, 6:].tolist()
            for prompt, answer in zip(prompts_of(golden, prefix), answers, strict=True):
                cases.append((Request(prompt, len(answer), sampling), answer))
    return cases


def tokens_of(events: list[Event]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for event in events:
        found.setdefault(event.id, [])
        if event.token is not None:
            found[event.id].append(event.token)
    return found


@pytest.mark.parametrize(("name", "own"), [*((name, True) for name in MODELS), ("qwen3", False)])
def test_the_same_tokens_as_transformers(native, reference, golden, name, own):
    """In pieces, with more requests than rows, joined late, after others were cancelled, and with what was read before:
    prompts, and prompts with the answers to them."""
    model = load_directory(reference / "models" / name, operators=native if own else PORTABLE)
    engine = Engine(model, rows=3, length=128, piece=PIECE)
    cases = cases_of(golden(f"logits_{name}"))
    assert engine.answers([request for request, _ in cases]) == [answer for _, answer in cases]
    wanted = {engine.submit(request): answer for request, answer in cases}  # a full pool
    assert engine.waiting == len(cases)
    assert tokens_of([*engine.run()]) == wanted
    wanted, events = {}, []
    for request, answer in reversed(cases):  # each joins in the middle of the one before
        wanted[engine.submit(request)] = answer
        unwanted = engine.submit(request)
        for _ in range(3):
            events += engine.step()
        engine.cancel(unwanted)
    events += engine.run()
    found = tokens_of(events)
    assert {id: found[id] for id in wanted} == wanted
    assert sum(event.finish == "cancelled" for event in events) == len(cases)
    shared = [event.cached_tokens for event in events if event.id in wanted and event.cached_tokens]
    assert set(shared) == {PIECE}
    for request, answer in cases:  # an answer taken back by half is given again
        half = len(answer) // 2
        again = Request((*request.prompt, *answer[:half]), len(answer) - half, request.sampling)
        assert engine.answers([again]) == [answer[half:]]


@pytest.fixture(scope="module")
def engine(native, root) -> Engine:
    """Three rows of the bundled model."""
    model = load_directory(root / "examples" / "tiny" / "model", operators=native)
    engine = Engine(model, rows=3, length=256, piece=16)
    engine.warm()
    return engine


def test_random_requests_leave_no_row_and_no_slot(engine):
    """200, of which some are cancelled: all end, and each answers as it does alone after nothing else."""
    rng = random.Random(5)
    beginnings = [[rng.randrange(3, 2048) for _ in range(n)] for n in (0, 16, 40)]
    pool = []
    for _ in range(24):
        prompt = rng.choice(beginnings) + [rng.randrange(3, 2048) for _ in range(rng.choice([1, 5, 16, 50]))]
        sampling = rng.choice([Sampling(), Sampling(do_sample=True, top_k=50), Sampling(presence_penalty=1.0)])
        pool.append(Request(tuple(prompt), rng.randrange(0, 7), sampling, logprobs=rng.choice([None, 0, 2])))
    alone = []
    for request in pool:
        engine.forget()
        engine.submit(request)
        alone.append([(event.token, event.logprob, event.finish) for event in engine.run()])
    wanted, events = {}, []
    for _ in range(200):
        chosen = rng.randrange(len(pool))
        wanted[engine.submit(pool[chosen])] = alone[chosen]
        for _ in range(rng.randrange(3)):
            events += engine.step()
        if rng.random() < 0.2:
            engine.cancel(rng.choice(list(wanted)))
    events += engine.run()
    assert engine.idle and engine.running == engine.waiting == 0
    assert any(event.cached_tokens for event in events)
    for id, expected in wanted.items():
        found = [(event.token, event.logprob, event.finish) for event in events if event.id == id]
        if found[-1][2] == "cancelled":
            assert found[:-1] == expected[: len(found) - 1]
        else:
            assert found == expected


@pytest.mark.parametrize("bfloat16", [False, True])
def test_many_rows_have_the_numbers_of_one(root, bfloat16):
    """More rows than are multiplied where they lie, and, rounded, as many as are rounded."""
    runtime, _ = setup("CPU", bfloat16=bfloat16)
    model = load_directory(root / "examples" / "tiny" / "model", operators=runtime.operators)
    rows = 8 if bfloat16 else 16
    engine = Engine(model, rows, length=64, piece=16)
    requests = [Request(tuple(range(3 + n, 9 + n)), 4 + n % 3, logprobs=1) for n in range(rows)]

    def told(chosen: list[Request]) -> list[list]:
        engine.forget()
        ids = [engine.submit(request) for request in chosen]
        events = list(engine.run())
        return [[(event.token, event.logprob) for event in events if event.id == id] for id in ids]

    together = told(requests)
    assert together == [told([request])[0] for request in requests]
    assert told(requests[::-1])[::-1] == together


def test_a_long_prompt_stalls_nobody(engine):
    short, long = Request((5, 6, 7), 12), Request(tuple(range(3, 163)), 3)
    (alone,) = engine.answers([short])
    first = engine.submit(short)
    events = engine.step()
    engine.submit(long)
    for _ in range(10):  # half of the long prompt has been read
        events += engine.step()
    assert tokens_of(events) == {first: alone[:6]}
    engine.cancel_all()
    assert engine.idle


def test_a_beginning_is_computed_once(engine):
    """While it runs and afterwards; not with other weights."""
    system = tuple(range(100, 150))
    requests = [Request((*system, n), 2) for n in range(3, 8)]
    engine.forget()
    fresh = []
    for request in requests:
        fresh += engine.answers([request])
        engine.forget()
    ids = [engine.submit(request) for request in requests]
    events = list(engine.run())
    assert [tokens_of(events)[id] for id in ids] == fresh
    assert [max(event.cached_tokens for event in events if event.id == id) for id in ids] == [0, 48, 48, 48, 48]


def test_an_answer_is_read_again(engine):
    """Its keys were rounded otherwise; what was read in pieces before it is taken over, in place."""
    prompt = tuple(range(300, 340))
    engine.forget()
    (answer,) = engine.answers([Request(prompt, 30)])
    cached = []
    for _ in range(2):
        engine.submit(Request((*prompt, *answer, 9), 2))
        cached.append(next(engine.run()).cached_tokens)
        engine.cancel_all()
    assert cached == [32, 64]


def test_log_probabilities(engine):
    """Of the prompt and of the answer: those of a forward pass, and the likeliest beside them."""
    prompt = tuple(range(10, 50))
    engine.submit(Request(prompt, 4, logprobs=3, prompt_logprobs=2))
    events = list(engine.run())
    answer = [event.token for event in events]
    import mindspore as ms

    logits = engine.model(ms.Tensor([[*prompt, *answer]], ms.int32)).asnumpy()[0].astype(np.float64)
    wanted = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert [event.prompt_logprobs is None for event in events] == [False, True, True, True]
    assert [found.token for found in events[0].prompt_logprobs] == list(prompt[1:])
    found = [*events[0].prompt_logprobs, *(event.logprob for event in events)]
    for row, (token, logprob, top) in zip(wanted, ((f.token, f.logprob, f.top) for f in found), strict=False):
        np.testing.assert_allclose(logprob, row[token], atol=1e-4)
        order = np.argsort(-row)[: len(top)]
        assert [token for token, _ in top] == order.tolist()
        np.testing.assert_allclose([value for _, value in top], row[order], atol=1e-4)
    assert {len(f.top) for f in found[: len(prompt) - 1]} == {2} and {len(f.top) for f in found[len(prompt) :]} == {3}


def test_why_a_request_ends(engine):
    (answer,) = engine.answers([Request((5, 6, 7), 6)])
    engine.submit(Request((5, 6, 7), 6, eos_token_ids=(1, answer[3], answer[2])))
    assert [event.finish for event in engine.run()] == [None] * answer.index(answer[2]) + ["stop"]
    engine.submit(Request((5, 6, 7), 0, prompt_logprobs=0))
    (event,) = engine.run()
    assert (event.token, event.finish, len(event.prompt_logprobs)) == (None, "length", 2)
    engine.submit(Request((5, 6, 7), 6, Sampling(do_sample=True, temperature=1e-45)))
    other = engine.submit(Request((5, 6, 7), 2))
    events = list(engine.run())
    assert [event.finish for event in events if event.id != other] == ["error"]
    assert "not finite" in events[0].error
    assert tokens_of(events)[other] == answer[:2]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request((), 3), "the prompt is empty"),
        (Request((5, 2048), 3), "token id 2048 does not exist"),
        (Request((5,) * 250, 7), "has 250 tokens and max_new_tokens is 7, 257 together, and a row has room for 256"),
        (Request((5,), -1), "max_new_tokens -1"),
        (Request((5,), 1, logprobs=-1), "logprobs -1"),
        (Request((5,), 1, adapter="x"), "no adapter 'x'"),
        (Request((5,), 1, Sampling(logit_bias=((2048, 1.0),))), "logit_bias: token id 2048"),
    ],
)
def test_what_no_request_may_ask_for(engine, request_, message):
    with pytest.raises(LoraMsError, match=message):
        engine.submit(request_)
    assert engine.idle


def test_the_whole_length_can_be_used(engine):
    """Whatever free lines are written to meanwhile, they hold afterwards what they held."""
    for length, new in ((256, 0), (250, 6), (1, 255)):
        request = Request(tuple(range(3, 3 + length)), new)
        engine.forget()
        fresh = engine.answers([request, Request((9,), 3)])
        assert len(fresh[0]) == new
        assert engine.answers([Request((9,), 3)] * 3)[0] == fresh[1]
        assert engine.answers([request]) == fresh[:1]

"""Another adapter in each row, against PEFT's logits."""

from contextlib import contextmanager

import numpy as np
import pytest

from lora_ms.adapters.multi_adapter import AdapterPool
from lora_ms.errors import LoraMsError
from lora_ms.infer.engine import Engine, Request
from lora_ms.models.hub import load_directory
from lora_ms.nn.graph import Graph

ROWS = 3


def folders(reference, model: str) -> dict[str, tuple]:
    """Adapters of PEFT's of ranks 3 to 8, on other layers each, with the file of their logits."""
    found = {"some": (reference / "adapters" / model, f"adapter_logits_{model}")}
    kinds = ("all_linear", "rslora", "rank_alpha_pattern")
    return found | {kind: (reference / "variants" / f"{model}_{kind}", f"variants/{model}_{kind}") for kind in kinds}


def log_softmax(logits) -> np.ndarray:
    logits = logits.astype(np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def run(engine, requests) -> list[list]:
    events: dict[int, list] = {engine.submit(request): [] for request in requests}
    for event in engine.run():
        events[event.id].append(event)
    return list(events.values())


@pytest.fixture(scope="module")
def engine(native, reference) -> Engine:
    model = load_directory(reference / "models" / "qwen2", operators=native)
    pool = AdapterPool(model, ROWS, adapters=3, lora_rank=8)
    engine = Engine(model, ROWS, length=64, adapters=pool, piece=4)
    engine.warm()
    return engine


@pytest.fixture
def compiled(monkeypatch) -> list[str]:
    """Names of the graphs that are compiled meanwhile."""
    found: list[str] = []

    @contextmanager
    def note(graph, inputs):
        found.append(type(graph).__name__)
        yield

    monkeypatch.setattr(Graph, "compiling", note)
    return found


def test_rows_of_other_adapters_score_as_pefts(engine, reference, golden, compiled):
    """Side by side; then one is unloaded while it runs, and another takes its place. Nothing is compiled."""
    there = folders(reference, "qwen2")
    pool = engine.adapters
    values = {name: golden(file) for name, (_, file) in there.items()}
    first, second = ["some", "all_linear", "rslora"], ["all_linear", "rslora", "rank_alpha_pattern"]
    answers: dict[str | None, list[list[int]]] = {}

    def requests(names):
        return [
            Request(tuple(ids.tolist()), 6, adapter=name, prompt_logprobs=0)
            for name in (None, *names)
            for ids in values[name or "some"]["input_ids"]
        ]

    def check(names, found):
        found = iter(found)
        for name in (None, *names):
            logits = values[name or "some"]["base_logits" if name is None else "logits"]
            tokens = []
            for ids, scores in zip(values[name or "some"]["input_ids"], log_softmax(logits), strict=True):
                events = next(found)
                given = [score.logprob for score in events[0].prompt_logprobs]
                np.testing.assert_allclose(given, scores[np.arange(len(ids) - 1), ids[1:]], atol=1e-4)
                tokens.append([event.token for event in events])
                assert tokens[-1][0] == scores[-1].argmax()
            assert answers.setdefault(name, tokens) == tokens

    for name in first:
        pool.load(name, there[name][0])
    check(first, run(engine, requests(first)))
    with pytest.raises(LoraMsError, match="all 3 places are taken"):
        pool.load("rank_alpha_pattern", there["rank_alpha_pattern"][0])
    going = engine.submit(Request(tuple(values["some"]["input_ids"][0].tolist()), 6, adapter="some"))
    engine.step()
    pool.unload("some")
    with pytest.raises(LoraMsError, match="all 3 places are taken"):  # it still runs
        pool.load("rank_alpha_pattern", there["rank_alpha_pattern"][0])
    assert [event.token for event in engine.run() if event.id == going] == answers["some"][0]
    with pytest.raises(LoraMsError, match="no adapter 'some'; there are: all_linear, rslora"):
        engine.submit(Request((5,), 1, adapter="some"))
    pool.load("rank_alpha_pattern", there["rank_alpha_pattern"][0])
    check(second, run(engine, requests(second)))
    for name, tokens in answers.items():  # the graph of a token computes what that of a piece does
        if name == "some":
            continue
        for ids, answer in zip(values[name or "some"]["input_ids"], tokens, strict=True):
            whole = (*ids.tolist(), *answer)
            ((event,),) = run(engine, [Request(whole, 0, adapter=name, prompt_logprobs=1)])
            assert [score.top[0][0] for score in event.prompt_logprobs[len(ids) - 1 :]] == answer
    assert len({str(tokens) for tokens in answers.values()}) > 2
    assert compiled == []
    for name in second:
        pool.unload(name)


MORE = ("dora", "dora_rslora", "lora_bias", "bias_all", "bias_lora_only", "all_linear")


def test_dora_and_biases_beside_lora(native, reference, golden):
    """All in one batch, by the graph of a piece against PEFT, and by that of a token against that of a piece."""
    model = load_directory(reference / "models" / "qwen2", operators=native)
    pool = AdapterPool(model, ROWS, adapters=len(MORE), lora_rank=8, more=True)
    engine = Engine(model, ROWS, length=64, adapters=pool, piece=4)
    engine.warm()  # before any is loaded
    values = {name: golden(f"variants/qwen2_{name}") for name in MORE}
    for name in MORE:
        pool.load(name, reference / "variants" / f"qwen2_{name}")

    def asked(name: str | None, ids, new: int) -> Request:
        return Request(tuple(int(token) for token in ids), new, adapter=name, prompt_logprobs=1)

    names = (*MORE, None)
    prompts = {name: values[name or "dora"]["input_ids"] for name in names}
    found = iter(run(engine, [asked(name, ids, 6) for name in names for ids in prompts[name]]))
    again = []
    for name in names:
        logits = values[name or "dora"]["base_logits" if name is None else "logits"]
        for ids, scores in zip(prompts[name], log_softmax(logits), strict=True):
            events = next(found)
            given = [score.logprob for score in events[0].prompt_logprobs]
            np.testing.assert_allclose(given, scores[np.arange(len(ids) - 1), ids[1:]], atol=1e-4)
            answer = [event.token for event in events]
            assert answer[0] == scores[-1].argmax()
            again.append((asked(name, [*ids, *answer], 0), answer))
    for (_, answer), (event,) in zip(again, run(engine, [request for request, _ in again]), strict=True):
        likeliest = [score.top[0][0] for score in event.prompt_logprobs]
        assert likeliest[-len(answer) :] == answer
    assert len({str(answer) for _, answer in again}) > 4


def test_no_beginning_is_shared_between_adapters(engine, reference, golden):
    there = folders(reference, "qwen2")
    prompt = tuple(golden("adapter_logits_qwen2")["input_ids"][0].tolist())
    engine.adapters.load("some", there["some"][0])
    cached = [run(engine, [Request(prompt, 1, adapter=name)])[0][0].cached_tokens for name in ("some", None, "some")]
    engine.adapters.unload("some")
    engine.adapters.load("some", there["all_linear"][0])  # another, at the same place and of the same name
    cached += [run(engine, [Request(prompt, 1, adapter="some")])[0][0].cached_tokens for _ in range(2)]
    engine.adapters.unload("some")
    assert cached == [0, 0, 8, 0, 8]


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("variants/qwen2_dora", "q_proj has a magnitude, for which there is no room here"),
        ("variants/qwen2_bias_all", "k_proj has a bias, for which there is no room here"),
        ("variants/qwen2_modules_to_save_norms", "modules_to_save: .* cannot run beside others"),
        ("variants/qwen2_trainable_tokens", "trainable_token_indices cannot run beside others"),
        ("variants/qwen2_ia3", "cannot run beside others"),
        ("variants/qwen2_pissa", "changed the base weights"),
        ("variants/qwen2_lm_head", "lm_head is no layer that may have one"),
        ("models", "no adapter here"),
    ],
)
def test_what_cannot_run_beside_others(engine, reference, folder, message):
    with pytest.raises(LoraMsError, match=message):
        engine.adapters.load("x", reference / folder)
    assert engine.adapters.names == ()


def test_ranks_and_layers_that_do_not_fit(native, reference):
    model = load_directory(reference / "models" / "qwen2", operators=native)
    with pytest.raises(LoraMsError, match="matches no layer; could match: down_proj"):
        AdapterPool(model, ROWS, 1, 8, ["w_proj"])
    pool = AdapterPool(model, ROWS, 1, 2, ["q_proj", "v_proj"])
    with pytest.raises(LoraMsError) as caught:
        pool.load("x", reference / "adapters" / "qwen2")
    assert "q_proj has rank 4, and there is room for 2" in str(caught.value)
    assert "down_proj is no layer that may have one" in str(caught.value)
    root = reference.parent.parent / "examples" / "tiny" / "model"
    pool = AdapterPool(load_directory(root, operators=native), ROWS, 1, 8)
    with pytest.raises(LoraMsError, match="q_proj maps .* numbers, and the model's .* to "):
        pool.load("x", reference / "adapters" / "qwen2")

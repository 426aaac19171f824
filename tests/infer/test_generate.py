"""Generation against transformers' ``generate``: the same tokens, alone, in a left-padded batch, with a penalty."""

from dataclasses import replace

import mindspore as ms
import numpy as np
import pytest

from lora_ms.errors import LoraMsError
from lora_ms.infer import cached_model
from lora_ms.infer.cached_model import PIECE, cache_length, default_length
from lora_ms.infer.generate import Generator, pad_rows
from lora_ms.infer.sampling import Sampling
from lora_ms.models.decoder import DecoderConfig
from lora_ms.models.hub import load_directory, new_model
from lora_ms.nn import sharing
from lora_ms.ops import PORTABLE
from lora_ms.recipes.serve import length_of

MODELS = ("llama2", "llama3", "qwen2", "qwen3", "deepseek_r1_qwen", "smollm3")


def prompts_of(golden, prefix: str) -> list[list[int]]:
    ids, mask = golden[f"{prefix}_input_ids"], golden[f"{prefix}_attention_mask"]
    return [row[real == 1].tolist() for row, real in zip(ids, mask, strict=True)]


@pytest.mark.parametrize("name", MODELS)
def test_the_same_tokens_as_transformers(operators, reference, golden, name):
    values = golden(f"logits_{name}")
    generator = Generator(load_directory(reference / "models" / name, operators=operators))
    for prefix in ("prompt", "left_prompt"):
        prompts = prompts_of(values, prefix)
        for kind, sampling in (("greedy", Sampling()), ("penalty", Sampling(repetition_penalty=1.2))):
            new = generator.generate(prompts, 24, sampling)
            np.testing.assert_array_equal(np.array(new), values[f"{prefix}_{kind}"][:, 6:])
    assert len(generator.engines) == 1  # two graphs in all


@pytest.fixture(scope="module")
def qwen2(native, reference) -> Generator:
    return Generator(load_directory(reference / "models" / "qwen2", operators=native))


def test_a_row_ends_with_its_end_token(qwen2, golden):
    values = golden("logits_qwen2")
    prompts, wanted = prompts_of(values, "prompt"), values["prompt_greedy"][:, 6:]
    end = int(wanted[0, 5])
    seen: list[tuple[int, int]] = []
    new = qwen2.generate(prompts, 24, eos_token_ids=[end], on_token=lambda row, token: seen.append((row, token)))
    for row, answer in enumerate(new):
        tokens = wanted[row].tolist()
        assert answer == (tokens[: tokens.index(end) + 1] if end in tokens else tokens)
        assert [token for at, token in seen if at == row] == answer


def test_sampling_repeats_with_its_seed_and_varies_without(qwen2, golden):
    prompts = prompts_of(golden("logits_qwen2"), "prompt")
    first, again, other = (
        qwen2.generate(prompts, 24, Sampling(do_sample=True, temperature=2.0, seed=seed)) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other
    narrow = qwen2.generate(prompts, 24, Sampling(do_sample=True, top_k=1))
    assert narrow == qwen2.generate(prompts, 24)  # the likeliest of one


def test_an_answer_that_cannot_be_drawn_is_no_short_one(qwen2):
    with pytest.raises(LoraMsError, match="prompt 1: no token can be drawn"):
        qwen2.generate([[1, 2], [3]], 4, Sampling(do_sample=True, temperature=1e-40))


def test_an_empty_prompt_is_refused(qwen2):
    with pytest.raises(LoraMsError, match="empty"):
        qwen2.generate([[1, 2], []], 4)


def test_cache_lengths_are_few(native, reference):
    model = load_directory(reference / "models" / "qwen2", operators=PORTABLE)
    assert [cache_length(model, 1, n) for n in (1, 512, 513, 3000)] == [512, 512, 1024, 4096]
    if native.reads_used_slots:  # the model's own length, which costs nothing before it is filled
        model = load_directory(reference / "models" / "qwen2", operators=native)
        whole = -(-model.config.longest // PIECE) * PIECE
        assert [cache_length(model, 2, n) for n in (1, whole)] == [max(whole, 512)] * 2


def test_a_model_of_long_texts_is_served_within_memory(native, reference):
    model = load_directory(reference / "models" / "qwen2", operators=native)
    model.config = replace(
        model.config, max_position_embeddings=131072, num_hidden_layers=28, num_key_value_heads=8, head_dim=128
    )
    for rows, length in ((8, 1024), (1, 8192)):
        assert default_length(model, rows, model.config.longest) == max(2048, length)
        assert length_of(model, rows, 131072, None) == max(2048, length)
    assert default_length(model, 8, 512) == 512
    assert length_of(model, 8, 131072, 100_000) == 100_000
    with pytest.raises(LoraMsError, match="--max-model-len 9: the model takes 8 tokens at most"):
        length_of(model, 1, 8, 9)


def test_prompts_of_several_pieces_and_fewer_rows(qwen2):
    """Whatever the prompts are, the graphs stay the same two; alone and together they answer the same."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, 90, n).tolist() for n in (1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 5)]
    together = qwen2.generate(prompts, 9)
    graphs = len(qwen2.engines)
    assert [qwen2.generate([prompt], 9)[0] for prompt in prompts] == together
    assert len(qwen2.engines) == graphs


@pytest.mark.parametrize("windows", [(), (1, 4, 7)], ids=["full", "some sliding"])
def test_layers_that_share_graphs_answer_as_one_graph_does(native, windows, monkeypatch):
    """Eight layers are two blocks of three, and the top; afterwards every layer has its own weights again."""
    monkeypatch.setattr(sharing, "SHARED_FROM", 8)
    monkeypatch.setattr(cached_model, "known_layers", lambda layers: None)  # as of layers with adapters of another kind
    sizes = DecoderConfig(
        vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, rms_norm_eps=1e-5, rope_theta=1e4, tie_word_embeddings=True,
        sliding_window=6 if windows else 0, sliding_layers=windows,
    )  # fmt: skip
    model = new_model(sizes, ms.float32, 0, native)
    before = {name: parameter.asnumpy() for name, parameter in model.parameters_and_names()}
    prompts = [[5, 9, 3], list(range(1, 50)), [7] * 20]
    answers = []
    for lends_memory in (True, False):
        model.operators = replace(native, lends_memory=lends_memory)
        generator = Generator(model)
        answers.append([generator.generate(prompts, 12), generator.generate(prompts[:2], 5)])
        assert (generator.engines[0].graphs.whole is None) == lends_memory
    assert answers[0] == answers[1]
    assert len({tuple(row) for row in answers[0][0]}) == 3  # no answer is another's
    for name, parameter in model.parameters_and_names():
        np.testing.assert_array_equal(parameter.asnumpy(), before[name], err_msg=name)


def test_rows_of_unequal_length_are_padded_on_both_sides():
    out = pad_rows([[1, 2, 3], [4]], [[7], [8, 9]], pad_id=0, width=3)
    np.testing.assert_array_equal(out, [[1, 2, 3, 7, 0], [0, 0, 4, 8, 9]])

"""Generation against transformers' ``generate``: the same tokens, alone, in a left-padded batch, with a penalty."""

import numpy as np
import pytest

from lora_ms.errors import LoraMsError
from lora_ms.infer.generate import Generator, pad_rows, prompt_bucket
from lora_ms.infer.sampling import Sampling
from lora_ms.models.hub import load_directory

MODELS = ("llama2", "llama3", "qwen2", "qwen3", "deepseek_r1_qwen")


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
    assert len(generator.steps) == 1  # one batch size, one length: two graphs in all


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


def test_an_empty_prompt_is_refused(qwen2):
    with pytest.raises(LoraMsError, match="empty"):
        qwen2.generate([[1, 2], []], 4)


def test_buckets_are_few():
    assert [prompt_bucket(n) for n in (1, 32, 33, 64, 65, 1000)] == [32, 32, 64, 64, 128, 1024]


def test_rows_of_unequal_length_are_padded_on_both_sides():
    out = pad_rows([[1, 2, 3], [4]], [[7], [8, 9]], pad_id=0, width=3)
    np.testing.assert_array_equal(out, [[1, 2, 3, 7, 0], [0, 0, 4, 8, 9]])

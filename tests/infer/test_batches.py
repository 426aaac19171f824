"""What a row answers is its own affair: not of its neighbours, its place, the batch's size or anybody's length."""

import random

import numpy as np
import pytest

from lora_ms.data.tokenizer import load_tokenizer
from lora_ms.errors import LoraMsError
from lora_ms.infer.engine import check_prompts
from lora_ms.infer.generate import Generator, Speaker
from lora_ms.infer.sampling import Sampling, random_stream
from lora_ms.models.hub import load_directory

MIXTURES = 200


@pytest.fixture(scope="module")
def tiny(native, root):
    """The bundled model and its tokenizer."""
    folder = root / "examples" / "tiny" / "model"
    return load_directory(folder, operators=native), load_tokenizer(folder)


@pytest.fixture(scope="module")
def generator(tiny) -> Generator:
    return Generator(tiny[0])


def prompts_of(rng: random.Random, count: int, longest: int) -> list[list[int]]:
    return [[rng.randrange(3, 2048) for _ in range(rng.choice([1, 5, 20, 33, 40, longest]))] for _ in range(count)]


def test_mixtures_answer_as_each_prompt_alone(generator):
    """200 mixtures of lengths, sizes and orders; limits differ from row to row, some end early."""
    rng = random.Random(7)
    pool = prompts_of(rng, 12, 64)
    limits = [rng.randrange(1, 9) for _ in pool]
    alone = [generator.generate([prompt], 8)[0] for prompt in pool]
    for _ in range(MIXTURES):
        chosen = rng.sample(range(len(pool)), rng.choice([2, 3, 5]))
        ends = sorted({alone[rng.choice(chosen)][rng.randrange(8)]})
        found = generator.generate([pool[i] for i in chosen], [limits[i] for i in chosen], eos_token_ids=ends)
        for i, answer in zip(chosen, found, strict=True):
            wanted = alone[i][: limits[i]]
            first = next((at for at, token in enumerate(wanted) if token in ends), len(wanted))
            assert answer == wanted[: first + 1]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(repetition_penalty=1.3), Sampling(do_sample=True, seed=3)])
def test_order_and_neighbours_change_nothing(generator, sampling):
    """Drawn answers too: a random stream belongs to a prompt, not to a place."""
    pool = prompts_of(random.Random(1), 5, 40)
    alone = [generator.generate([prompt], 8, sampling)[0] for prompt in pool]
    for order in ([0, 1, 2], [2, 1, 0], [4, 3, 0]):
        found = generator.generate([pool[i] for i in order], 8, sampling)
        assert found == [alone[i] for i in order]


def test_one_prompt_twice_is_drawn_twice(generator):
    prompt = list(range(5, 15))
    sampling = Sampling(do_sample=True, temperature=2.0)
    twice = generator.generate([prompt, prompt, prompt[:4]], 8, sampling)
    assert twice[0] != twice[1]
    assert generator.generate([prompt[:4], prompt, prompt], 8, sampling) == [twice[2], twice[0], twice[1]]


def test_streams_are_of_the_seed_and_the_tokens():
    def draw(prompt, seed, sample=0):
        return random_stream(prompt, seed, sample).integers(1 << 30)

    assert len({draw([1, 2], 0), draw([3], 0), draw([1, 2], 0, 1), draw([1, 2], 1)}) == 4
    assert draw([1, 2], 0) == draw(np.array([1, 2]), 0)


@pytest.mark.parametrize("limits", [[3, 8, 1], [1, 1, 1], [0, 4, 2], [8, 0, 0]])
def test_every_row_has_a_limit_of_its_own(generator, limits):
    pool = prompts_of(random.Random(2), 3, 64)
    whole = generator.generate(pool, 8)
    assert generator.generate(pool, limits) == [answer[:n] for answer, n in zip(whole, limits, strict=True)]


class Recorder:
    """A generator that answers with the limits it was given."""

    def __init__(self, model):
        self.model = model

    def generate(self, prompts, max_new_tokens, **_):
        return [[limit] for limit in max_new_tokens]


class Numbers:
    """A tokenizer of which only the end token and a template matter; text is numbers."""

    eos_token_id = 2
    added_tokens_decoder: dict = {}

    def decode(self, tokens, skip_special_tokens):
        return " ".join(map(str, tokens))


@pytest.fixture
def speaker(tiny):
    model, tokenizer = tiny
    found = Speaker(Recorder(model), tokenizer, Sampling(), max_new_tokens=60, max_length=100)
    found.tokenizer = Numbers()
    return found


@pytest.mark.parametrize(
    ("lengths", "limits"),
    [
        ([10], [60]),
        ([10, 99, 50], [60, 1, 50]),
        ([39, 40, 41], [60, 60, 59]),
        ([99, 99], [1, 1]),
        ([1, 98, 1, 98], [60, 2, 60, 2]),
    ],
)
def test_a_long_prompt_leaves_others_their_room(speaker, lengths, limits):
    assert speaker.continued([[5] * n for n in lengths]) == [str(limit) for limit in limits]


@pytest.mark.parametrize(
    ("lengths", "name"),
    [([100], "the prompt has 100"), ([5, 2000], "prompt 2 has 2,000"), ([101, 3], "prompt 1 has 101")],
)
def test_a_prompt_longer_than_the_model_is_refused(speaker, lengths, name):
    with pytest.raises(LoraMsError) as caught:
        speaker.continued([[5] * n for n in lengths])
    assert str(caught.value) == f"{name} tokens, and the model takes 100 with the answer: shorten it"


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[5, 2048]], "the prompt: token id 2048 does not exist in a vocabulary of 2048"),
        ([[5], [9999, 2048], [3]], "prompt 2: token id 9999 does not exist"),
        ([[-1]], "the prompt: token id -1 does not exist"),
        ([[5], []], "prompt 2 is empty"),
        ([], "the prompt is empty"),
        ([np.array([7, 2050], np.int32)], "the prompt: token id 2050 does not exist"),
    ],
)
def test_ids_that_the_model_does_not_have(generator, prompts, message):
    with pytest.raises(LoraMsError, match=message):
        generator.generate(prompts, 4)


def test_the_last_id_is_one(generator):
    check_prompts([[0, 2047]], 2048)


@pytest.mark.parametrize(("more", "ends"), [([], (2,)), ([606], (2, 606)), ([2, 0], (0, 2))])
def test_answers_end_at_every_end_token_that_is_known(tiny, more, ends):
    """The model's (config.json's and generation_config.json's), the tokenizer's, the template's and the user's."""
    model, tokenizer = tiny
    assert Speaker(Recorder(model), tokenizer, Sampling(), 60, 512, more_ends=more).eos_token_ids == ends

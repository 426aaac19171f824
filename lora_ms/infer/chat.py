"""Text in, text out: prompts by the chat template, answers streamed as whole characters."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from lora_ms.data.example import Message
from lora_ms.data.template import encode_prompt, end_of_turn
from lora_ms.errors import LoraMsError
from lora_ms.infer.engine import ROWS, Finish, prompt_name
from lora_ms.infer.generate import Generator
from lora_ms.infer.sampling import Sampling
from lora_ms.infer.text_stream import TextStream


@dataclass(frozen=True)
class GeneratedAnswer:
    """The answer to one prompt."""

    text: str
    finish: Finish  # why it ended


class Speaker:
    """A model that answers messages.

    Args:
        generator: around the model.
        tokenizer: with a chat template, or the Alpaca prompt is used.
        max_new_tokens: length of the longest answer.
        max_length: longest prompt and answer together, in tokens.
        more_ends: ids that end an answer, besides the tokenizer's, the model's and the chat template's own.
    """

    def __init__(
        self,
        generator: Generator,
        tokenizer,
        sampling: Sampling,
        max_new_tokens: int,
        max_length: int,
        more_ends: Sequence[int] = (),
    ):
        self.generator = generator
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.max_new_tokens = max_new_tokens
        self.max_length = max_length
        self.calls = 0
        ends = {tokenizer.eos_token_id, *generator.model.config.eos_token_ids, *more_ends, end_of_turn(tokenizer)}
        self.eos_token_ids = tuple(sorted(end for end in ends if end is not None))

    def answers(
        self, conversations: Sequence[Sequence[Message]], show: Callable[[str], None] | None = None
    ) -> list[str]:
        """The assistant's next turn in each conversation, all in one batch; ``show`` streams the first of them."""
        return self.continued([encode_prompt(self.tokenizer, turns) for turns in conversations], show)

    def continued(self, prompts: Sequence[Sequence[int]], show: Callable[[str], None] | None = None) -> list[str]:
        """What follows each prompt, given as tokens; see ``answers``.

        Raises:
            LoraMsError: a prompt that leaves no room for an answer, is empty, or has ids beyond the vocabulary.
        """
        limits = [self.limit(prompt, number, len(prompts)) for number, prompt in enumerate(prompts, 1)]
        stream = TextStream(self.tokenizer)

        def show_first(row: int, token: int) -> None:
            if show is not None and row == 0:
                show(stream.add(token))

        new = self.generator.generate(
            prompts,
            max_new_tokens=limits,
            sampling=self._sampling(),
            eos_token_ids=self.eos_token_ids,
            on_token=show_first,
        )
        if show is not None:
            show(stream.finish())
        return [self._text(tokens) for tokens in new]

    def in_turn(self, prompts: Sequence[Sequence[int]], first: int = 0) -> Iterator[GeneratedAnswer]:
        """The answers to any number of prompts, from the one at index ``first`` on, in their order.

        As many run at once as there are rows; each is the one that ``continued`` gives.

        Raises:
            LoraMsError: as ``continued``, or an answer cannot be drawn.
        """
        limits = [self.limit(prompt, number, len(prompts)) for number, prompt in enumerate(prompts, 1)]
        requests = self.generator.requests(prompts, limits, self._sampling(), self.eos_token_ids)
        engine = self.generator.engine_for(requests, min(len(requests), ROWS))
        tokens: dict[int, list[int]] = {}
        ended: dict[int, Finish] = {}
        due = 0
        for number, event in engine.events_of(requests[first:]):
            if event.error:
                raise LoraMsError(f"{prompt_name(first + number + 1, len(prompts))}: {event.error}")
            if event.token is not None:
                tokens.setdefault(number, []).append(event.token)
            if event.finish is not None:
                ended[number] = event.finish
            while due in ended:
                yield GeneratedAnswer(self._text(tokens.pop(due, [])), ended.pop(due))
                due += 1

    def _sampling(self) -> Sampling:
        """Of the next call: another answer when asked again."""
        self.calls += 1
        return replace(self.sampling, seed=self.sampling.seed + self.calls)

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True)).strip()

    def limit(self, prompt: Sequence[int], number: int = 1, count: int = 1) -> int:
        """Most new tokens after ``prompt``, the one of this number among ``count``.

        Raises:
            LoraMsError: not one fits.
        """
        if len(prompt) >= self.max_length:
            raise LoraMsError(
                f"{prompt_name(number, count)} has {len(prompt):,} tokens, and the model takes {self.max_length:,} "
                "with the answer: shorten it"
            )
        return min(self.max_new_tokens, self.max_length - len(prompt))

    def prompt_length(self, conversation: Sequence[Message]) -> int:
        """Tokens of the prompt that ``answers`` would build."""
        return len(encode_prompt(self.tokenizer, conversation))

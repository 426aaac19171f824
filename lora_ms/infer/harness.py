"""The model as lm-evaluation-harness asks it: for log-likelihoods of texts, and for answers."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from lora_ms.errors import LoraMsError
from lora_ms.infer.engine import Engine, Event, Request
from lora_ms.infer.sampling import Sampling
from lora_ms.infer.text_stream import TextStream

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")  # keys of a task that mean the same here


class HarnessModel(TemplateLM):
    """``engine``'s model; texts become tokens as in lm-eval's ``hf`` backend.

    Args:
        tokenizer: the model's.
        ends: ids that end an answer.
    """

    def __init__(self, engine: Engine, tokenizer, ends: Sequence[int]):
        super().__init__()
        self.engine = engine
        self.tokenizer: Any = tokenizer
        self.ends = tuple(ends)
        self.cut = 0  # texts that were too long
        self.max_length = engine.length - len(engine.lead) - 1  # tokens that are read before the last one is told

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that nothing precedes."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def tokenizer_name(self) -> str:
        """The name by which lm-eval tells rendered chats apart."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; without a word on special tokens, with those that the tokenizer puts before a text."""
        if add_special_tokens is None:
            before = self.tokenizer.bos_token
            add_special_tokens = not (before and string.startswith(before))
        found = self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)
        return list(found.input_ids)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, window by window if they are longer than the model takes."""
        windows, counts = [], []
        for (text,) in (request.args for request in requests):
            parts = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            found = [(("", text), *make_disjoint_window(part)) for part in parts]
            windows += found
            counts.append(len(found))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Of each continuation, the sum of its tokens' log-probabilities, and whether all of them are the likeliest."""
        found = [(0.0, True)] * len(requests)

        def take(number: int, event: Event) -> None:
            scores = event.prompt_logprobs or ()
            greedy = all(score.top[0][0] == score.token for score in scores)
            found[number] = (sum(score.logprob for score in scores), greedy)

        asked = (self._scored(context, continuation) for _, context, continuation in requests)
        self._ask(asked, len(requests), take, disable_tqdm)
        return found

    def _scored(self, context: Sequence[int], continuation: Sequence[int]) -> Request:
        """What asks for the scores of a continuation; of a text that is too long the beginning is left out."""
        if len(continuation) > self.max_length:
            raise LoraMsError(
                f"a continuation of {len(continuation)} tokens cannot be scored: the model takes {self.max_length}"
            )
        whole = [*context, *continuation][-(self.max_length + 1) :]
        self.cut += len(whole) < len(context) + len(continuation)
        return Request(tuple(whole), 0, prompt_logprobs=1, scored_from=len(whole) - len(continuation))

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers, up to the first stop string of each."""
        asked, streams, texts = [], [], [""] * len(requests)
        for context, given in (request.args for request in requests):
            keys: dict[str, Any] = dict(normalize_gen_kwargs(given))
            most = int(keys["max_gen_toks"])
            room = self.max_length - most
            if room < 1:
                raise LoraMsError(f"a task asks for {most} new tokens, and the model takes {self.max_length}")
            prompt = self.tok_encode(context) or [self.prefix_token_id]
            self.cut += len(prompt) > room
            sampling = {key: keys[key] for key in SAMPLING if keys.get(key) is not None}
            drawn = Sampling(do_sample=bool(keys.get("do_sample")), **sampling)
            asked.append(Request(tuple(prompt[-room:]), most, drawn, self.ends))
            streams.append(TextStream(self.tokenizer, [stop for stop in keys["until"] if stop]))

        def take(number: int, event: Event) -> None:
            stream = streams[number]
            if stream.stopped:
                return
            if event.token is not None and event.finish != "stop":
                texts[number] += stream.add(event.token)
            if event.finish is not None:
                texts[number] += stream.finish()
            elif stream.stopped:
                self.engine.cancel(event.id)

        self._ask(asked, len(asked), take, disable_tqdm)
        return texts

    def _ask(self, requests: Iterable[Request], count: int, take: Callable[[int, Event], None], quiet: bool) -> None:
        with tqdm(total=count, disable=quiet, unit=" requests") as bar:
            for number, event in self.engine.events_of(requests):
                if event.error:
                    raise LoraMsError(event.error)
                if event.finish != "cancelled":
                    take(number, event)
                bar.update(event.finish is not None)

"""From tokens to text as they come: whole characters, and nothing of a stop string."""

from collections.abc import Sequence

UNKNOWN = "\ufffd"  # what a decoder writes for a character of which bytes are missing
MOST_BYTES = 4  # of a character
WINDOW = 6  # tokens of a prompt that decide how the first token after it is written


class StopStrings:
    """Lets text pass up to the first of ``stops``, and holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]):
        self.stops = stops
        self.held = ""
        self.found = False

    def add(self, text: str) -> str:
        """The text that is certain by now; after a stop string was ``found``, nothing."""
        if self.found:
            return ""
        self.held += text
        places = [place for place in map(self.held.find, self.stops) if place >= 0]
        if places:
            self.found = True
            return self._release(min(places), drop=True)
        longest = max((self._begun(stop) for stop in self.stops), default=0)
        return self._release(len(self.held) - longest)

    def flush(self) -> str:
        """What was held back, at the end."""
        return "" if self.found else self._release(len(self.held))

    def _release(self, length: int, drop: bool = False) -> str:
        out, rest = self.held[:length], self.held[length:]
        self.held = "" if drop else rest
        return out

    def _begun(self, stop: str) -> int:
        """Characters of ``stop`` that the held text ends with."""
        most = min(len(stop) - 1, len(self.held))
        return next((n for n in range(most, 0, -1) if self.held.endswith(stop[:n])), 0)


class TextStream:
    """The text of one answer.

    Each token is decoded with the one before it, not with all: what has been shown stays as it was.

    Args:
        prompt: tokens that the answer goes on from in its text; () where it begins anew.
        skip_special: leave special tokens out of the text.
    """

    def __init__(self, tokenizer, stops: Sequence[str] = (), prompt: Sequence[int] = (), skip_special: bool = True):
        self.tokenizer = tokenizer
        self.skip_special = skip_special
        added = tokenizer.added_tokens_decoder.items() if skip_special else ()
        self.skipped = {token for token, how in added if how.special}  # bytes of a character may stand around them
        self.stops = StopStrings(stops)
        self.tokens = [token for token in prompt[-WINDOW:] if token not in self.skipped]
        self.begin = 0  # of the window that is decoded
        self.end = len(self.tokens)  # of its part that has been shown
        self.shown = self._decoded(self.begin, self.end)  # that part

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self.stops.found

    def add(self, token: int) -> str:
        """The text that one more token makes certain."""
        if token in self.skipped:
            return ""
        self.tokens.append(token)
        text = self._decoded(self.begin, len(self.tokens))
        if not text.endswith(UNKNOWN):
            return self._show(text, len(self.tokens))
        if len(self.tokens) - self.end <= 2 * MOST_BYTES:  # a character is not complete, or these are bytes of none
            return ""
        last = len(self.tokens) - MOST_BYTES + 1  # behind the last token that no character to come may need
        between = (end for end in range(last, self.end, -1) if text.startswith(self._decoded(self.begin, end)))
        end = next(between, last)  # not inside a character that is there
        return self._show(self._decoded(self.begin, end), end)

    def finish(self) -> str:
        """The rest, where no more tokens come."""
        text = self._decoded(self.begin, len(self.tokens))
        return self._show(text, len(self.tokens)) + self.stops.flush()

    def _show(self, text: str, end: int) -> str:
        new = text[len(self.shown) :]
        self.begin, self.end = self.end, end
        self.shown = self._decoded(self.begin, self.end)
        return self.stops.add(new)

    def _decoded(self, begin: int, end: int) -> str:
        if begin == end:
            return ""
        return self.tokenizer.decode(
            self.tokens[begin:end], skip_special_tokens=self.skip_special, clean_up_tokenization_spaces=False
        )

"""``lora-ms chat``: a conversation at the terminal."""

import sys
from collections.abc import Sequence
from contextlib import suppress

from lora_ms.config import RunConfig
from lora_ms.data.example import Message
from lora_ms.errors import LoraMsError
from lora_ms.infer.generate import Speaker
from lora_ms.recipes import session
from lora_ms.recipes.generate import model_for_use, sampling_notes, sampling_of, speaker_for

HELP = "/reset forgets the conversation, /exit leaves"


def fit_history(speaker: Speaker, history: list[Message], opening: Sequence[Message] = ()) -> int:
    """Drops the oldest turns until prompt and answer fit the model; returns the number of messages dropped.

    opening: the messages before them, which stay.

    Raises:
        LoraMsError: the newest message alone is too long.
    """
    room = speaker.max_length - min(speaker.max_new_tokens, speaker.max_length // 2)
    dropped = 0
    while (length := speaker.prompt_length([*opening, *history])) > room:
        if len(history) < 3:
            raise LoraMsError(f"this message makes a prompt of {length} tokens, and there is room for {room}")
        del history[:2]
        dropped += 2
    return dropped


def show(text: str) -> None:
    """Writes to the terminal, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def run(config: RunConfig, system: str | None = None) -> None:
    """Reads messages until /exit or the end of input.

    system: a message before the conversation, which /reset does not forget.
    """
    session.check_alone(config, "chat")
    runtime = session.start(config)
    speaker = speaker_for(config, model_for_use(config, runtime), sampling_of(config))
    for line in (*sampling_notes(config), f"chat: {HELP}"):
        print(line)
    with suppress(ImportError):  # line editing, and earlier lines by the arrow keys; not every Python has it
        import readline  # noqa: F401
    opening = [Message("system", system)] if system else []
    history: list[Message] = []
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text == "/exit":
            return
        if text == "/reset":
            history.clear()
            print("forgotten")
        elif text.startswith("/"):
            print(HELP)
        elif text:
            turn(speaker, history, text, opening)


def turn(speaker: Speaker, history: list[Message], text: str, opening: Sequence[Message] = ()) -> None:
    """One question and its streamed answer; Ctrl-C ends the answer, and both are forgotten."""
    history.append(Message("user", text))
    try:
        dropped = fit_history(speaker, history, opening)
        if dropped:
            print(f"({dropped} old messages left out: the conversation is longer than the model takes)")
        (answer,) = speaker.answers([[*opening, *history]], show)
        print()
        history.append(Message("assistant", answer))
    except (KeyboardInterrupt, LoraMsError) as stopped:
        history.pop()
        print(f"\n{str(stopped) or 'stopped'}")

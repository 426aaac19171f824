"""An Ollama Modelfile with the chat template of the training: Jinja's, taken apart by what it shows, written in Go's.

A template is written where its text is the texts of its turns one after another, each between a beginning and an end
that depend on its role alone. Whether that is so is found by rendering conversations and comparing.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from lora_ms.errors import LoraMsError

Render = Callable[[Sequence[Mapping[str, str]], bool], str]  # messages, and whether an answer is to follow -> text
ROLES = ("system", "user", "assistant")
SYSTEM, USER, USER_2, ANSWER, ANSWER_2 = "sysA", "useB", "useC", "ansD", "ansE"


class TemplateFault(Exception):
    """A template refuses a conversation; the text says why."""


class Turns(NamedTuple):
    """A template. opening: before all, where no system message begins. around: role -> text before and after it.
    prompt: what asks for an answer."""

    opening: str
    around: dict[str, tuple[str, str]]
    prompt: str

    def text(self, messages: Sequence[Mapping[str, str]], prompt: bool) -> str:
        begun = "" if messages[0]["role"] == "system" else self.opening
        turns = "".join(self.around[m["role"]][0] + m["content"] + self.around[m["role"]][1] for m in messages)
        return begun + turns + (self.prompt if prompt else "")


def conversation(*texts: str) -> list[dict[str, str]]:
    roles = {SYSTEM: "system", USER: "user", USER_2: "user", ANSWER: "assistant", ANSWER_2: "assistant"}
    return [{"role": roles[text], "content": text} for text in texts]


def turns_of(render: Render) -> Turns | None:
    """The turns of a template; None where it is not made of such. One that refuses a system message has no such turn.

    Raises:
        TemplateFault: ``render``'s, of a conversation without a system message.
    """
    alone = render(conversation(USER), False)
    two = render(conversation(USER, ANSWER, USER_2, ANSWER_2), False)
    if alone.count(USER) != 1 or [two.count(t) for t in (USER, ANSWER, USER_2, ANSWER_2)] != [1] * 4:
        return None
    after_user = alone[alone.index(USER) + len(USER) :]
    middle = two[two.index(USER) + len(USER) : two.index(ANSWER)]
    between = two[two.index(ANSWER) + len(ANSWER) : two.index(USER_2)]
    after_answer = two[two.index(ANSWER_2) + len(ANSWER_2) :]
    if not middle.startswith(after_user) or not between.startswith(after_answer):
        return None
    before_answer = middle[len(after_user) :]
    before_user = between[len(after_answer) :]
    beginning = alone[: alone.index(USER)]
    if not beginning.endswith(before_user):
        return None
    opening = beginning[: len(beginning) - len(before_user)]
    prompt = render(conversation(USER), True)[len(alone) :]
    around = {"user": (before_user, after_user), "assistant": (before_answer, after_answer)}
    try:
        with_system = render(conversation(SYSTEM, USER), False)
    except TemplateFault:
        with_system = ""
    if with_system.count(SYSTEM) == 1:
        rest = with_system[with_system.index(SYSTEM) + len(SYSTEM) :]
        end = before_user + USER + after_user
        if not rest.endswith(end):
            return None
        around["system"] = (with_system[: with_system.index(SYSTEM)], rest[: len(rest) - len(end)])
    turns = Turns(opening, around, prompt)
    trials = [(USER,), (USER, ANSWER, USER_2), (USER, ANSWER, USER_2, ANSWER_2)]
    if "system" in around:
        trials += [(SYSTEM, USER), (SYSTEM, USER, ANSWER, USER_2)]
    right = all(
        turns.text(conversation(*trial), prompt) == render(conversation(*trial), prompt)
        for trial in trials
        for prompt in (False, True)
        if not (prompt and trial[-1].startswith("ans"))
    )
    return turns if right else None


def go_template(turns: Turns, bos: str) -> str:
    """``turns`` in Go's language of templates, as Ollama reads it.

    bos: the begin token where llama.cpp puts it before every text itself: it is taken from the beginning. A template
        that has it before each question, as Mistral's, keeps it before those after the first message.

    Raises:
        LoraMsError: a text that cannot be written there.
    """
    opening = turns.opening
    system = turns.around.get("system", ("", ""))
    if bos:
        opening = opening.removeprefix(bos)
        system = (system[0].removeprefix(bos), system[1])
    around = {**turns.around, "system": system}
    texts = [opening, turns.prompt, *(text for pair in around.values() for text in pair)]
    if any("{{" in text or "}}" in text or '"""' in text for text in texts):
        raise LoraMsError('it holds {{, }} or """')
    messages = "range .Messages"
    before_user, after_user = around["user"]
    if bos and not turns.opening and before_user.startswith(bos):
        messages = "range $i, $_ := .Messages"
        around["user"] = (f"{{{{ if $i }}}}{bos}{{{{ end }}}}{before_user.removeprefix(bos)}", after_user)
    start = [f'{{{{ if ne (index .Messages 0).Role "system" }}}}{opening}{{{{ end }}}}'] if opening else []
    branches = [
        f' if eq .Role "{role}" }}}}{around[role][0]}{{{{ .Content }}}}{around[role][1]}'
        for role in ROLES
        if role in turns.around
    ]
    return "".join(start) + f"{{{{ {messages} }}}}{{{{" + "{{ else".join(branches) + "{{ end }}{{ end }}" + turns.prompt


def modelfile(base: str, adapter: str | None, template: str | None, stops: Sequence[str], why_none: str = "") -> str:
    """The text of a Modelfile.

    base, adapter: paths. template: Go's. stops: texts that end an answer. why_none: said where there is no template.
    """
    lines = [f"FROM {base}"]
    if adapter is not None:
        lines.append(f"ADAPTER {adapter}")
    if template is not None:
        lines.append(f'TEMPLATE """{template}"""')
    else:
        lines.append(f"# no TEMPLATE: {why_none}; Ollama takes what it finds in the file FROM names")
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in dict.fromkeys(stops)]
    return "\n".join(lines) + "\n"

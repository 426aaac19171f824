"""Chat templates by name, for tokenizers that have none of their own: Jinja, as transformers takes it.

Every assistant turn closes with the tokenizer's end token or the format's own. ``messages`` begin with at most one
system message.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lora_ms.errors import LoraMsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What the formats themselves say: the wordings that models trained in them know.
ALPACA_PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
ALPACA_PREAMBLE_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
VICUNA_PREAMBLE = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
INPUT_HEADING = "\n\n### Input:\n"  # in templates that set Alpaca's "input" apart from the instruction

_TURNS = (
    "{% if messages and messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = DEFAULT %}{% set turns = messages %}{% endif %}"
)
_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_QWEN_SYSTEM = (
    "{% if messages and messages[0].role != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
)
_LLAMA2 = (
    "{% for m in turns %}{% if m.role == 'assistant' %}{{ ' ' + m.content + ' ' + eos_token }}{% else %}"
    "{{ '' if loop.first else bos_token }}{{ '[INST] ' }}"
    "{{ '<<SYS>>\n' + system + '\n<</SYS>>\n\n' if loop.first and system else '' }}{{ m.content + ' [/INST]' }}"
    "{% endif %}{% endfor %}"
)
_LLAMA3 = (
    "{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_ALPACA = (
    "{{ system }}{% for m in turns %}{% if m.role == 'assistant' %}"
    "{{ '\n\n### Response:\n' + m.content + eos_token }}{% else %}{{ '\n\n### Instruction:\n' + m.content }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '\n\n### Response:\n' }}{% endif %}"
)
_VICUNA = (
    "{{ system }}{% for m in turns %}{% if m.role == 'assistant' %}{{ ' ASSISTANT: ' + m.content + eos_token }}"
    "{% else %}{{ ('' if loop.first and not system else ' ') + 'USER: ' + QUESTION }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT: ' }}{% endif %}"
)
_ALPACA_QUESTION = (
    f"('{ALPACA_PREAMBLE_WITH_INPUT}' if '### Input:' in m.content else '{ALPACA_PREAMBLE}')"
    " + '\n\n### Instruction:\n' + m.content + '\n\n### Response:'"
)
_DEEPSEEK = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content + '\n\n' }}{% elif m.role == 'assistant' %}"
    "{{ 'Assistant: ' + m.content + eos_token }}{% else %}{{ 'User: ' + m.content + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)
_HUMAN_ASSISTANT = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content + '\n\n' }}{% elif m.role == 'assistant' %}"
    "{{ 'Assistant: ' + m.content + eos_token + ('' if loop.last else '\n\n') }}{% else %}"
    "{{ 'Human: ' + m.content + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)


def _with_system(template: str, default: str) -> str:
    return _TURNS.replace("DEFAULT", repr(default)) + template


TEMPLATES = {
    "chatml": _CHATML,
    "llama2": _with_system(_LLAMA2, ""),
    "llama3": _LLAMA3,
    "qwen": _QWEN_SYSTEM + _CHATML,
    "alpaca": _with_system(_ALPACA, ALPACA_PREAMBLE),
    "vicuna": _with_system(_VICUNA, VICUNA_PREAMBLE).replace("QUESTION", "m.content"),
    "deepseek": _DEEPSEEK,
    "human_assistant": _HUMAN_ASSISTANT,
    # what MindFormers' AlpacaInstructDataHandler writes: Alpaca's prompt as a question to Vicuna
    "alpaca_vicuna": _with_system(_VICUNA, VICUNA_PREAMBLE).replace("QUESTION", f"({_ALPACA_QUESTION})"),
}


def template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's own template, of several the one named default; Alpaca's for one without.

    Raises LoraMsError where there are several and none of that name.
    """
    if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
        names = ", ".join(sorted(tokenizer.chat_template))
        raise LoraMsError(
            f"the tokenizer has several chat templates and no default: give --chat_template one of {names}"
        )
    return tokenizer.get_chat_template() if tokenizer.chat_template else TEMPLATES["alpaca"]


def set_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Give the tokenizer the template `name`: one of ours, of its own, or in a file; it is saved with the tokenizer.

    A named template begins with the tokenizer's begin token where the tokenizer puts it before every text.

    Raises LoraMsError for an unknown name.
    """
    if name in TEMPLATES:
        tokenizer.chat_template = ("{{ bos_token }}" if begins_with_bos(tokenizer) else "") + TEMPLATES[name]
        return
    named = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    if name in named:
        tokenizer.chat_template = named[name]
        return
    if not Path(name).is_file():
        raise LoraMsError(f"chat_template {name}: no such file, and none of {', '.join((*TEMPLATES, *sorted(named)))}")
    try:
        tokenizer.chat_template = Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LoraMsError(f"chat_template {name}: not readable as UTF-8 text") from error


def begins_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer itself puts its begin token before a text."""
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id

"""Chat templates by name, for tokenizers that have none of their own: Jinja, as transformers takes it.

Every assistant turn closes with the tokenizer's end token or the format's own. ``messages`` begin with at most one
system message.
"""

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

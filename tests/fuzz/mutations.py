"""Small damages to files, from a seeded generator: to bytes, to JSON values and to texts that are programs."""

import copy
import json
import random
from typing import Any

NESTED: Any = [[]]
for _ in range(300):
    NESTED = [NESTED]
ODD_VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 7, 10**6, 2**31, 2**63, 2**64, 10**30, 0.5, -0.0, 1e308, float("nan"),
    float("inf"), "", "x", "1", "null", "../x", "/etc/hostname", "\x1b[2J", "\ud800", "\x00", "(", "(a+)+$", "é" * 300,
    [], [None], [[1]], {}, {"": None}, {"a": {"b": []}}, NESTED, ["x"] * 300, "9" * 5000,
]  # fmt: skip
WORDS = [
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b",",
    b":",
    b"\n",
    b"\x00",
    b"\xff",
    b"\\u",
    b"-",
    b"9" * 30,
    b"null",
    b"\xef\xbb\xbf",
]


def damaged_bytes(rng: random.Random, content: bytes, head: int | None = None) -> bytes:
    """With one to four places changed, cut out or doubled; head: only among the first bytes."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        size = min(len(data), head or len(data))
        place = rng.randrange(size + 1)
        match rng.randrange(7):
            case 0 if place < len(data):
                data[place] ^= 1 << rng.randrange(8)
            case 1 if place < len(data):
                data[place] = rng.randrange(256)
            case 2:
                data[place:place] = rng.choice(WORDS)
            case 3:
                del data[place : place + rng.choice((1, 2, 8, 64, 1000))]
            case 4:
                end = place + rng.choice((1, 4, 32))
                data[place:place] = data[place:end] * rng.choice((1, 2, 50))
            case 5:
                del data[place:]
            case _:
                data[place:place] = rng.randbytes(rng.choice((1, 4, 32)))
    return bytes(data)


def damaged_value(rng: random.Random, value: Any) -> Any:
    """A copy of a JSON value with one or two places changed, left out or doubled."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2))):
        value = _damaged_once(rng, value)
    return value


def _damaged_once(rng: random.Random, value: Any) -> Any:
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        match rng.randrange(8):
            case 0:
                del value[key]
            case 1:
                value[rng.choice(("x", "", "__metadata__", key + "x"))] = value[key]
            case 2 | 3:
                value[key] = copy.deepcopy(rng.choice(ODD_VALUES))
            case _:
                value[key] = _damaged_once(rng, value[key])
        return value
    if isinstance(value, list) and value and rng.random() < 0.8:
        place = rng.randrange(min(len(value), 200))
        match rng.randrange(5):
            case 0:
                del value[place]
            case 1:
                value.insert(place, copy.deepcopy(rng.choice(ODD_VALUES)))
            case _:
                value[place] = _damaged_once(rng, value[place])
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and rng.random() < 0.5:
        return value + rng.choice((-1, 1, 8, -value, value, 0.5))
    if isinstance(value, str) and rng.random() < 0.3:
        return value + rng.choice(("x", "\n", "\x1b[2J", "*", "(", "}}"))
    return copy.deepcopy(rng.choice(ODD_VALUES))


def damaged_json(rng: random.Random, content: bytes) -> bytes:
    """A JSON file: most often a value of it changed, else its bytes, or a key written twice."""
    if rng.random() < 0.25:
        return damaged_bytes(rng, content)
    value = damaged_value(rng, json.loads(content))
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    if rng.random() < 0.05 and text.startswith("{") and len(text) > 2:
        text = text[:-1] + "," + text[1:]  # every key twice
    return text.encode(errors="surrogatepass")


def damaged_safetensors(rng: random.Random, content: bytes) -> bytes:
    """A safetensors file: most often its header."""
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    choice = rng.random()
    if choice < 0.2:
        return damaged_bytes(rng, content)
    if choice < 0.3:
        return damaged_bytes(rng, content, head=12)
    if choice < 0.4:
        return content[:8] + damaged_bytes(rng, header) + data
    if choice < 0.5:
        header = damaged_bytes(rng, header)
    elif choice < 0.75:
        header = json.dumps(damaged_value(rng, json.loads(header))).encode(errors="surrogatepass")
    else:
        header = _contradicting(rng, json.loads(header))
    return len(header).to_bytes(8, "little") + header + data


def _contradicting(rng: random.Random, header: dict[str, Any]) -> bytes:
    """Offsets, types and shapes of tensors exchanged, moved and stretched."""
    names = [name for name in header if name != "__metadata__"]
    one, other = header[rng.choice(names)], header[rng.choice(names)]
    step = rng.choice((-4096, -8, -4, -1, 1, 2, 4, 8, 4096, 2**63, 2**64))
    start, end = one["data_offsets"]
    match rng.randrange(9):
        case 0:
            one["data_offsets"] = [start + step, end]
        case 1:
            one["data_offsets"] = [start, end + step]
        case 2:
            one["data_offsets"] = [start + step, end + step]
        case 3:
            one["data_offsets"] = [end, start]
        case 4:
            one["data_offsets"] = other["data_offsets"]
        case 5:
            one["dtype"] = rng.choice(("F16", "BF16", "F64", "BOOL", "F4", "I64", "f32", "C128", ""))
        case 6:
            one["shape"] = rng.choice(([], [0], [2**63, 0], [2**63, 2], one["shape"][::-1], [*one["shape"], 1]))
        case 7:
            header["hole"] = {"dtype": "F32", "shape": [0], "data_offsets": [start + step, start + step]}
        case _:
            one["data_offsets"] = [float(start), end]
    text = json.dumps(header)
    if rng.random() < 0.15:
        text = text.replace(str(start), f"-{start}", 1)
    if rng.random() < 0.1:
        text += rng.choice((" ", "\n", "\x00", "{}"))
    return text.encode()


YAML_LINES = (
    "a: &a [*a]",
    "b: &b {<<: *b}",
    "seed: !!float x",
    "seed: !!int ''",
    "seed: 2001-99-99",
    "seed: 0x" + "f" * 400,
    "seed: " + "9" * 5000,
    "seed: .inf",
    "seed: !!python/object/apply:os.getpid []",
    "? [1]\n: 2",
    "seed: [",
    "context: x",
    "runner_config: [1]",
    "model: {model_config: 5}",
    "train_dataset: {batch_size: x}",
    "callbacks: {a: 1}",
    "callbacks: [{type: [1]}]",
    "seed: !!timestamp x",
    "seed: !!bool x",
    "seed: !!set {a}",
    "x: " + "[" * 2000,
    "l0: &l0 [x,x,x,x,x,x,x,x]\n" + "".join(f"l{i}: &l{i} [{','.join([f'*l{i - 1}'] * 8)}]\n" for i in range(1, 9)),
    "m0: &m0 {a: 1}\n" + "".join(f"m{i}: &m{i} {{<<: [{','.join([f'*m{i - 1}'] * 8)}]}}\n" for i in range(1, 9)),
    "%YAML 9.9",
    "--- 1\n--- 2",
    "\ttab: 1",
    "seed: \x07",
    "load_checkpoint: \ud800",
)


def damaged_yaml(rng: random.Random, content: bytes) -> bytes:
    """A YAML file: a line of it left out, moved or replaced, or its bytes."""
    if rng.random() < 0.3:
        return damaged_bytes(rng, content)
    lines = content.decode().split("\n")
    place = rng.randrange(len(lines))
    match rng.randrange(4):
        case 0:
            del lines[place]
        case 1:
            lines.insert(place, lines[place][rng.randrange(3) :])
        case 2:
            key, colon, _ = lines[place].partition(":")
            value = json.dumps(rng.choice(ODD_VALUES))
            lines[place] = f"{key}{colon} {value}"
        case _:
            lines.insert(place if rng.random() < 0.3 else len(lines), rng.choice(YAML_LINES))
    return "\n".join(lines).encode(errors="surrogatepass")


JINJA = (
    "{{ messages }}",
    "{{ messages[9].content }}",
    "{{ 9 ** 99999999 }}",
    "{{ 'a' * 10 ** 10 }}",
    "{{ raise_exception('\x1b[2J') }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(10 ** 12) %}{% endfor %}",
    "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch PWNED') }}",
    "{{ self.__init__.__globals__ }}",
    "{% include '/etc/hostname' %}",
    "{% import 'os' as os %}",
    "{{ lipsum(n=9999) }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% generation %}x{% endgeneration %}",
    "{% endfor %}",
    "{{ '%s' % messages }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{{ messages.append(1) }}",
    "{{ messages | tojson }}",
    "{{ 1 / 0 }}",
    "{{ strftime_now('%Y' * 100) }}",
    "{% if true %}",
    "{{",
    "{{ messages | map(attribute='__class__') | list }}",
    "{{ (('a' * 100) | list) | join('b' * 100) }}",
    "{{ undefined.x }}",
    "{{ 'a' | center(10 ** 10) }}",
    "{{ range(10 ** 9) | list }}",
    "{{ dict(a=1).popitem() }}",
    "{{ [1] | batch(10 ** 9) | list }}",
    "{{ '%0999999999d' % 1 }}",
    "{{ '{:>999999999}'.format(1) }}",
    "\ud800",
)


def damaged_template(rng: random.Random, content: bytes) -> bytes:
    """A chat template: with another program in it, or its bytes changed."""
    if rng.random() < 0.4:
        return damaged_bytes(rng, content)
    text = content.decode()
    place = rng.randrange(len(text) + 1)
    piece = rng.choice(JINJA)
    text = piece if rng.random() < 0.4 else text[:place] + piece + text[place:]
    return text.encode(errors="surrogatepass")

"""Write the bundled tiny model's corpus: short questions and answers of twenty kinds, in English and Chinese.

    python make_corpus.py --out DIR [--seed 0] [--limit ROWS]

DIR/train.jsonl    one {"messages": [user, assistant]} a line
DIR/heldout.jsonl  200 such rows with their "kind": five for each kind and language, none of them in train.jsonl

What is held out is a group. For questions that are computed (sums, sorting, copying ...) the group is the operands, so
that no wording and neither language ever shows them in training. For facts (capitals, translations ...) it is the fact
in one wording: the fact is met in other wordings. For talk (greetings, identity ...) it is the prompt.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import facts
from phrasings import CHAT, PREFIXES, TASKS

EXAMPLES = Path(__file__).resolve().parent.parent
Row = dict[str, object]  # one line of a .jsonl file

LANGUAGES = ("en", "zh")
HELDOUT_PER_CELL = 5  # rows for each kind and language: 20 * 2 * 5 = 200
HELDOUT_SHARE = 0.05  # of the operand groups of a computed kind
PREFIXED = 0.15  # of the rows begin with "Please tell me: " or the like
COMPUTED = ("addition", "subtraction", "counting", "comparison", "sorting", "copying", "reversing", "successor")

# Training rows for each language. Computing kinds need most operands shown; facts need each wording once or twice.
ROWS = {
    "greeting": 250,
    "identity": 1000,
    "courtesy": 250,
    "addition": 3200,
    "subtraction": 2200,
    "counting": 1000,
    "comparison": 2000,
    "sorting": 2600,
    "copying": 2600,
    "reversing": 2600,
    "successor": 1000,
    "opposites": 600,
    "capitals": 400,
    "translation": 1600,
    "letters": 900,
    "uppercase": 400,
    "calendar": 400,
    "colours": 300,
    "sounds": 250,
    "yes_no": 1200,
}


@dataclass(frozen=True)
class Item:
    """One question in one wording, before a prefix is put in front."""

    kind: str
    language: str
    variant: str
    group: str
    prompt: str
    answer: str


def expand(pattern: str) -> list[str]:
    """Every reading of a pattern in which ``[a|b]`` stands for either."""
    parts = re.split(r"\[([^\]]*)\]", pattern)
    choices = [part.split("|") if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(choice) for choice in itertools.product(*choices)]


def normalise(prompt: str) -> str:
    """The prompt without what a typist varies: case, spaces, and the mark at the end."""
    return re.sub(r"\s+", "", prompt).casefold().rstrip(".?!。？！，,")


def prompts_kept_for_identity(path: Path) -> set[str]:
    """Normalised prompts of the identity fine-tune's held-out file, which the base model must not have met either."""
    with path.open(encoding="utf-8") as lines:
        return {normalise(json.loads(line)["prompt"]) for line in lines}


def han_characters(folder: Path) -> list[str]:
    """The Chinese characters of the example datasets, sorted: copying them trains the embeddings they need."""
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.jsonl")))
    return sorted(set(re.findall(r"[\u4e00-\u9fff]", text)))


def with_article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def operands(kind: str, rng: random.Random) -> Iterator[tuple[str, dict[str, object], dict[str, str]]]:
    """(group, filling of the wording, variant -> answer) for the computed kinds; the same in both languages."""
    if kind == "addition":
        for a, b in itertools.product(range(21), repeat=2):
            yield f"{min(a, b)}+{max(a, b)}", {"a": a, "b": b}, {"": str(a + b)}
    elif kind == "subtraction":
        for a, b in itertools.combinations_with_replacement(range(20, -1, -1), 2):
            yield f"{a}-{b}", {"a": a, "b": b}, {"": str(a - b)}
    elif kind == "counting":
        for a, length in itertools.product(range(31), range(3, 6)):
            numbers = " ".join(str(n) for n in range(a, a + length))
            yield f"{a}..{a + length - 1}", {"a": a, "b": a + length - 1}, {"": numbers}
    elif kind == "comparison":
        for a, b in itertools.permutations(range(31), 2):
            yield f"{min(a, b)}<{max(a, b)}", {"a": a, "b": b}, {"max": str(max(a, b)), "min": str(min(a, b))}
    elif kind == "sorting":
        for shown in itertools.permutations("0123456789", 3):
            group = "".join(sorted(shown))
            yield group, {"s": "".join(shown)}, {"up": group, "down": group[::-1]}
    elif kind == "reversing":
        for text in [f"{n:02d}" for n in range(100)] + [f"{n:03d}" for n in range(1000)]:
            yield text, {"s": text}, {"": text[::-1]}
    elif kind == "successor":
        for a in range(1, 100):
            yield str(a), {"a": a}, {"next": str(a + 1), "previous": str(a - 1)}
    elif kind == "copying":
        for text in strings_to_copy(rng):
            yield text, {"s": text}, {"": text}


def strings_to_copy(rng: random.Random) -> Iterator[str]:
    """Digits, words, made-up names and Chinese characters, most of the last so that rare ones are met often enough."""
    han = han_characters(EXAMPLES)
    words = sorted(facts.NOUNS) + sorted(facts.WORDS)
    for _ in range(400):
        yield "".join(rng.choices("0123456789", k=rng.randint(2, 3)))
        yield " ".join(rng.sample(words, rng.randint(1, 2)))
        yield "".join(rng.choices(facts.SYLLABLES, k=2)).capitalize()
    for _ in range(4):
        rng.shuffle(han)
        for start in range(0, len(han) - 1, 2):
            yield han[start] + han[start + 1]


def fillings(kind: str, language: str) -> Iterator[tuple[str, dict[str, str]]]:
    """(word in the question, variant -> answer) for the kinds that are facts."""
    english = language == "en"
    translations = {word: chinese for word, (chinese, _) in facts.NOUNS.items()} | facts.WORDS
    if kind == "opposites":
        for a, b in (facts.OPPOSITES if english else facts.OPPOSITES_ZH).items():
            yield a, {"": b}
            yield b, {"": a}
    elif kind == "capitals":
        for country, (capital, country_zh, capital_zh) in facts.CAPITALS.items():
            yield (
                (country, {"": f"The capital of {country} is {capital}."})
                if english
                else (country_zh, {"": f"{country_zh}的首都是{capital_zh}。"})
            )
    elif kind == "translation":
        for word, chinese in translations.items():
            yield word, {"to_zh": chinese}
            yield chinese, {"to_en": word}
    elif kind == "letters":
        for word in facts.NOUNS:
            yield word, {"first": word[0], "last": word[-1]}
    elif kind == "uppercase":
        for word in list(facts.NOUNS)[:36]:
            yield word, {"": word.upper()}
    elif kind == "calendar":
        for cycle in (facts.DAYS, facts.MONTHS) if english else (facts.DAYS_ZH, facts.MONTHS_ZH):
            for i, name in enumerate(cycle):
                yield name, {"next": cycle[(i + 1) % len(cycle)], "previous": cycle[i - 1]}
    elif kind == "colours":
        for thing, (colour, thing_zh, colour_zh) in facts.COLOURS.items():
            yield (
                (thing, {"": f"{thing[0].upper()}{thing[1:]} is {colour}."})
                if english
                else (thing_zh, {"": f"{thing_zh}是{colour_zh}的。"})
            )
    elif kind == "sounds":
        for animal, (sound, animal_zh, sound_zh) in facts.SOUNDS.items():
            yield (
                (animal, {"": f"A {animal} says {sound}."})
                if english
                else (animal_zh, {"": f"{animal_zh}叫{sound_zh}。"})
            )


def yes_no_items(language: str) -> Iterator[Item]:
    """One true question and one false one for each noun and wording; the false category turns with the wording."""
    names = list(facts.CATEGORIES)
    for number, (noun, (noun_zh, category)) in enumerate(facts.NOUNS.items()):
        others = [name for name in names if name != category]
        for w, wording in enumerate(TASKS["yes_no"][language][""]):
            for truth, asked in ((True, category), (False, others[(number + w) % len(others)])):
                if language == "en":
                    # Colours and coloured fruit: "the word red" would be pedantry, "is red a colour" is what is said.
                    subject = noun if category == "colour" else with_article(noun)
                    prompt, answer = wording.format(w=subject, c=with_article(asked)), "Yes." if truth else "No."
                else:
                    prompt, answer = wording.format(w=noun_zh, c=facts.CATEGORIES[asked]), "是。" if truth else "不是。"
                yield Item("yes_no", language, str(truth), f"{language}:{w}:{noun}:{asked}", prompt, answer)


def items(kind: str, language: str, seed: int) -> list[Item]:
    """Every question of a kind in a language."""
    found: list[Item] = []
    if kind in CHAT:
        for number, (answer, patterns) in enumerate(CHAT[kind][language].items()):
            prompts = dict.fromkeys(prompt for pattern in patterns for prompt in expand(pattern))
            found += [Item(kind, language, str(number), f"{language}:{normalise(p)}", p, answer) for p in prompts]
    elif kind == "yes_no":
        found += yes_no_items(language)
    elif kind in COMPUTED:
        # Seeded by kind alone, so that both languages get the same operands.
        for group, filling, answers in operands(kind, random.Random(f"{seed}/{kind}")):
            for variant, wordings in TASKS[kind][language].items():
                found += [
                    Item(kind, language, variant, group, text.format(**filling), answers[variant]) for text in wordings
                ]
    else:
        for word, answers in fillings(kind, language):
            for variant, answer in answers.items():
                for number, text in enumerate(TASKS[kind][language][variant]):
                    group = f"{language}:{number}:{variant}:{word}"
                    found.append(Item(kind, language, variant, group, text.format(w=word), answer))
    return found


def choose_heldout(pools: dict[str, list[Item]], rng: random.Random, kept: set[str]) -> tuple[list[Item], set[str]]:
    """Five items for each language of one kind, turning through the variants, and every group that is held out.

    No two come from one group, nor for facts from one answer, so that no fact loses more than one wording.
    """
    chosen: list[Item] = []
    groups: set[str] = set()
    for language in LANGUAGES:
        by_variant: dict[str, list[Item]] = defaultdict(list)
        for item in rng.sample(pools[language], len(pools[language])):
            by_variant[item.variant].append(item)
        turns = itertools.cycle(sorted(by_variant))
        taken, answers = 0, set()
        while taken < HELDOUT_PER_CELL:
            item = by_variant[next(turns)].pop()
            repeated = item.kind not in CHAT and item.kind != "yes_no" and item.answer in answers
            if item.group in groups or repeated or normalise(item.prompt) in kept:
                continue
            chosen.append(item)
            groups.add(item.group)
            answers.add(item.answer)
            taken += 1
    if chosen[0].kind in COMPUTED:
        everything = sorted({item.group for item in pools["en"]} - groups)
        rng.shuffle(everything)
        groups.update(everything[: max(0, round(HELDOUT_SHARE * (len(everything) + len(groups))) - len(groups))])
    return chosen, groups


def dress(item: Item, rng: random.Random) -> str:
    """The prompt as someone might type it: a prefix now and then, a capital or the last mark missing now and then."""
    prompt = item.prompt
    if item.kind not in ("greeting", "courtesy") and rng.random() < PREFIXED:
        prompt = rng.choice(PREFIXES[item.language]) + prompt
    habit = rng.random()
    if habit < 0.3 and item.kind != "copying":
        prompt = prompt.rstrip(".?!。？！")
    if habit < 0.15:
        prompt = prompt[0].lower() + prompt[1:]
    return prompt


def rows_for(pool: list[Item], wanted: int, forbidden: set[str], rng: random.Random) -> list[tuple[str, str]]:
    """Up to ``wanted`` distinct (prompt, answer) pairs, going evenly round the questions in a shuffled order."""
    rows: dict[str, str] = {}
    order = rng.sample(pool, len(pool))
    # Ten rounds leave few dressings unseen; a kind with fewer gives fewer rows.
    for item in itertools.chain.from_iterable(itertools.repeat(order, 10)):
        if len(rows) == wanted:
            break
        prompt = dress(item, rng)
        if normalise(prompt) not in forbidden and normalise(item.prompt) not in forbidden:
            rows.setdefault(prompt, item.answer)
    return list(rows.items())


def build(seed: int = 0, limit: int | None = None) -> tuple[list[Row], list[Row], Counter[str]]:
    """The training rows, the 200 held-out rows, and the number of training rows of each ``kind/language``.

    ``limit`` shrinks every kind in proportion, to about that many training rows; the held-out rows stay the same.
    """
    kept = prompts_kept_for_identity(EXAMPLES / "identity_heldout.jsonl")
    share = 1.0 if limit is None else limit / (sum(ROWS.values()) * len(LANGUAGES))
    pools: dict[str, dict[str, list[Item]]] = {}
    chosen: list[Item] = []
    held: dict[str, set[str]] = {}
    for kind in ROWS:
        pools[kind] = {language: items(kind, language, seed) for language in LANGUAGES}
        picked, held[kind] = choose_heldout(pools[kind], random.Random(f"{seed}/{kind}/heldout"), kept)
        chosen += picked
    forbidden = kept | {normalise(item.prompt) for item in chosen}

    train: list[Row] = []
    counts: Counter[str] = Counter()
    for kind, language in itertools.product(ROWS, LANGUAGES):
        pool = [item for item in pools[kind][language] if item.group not in held[kind]]
        rng = random.Random(f"{seed}/{kind}/{language}/rows")
        rows = rows_for(pool, max(1, round(ROWS[kind] * share)), forbidden, rng)
        counts[f"{kind}/{language}"] = len(rows)
        train += [{"messages": messages(prompt, answer)} for prompt, answer in rows]
    random.Random(f"{seed}/order").shuffle(train)
    heldout = [{"messages": messages(item.prompt, item.answer), "kind": item.kind} for item in chosen]
    return train, heldout, counts


def messages(prompt: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def write_jsonl(path: Path, rows: Iterable[Row]) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8", newline="\n") as out:
        out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.replace(partial, path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the tiny model's corpus.")
    parser.add_argument("--out", type=Path, required=True, help="folder for train.jsonl and heldout.jsonl")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="about this many training rows; all of them if left out")
    args = parser.parse_args()
    train, heldout, counts = build(args.seed, args.limit)
    args.out.mkdir(parents=True, exist_ok=True)
    write_jsonl(args.out / "train.jsonl", train)
    write_jsonl(args.out / "heldout.jsonl", heldout)
    for cell, count in counts.items():
        print(f"{cell:<20}{count:>7}")
    print(f"{'train rows':<20}{len(train):>7}\n{'held-out rows':<20}{len(heldout):>7}")


if __name__ == "__main__":
    main()

"""Arithmetic word problems of two or three steps, with worked answers that can be checked.

A problem is a chain: something to begin with, then events. Its answer writes down every
calculation and ends as GSM8K's answers do::

    Mia has 14 shells. She finds 8 more. She gives 5 to Tom. How many shells does Mia have now?
    First 14+8=22. Then 22-5=17.
    #### 17

All numbers stay between 1 and 40. No chain of calculations occurs in two splits, whatever the words around it.

    python examples/quickstart/problems.py --out DIR [--seed 1]
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

NAMES = {
    "Mia": "She",
    "Tom": "He",
    "Ana": "She",
    "Ben": "He",
    "Eva": "She",
    "Max": "He",
    "Lily": "She",
    "Sam": "He",
    "Zoe": "She",
    "Leo": "He",
}
THINGS = ("apples", "shells", "books", "cards", "coins", "pens", "stamps", "marbles", "cakes", "stones")
HOLDERS = ("boxes", "bags", "jars", "packs")
GAINS = ("{pro} buys {b} more.", "{pro} finds {b} more.", "{pro} gets {b} from {friend}.")
LOSSES = ("{pro} sells {b}.", "{pro} loses {b}.", "{pro} gives {b} to {friend}.")
QUESTIONS = ("How many {thing} does {name} have now?", "How many {thing} are there in the end?")

# A chain is a beginning and its events, one calculation each save "have": "have" a; "packs" k*m; "gain" +b; "lose" -b.
CHAINS = (
    ("have", "gain", "gain"),
    ("have", "gain", "lose"),
    ("have", "lose", "gain"),
    ("have", "lose", "lose"),
    ("packs", "gain"),
    ("packs", "lose"),
    ("have", "gain", "gain", "lose"),
    ("have", "gain", "lose", "gain"),
    ("have", "lose", "gain", "lose"),
    ("packs", "gain", "gain"),
    ("packs", "gain", "lose"),
    ("packs", "lose", "gain"),
)

# Problems a split; those of "npd" are handed out without their answers.
SPLITS = {"teacher": 12000, "student": 500, "npd": 3000, "test": 400}
UNLABELLED = ("npd",)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One word problem.

    Attributes:
        question: The text the model is asked.
        response: The worked answer, ending in ``#### <answer>``.
        answer: The number asked for.
        key: The chain of calculations, which no two problems of ``make_splits`` share.
    """

    question: str
    response: str
    answer: int
    key: tuple[str, ...]

    def record(self, *, labelled: bool = True) -> dict:
        """The JSONL record: ``messages``, and ``response`` where ``labelled``."""
        record: dict = {"messages": [{"role": "user", "content": self.question}]}
        if labelled:
            record["response"] = self.response
        return record


def _draw(rng: random.Random) -> Problem | None:
    """One problem, or None where a number left 1..40."""
    name, friend = rng.sample(list(NAMES), 2)
    words = {"name": name, "pro": NAMES[name], "friend": friend, "thing": rng.choice(THINGS)}
    chain = rng.choice(CHAINS)
    sentences, calculations = [], []
    value = 0
    for part in chain:
        if part == "have":
            value = rng.randint(3, 20)
            sentences.append("{name} has {a} {thing}.".format(a=value, **words))
        elif part == "packs":
            count, size = rng.randint(2, 6), rng.randint(2, 6)
            value = count * size
            text = "{name} has {k} {holder} of {m} {thing}."
            sentences.append(text.format(k=count, m=size, holder=rng.choice(HOLDERS), **words))
            calculations.append(f"{count}*{size}={value}")
        else:
            amount = rng.randint(2, 12)
            sign, change = ("+", amount) if part == "gain" else ("-", -amount)
            sentences.append(rng.choice(GAINS if part == "gain" else LOSSES).format(b=amount, **words))
            calculations.append(f"{value}{sign}{amount}={value + change}")
            value += change
        if not 1 <= value <= 40:
            return None
    sentences.append(rng.choice(QUESTIONS).format(**words))
    openings = ("First", "Then", "Then")
    worked = " ".join(f"{opening} {text}." for opening, text in zip(openings, calculations, strict=False))
    return Problem(
        question=" ".join(sentences), response=f"{worked}\n#### {value}", answer=value, key=tuple(calculations)
    )


def make_splits(seed: int = 1, sizes: Mapping[str, int] = SPLITS) -> dict[str, list[Problem]]:
    """Draw all splits, a pure function of its arguments.

    Args:
        seed: Seed of the draw.
        sizes: Problems wanted of each split.

    Returns:
        The problems of each split; no ``key`` occurs twice, in one split or in two.
    """
    rng = random.Random(seed)
    pool: dict[tuple[str, ...], Problem] = {}
    while len(pool) < sum(sizes.values()):
        problem = _draw(rng)
        if problem is not None:
            pool.setdefault(problem.key, problem)
    problems = list(pool.values())
    rng.shuffle(problems)  # short chains run out of new numbers: drawn first, they would sit in the first split only
    splits, start = {}, 0
    for name, size in sizes.items():
        splits[name] = problems[start : start + size]
        start += size
    return splits


def write_splits(out_dir: str | Path, seed: int = 1, sizes: Mapping[str, int] = SPLITS) -> dict[str, Path]:
    """Write ``<split>.jsonl`` for every split: ``messages``, and ``response`` except for the prompts of NPD."""
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, problems in make_splits(seed, sizes).items():
        paths[name] = out_dir / f"{name}.jsonl"
        lines = (json.dumps(problem.record(labelled=name not in UNLABELLED)) + "\n" for problem in problems)
        paths[name].write_text("".join(lines))
    return paths


def main() -> None:
    """Command line: write the splits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="directory of the JSONL files")
    parser.add_argument("--seed", type=int, default=1, help="seed of the draw")
    arguments = parser.parse_args()
    for name, path in write_splits(arguments.out, arguments.seed).items():
        print(f"{path}: {SPLITS[name]} problems" + (" without answers" if name in UNLABELLED else ""))


if __name__ == "__main__":
    main()

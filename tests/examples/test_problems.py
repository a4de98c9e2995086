"""The quickstart's problems: their answers are right, their splits apart, their files what the library reads."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megatron_npd.config.run import EvalConfig
from problems import SPLITS, Problem, make_splits, write_splits

SIZES = {"teacher": 400, "student": 60, "npd": 150, "test": 80}


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Problem]]:
    return make_splits(7, SIZES)


def test_sizes_and_seed(splits: dict[str, list[Problem]]) -> None:
    assert {name: len(problems) for name, problems in splits.items()} == SIZES
    assert make_splits(7, SIZES) == splits
    assert make_splits(8, SIZES)["test"] != splits["test"]


def test_no_chain_of_calculations_twice() -> None:
    keys = [problem.key for problems in make_splits(1).values() for problem in problems]
    assert len(keys) == sum(SPLITS.values()) == len(set(keys))


def test_every_answer_is_right(splits: dict[str, list[Problem]]) -> None:
    """Read as a pupil's paper is read: the numbers are the question's, each result is carried on."""
    operations = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}
    lengths = set()
    for problem in (problem for problems in splits.values() for problem in problems):
        given = [int(number) for number in re.findall(r"\d+", problem.question)]
        steps = re.findall(r"(\d+)([-+*])(\d+)=(\d+)", problem.response)
        value = given.pop(0)
        for left, sign, right, result in steps:
            assert (int(left), int(right)) == (value, given.pop(0)), problem
            value = operations[sign](value, int(right))
            assert value == int(result) and 1 <= value <= 40, problem
        assert not given and value == problem.answer, problem
        assert re.findall(EvalConfig().answer_regex, problem.response) == [str(value)]
        assert problem.response.endswith(f"\n#### {value}")
        lengths.add(len(steps))
    assert lengths == {2, 3}


def test_signs_follow_the_words(splits: dict[str, list[Problem]]) -> None:
    sign_of = {"buys": "+", "finds": "+", "gets": "+", "sells": "-", "loses": "-", "gives": "-"}
    for problem in splits["teacher"]:
        verbs = [word for word in re.findall(r"\w+", problem.question) if word in sign_of]
        signs = re.findall(r"\d([-+])\d", problem.response)
        assert [sign_of[verb] for verb in verbs] == signs


def test_files(tmp_path: Path) -> None:
    paths = write_splits(tmp_path, 7, SIZES)
    for name, size in SIZES.items():
        records = [json.loads(line) for line in paths[name].read_text().splitlines()]
        assert len(records) == size
        assert set(records[0]) == ({"messages"} if name == "npd" else {"messages", "response"})
        assert all(message["role"] == "user" for record in records for message in record["messages"])
    assert "####" not in paths["npd"].read_text()

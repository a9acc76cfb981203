"""Malformed input ends in one message, or works with the right result: a sample, and all of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.corpus.__main__ import main
from tests.corpus.case import Case, Refused, judge, sample
from tests.corpus.cases import all_cases
from tests.corpus.ways import WAYS

CASES = all_cases()
EVERY = 30  # of each kind and way, so many cases are left out for one that always runs
ONCE_WRONG = frozenset(Path(__file__).with_name("once_wrong.txt").read_text().split())
CHOSEN = {case.id: case for case in sample(CASES, EVERY)}
CHOSEN |= {case.id: case for case in CASES if case.id in ONCE_WRONG}


@pytest.mark.parametrize("case", CHOSEN.values(), ids=CHOSEN)
def test_sample(case: Case, tmp_path: Path) -> None:
    assert judge(case, WAYS[case.way], tmp_path) == ""


@pytest.mark.campaign
@pytest.mark.parametrize(("kind", "way"), sorted({(case.kind, case.way) for case in CASES}))
def test_all(kind: str, way: str, tmp_path: Path) -> None:
    wrong = {}
    for number, case in enumerate(CASES):
        if (case.kind, case.way) == (kind, way):
            folder = tmp_path / str(number)
            folder.mkdir()
            wrong[case.id] = judge(case, WAYS[case.way], folder)
    assert {name: fault for name, fault in wrong.items() if fault} == {}


def test_words_that_name_no_case_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    for words, status, said in ((["--help"], 0, "usage: "), (["nothing like it"], 2, "no case")):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == status
        assert said in "".join(capsys.readouterr())


def test_cases_are_many_and_have_names_of_their_own() -> None:
    names = [case.id for case in CASES]
    assert len(set(names)) == len(names) >= 500
    assert set(names) >= ONCE_WRONG
    assert {case.way for case in CASES} == WAYS.keys()


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("raise SystemExit('error: bad.json: id 3')", ""),
        ("raise SystemExit('error: bad.json')", "unclear: ['3'] is not in"),
        ("raise SystemExit('error: bad.json: id 3\\nand more')", "unclear: 2 lines"),
        ("raise SystemExit('bad.json: id 3')", "unclear: 'bad.json"),
        ("raise SystemExit(0)", "silent"),
        ("1 / 0", "traceback"),
        ("raise RuntimeError('bad.json: id 3')", "traceback"),
        ("print('Traceback (most recent call last)'); raise SystemExit('error: 3')", "traceback"),
        ("open('trap', 'w').close()", "executed"),
    ],
)
def test_the_judge_is_strict(code: str, expected: str, tmp_path: Path) -> None:
    case = Case("code", "exec", code, lambda _: [code], Refused((r"bad\.json", "3")))
    found = judge(case, lambda words: exec(words[0]), tmp_path)  # what it is about is code
    assert found.startswith(expected) and bool(found) == bool(expected)

"""Mutations: one that is noticed and one that is not, and a table that fits the package."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from tests.conftest import REPOSITORY, load_module


@pytest.fixture(scope="module")
def mutate() -> ModuleType:
    return load_module(REPOSITORY / "tools" / "mutate.py")


@pytest.mark.slow
def test_what_is_noticed_and_what_is_not_are_told_apart(tmp_path: Path, warm_python: str) -> None:
    package = REPOSITORY / "maskdino" / "ops" / "rle.py"
    before = package.read_text()
    mutations = [
        {"from": "mask.view(np.uint8) if", "to": "mask.T.view(np.uint8) if"},
        {"from": "from __future__ import annotations\n", "to": "# nothing\n"},
        {"from": "np.uint8, copy=False", "to": "np.uint8", "equivalent": "so it seems"},
        {"from": "nowhere to be found", "to": ""},
    ]
    table = tmp_path / "table.yaml"
    group = {"tests": ["tests/ops/test_rle.py"], "mutations": mutations}
    table.write_text(yaml.safe_dump({"maskdino/ops/rle.py": group}))
    command = [warm_python, REPOSITORY / "tools" / "mutate.py", "--table", table]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = result.stdout.splitlines()
    verdicts = [line.split()[0] for line in lines[:4]]
    assert verdicts == ["killed", "survived", "equivalent", "unjudged"], result
    assert lines[4:] == [
        "1 killed, 1 survived, 1 equivalent, 1 unjudged",
        "50.0 % of 2 were noticed",
    ]
    assert result.returncode == 1
    assert package.read_text() == before


def test_the_table_names_tests_that_there_are(mutate: ModuleType) -> None:
    mutations = mutate.read_table(mutate.TABLE)
    files = {m.file for m in mutations}
    tests = {test.partition("::")[0] for m in mutations for test in m.tests if "/" in test}
    assert {name for name in files | tests if not (REPOSITORY / name).is_file()} == set()
    assert len(mutations) > 200
    assert len(mutate.read_table(mutate.TABLE, ["ops/boxes"])) < 20


def test_the_table_fits_the_package(mutate: ModuleType) -> None:
    """Who changes code that a mutation changes, changes its entry as well."""
    assert mutate.misfits(mutate.read_table(mutate.TABLE)) == []


def test_an_interrupted_run_goes_on(
    mutate: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Verdicts of the record are kept; what could not be judged is asked for again."""
    names = ("a", "b", "c", "d")
    entries = [{"from": name, "to": "x"} for name in names]
    table, record = tmp_path / "table.yaml", tmp_path / "record"
    table.write_text(yaml.safe_dump({"maskdino/a.py": {"tests": [], "mutations": entries}}))
    old = [("a", "killed"), ("b", "survived"), ("c", "unjudged"), ("c", "unjudged")]
    lines = [f'["maskdino/a.py", "{name}", "x", "{verdict}"]\n' for name, verdict in old]
    record.write_text("".join(lines))
    asked = []

    def judge(mutations: list, limit: float) -> Iterator[tuple]:
        assert limit == 120
        for mutation in mutations:
            asked.append(mutation.before)
            yield mutation, "killed", 1.0

    monkeypatch.setattr(mutate, "judge", judge)
    for expected in (["c", "d"], []):
        asked.clear()
        assert mutate.main(["--table", str(table), "--record", str(record)]) == 1
        assert asked == expected
        assert "3 killed, 1 survived, 0 equivalent, 0 unjudged" in capsys.readouterr().out

"""Released YAML files: numbers are computed, nothing is run."""

from __future__ import annotations

from pathlib import Path

import pytest

from maskdino.checkpoint.released_yaml import calculate, read_released_yaml


@pytest.mark.parametrize(
    "expression",
    [
        "[int(x * 0.1 * 640) for x in range(5, 21)]",
        "[int(0.07 * side * 1000) for side in range(1, 40, 3)]",
        "[480, 512 + 32, 800 - 2 * 16]",
        "[32 * i for i in (20, 21, 25)]",
        "112 * 112",
        "-3 + 2",
        "[[x, 2 * x] for x in range(3)]",
        "[]",
    ],
)
def test_numbers_are_what_python_computes(expression: str) -> None:
    known = {"__builtins__": {"int": int, "range": range}}
    assert calculate(expression) == eval(expression, known)


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('true')",
        "().__class__.__bases__[0]",
        "[x for x in open('/etc/passwd')]",
        "print(1)",
        "int('7')",
        "int(7, 8)",
        "x",
        "'text'",
        "True",
        "10 ** 10 ** 10",
        "7 / 2",
        "1e300 * 1e300",
        "[1] * 10",
        "[x for x in range(10 ** 9)]",
        "[x for x in range(99999)]",
        "[[y for y in range(900)] for x in range(900)]",
        "[x for x in range(4) if x]",
        "[x async for x in range(4)]",
        "[x for x, y in range(4)]",
        "range(1, 2, 0)",
        "[x for x in range(1, 2, 0)]",
        "(lambda: 1)()",
        "[int(x) for x in range(5)",
        "(" * 150 + ")" * 20,
        "1 + " * 100 + "1",
        "",
    ],
)
def test_all_else_is_refused(expression: str) -> None:
    with pytest.raises(ValueError, match="is refused|is no expression|too long"):
        calculate(expression)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def test_bases_lie_below(tmp_path: Path) -> None:
    write(tmp_path / "root.yaml", "A: {x: 1, y: 1}\nB: {c: 1}\n")
    write(
        tmp_path / "sizes.yaml",
        'A: {z: !!python/object/apply:eval ["[int(x * 2.5) for x in range(3)]"]}\n',
    )
    write(tmp_path / "sub" / "middle.yaml", "_BASE_: ../root.yaml\nA: {y: 2}\n")
    leaf = write(
        tmp_path / "leaf.yaml", "_BASE_: [sub/middle.yaml, sizes.yaml]\nB: {c: 3}\nD: (1, 2)\n"
    )
    merged = {"A": {"x": 1, "y": 2, "z": [0, 2, 5]}, "B": {"c": 3}, "D": "(1, 2)"}
    assert read_released_yaml(leaf) == merged


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "A: 1\nB: !!python/object/apply:os.system ['touch TOUCHED']\n",
            "line 2: .*could not deter",
        ),
        ("A: 1\nB: !!python/object/apply:eval ['open(1)']\n", "line 2: .*'open.*is refused"),
        ("B: !!python/object/apply:eval {args: ['1']}\n", "line 1: .*an expression is wanted"),
        ("B: !!python/object/apply:eval ['1', '2']\n", "line 1: .*an expression is wanted"),
        ("A: !!python/name:os.system\n", "line 1: .*could not determine"),
    ],
)
def test_faults_are_one_line_with_file_and_line(text: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "file.yaml", text.replace("TOUCHED", str(tmp_path / "touched")))
    with pytest.raises(ValueError, match=f"file.yaml.*{message}") as error:
        read_released_yaml(path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "touched").exists()

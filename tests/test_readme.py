"""What the pages name is there: symbols of the paper's parts, files, options of the commands."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from maskdino.cli import main
from tests.conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text()
PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    *sorted(REPOSITORY.glob("docs/*.md")),
    *(REPOSITORY / folder / "README.md" for folder in ("configs", "datasets", "demo", "csrc")),
]
TEXT = "\n".join(page.read_text() for page in PAGES if page.is_file())
SYMBOLS = sorted(set(re.findall(r"`([\w/]+\.py)::([\w.]+)`", TEXT)))
BLOCKS = "\n".join(re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)).replace("\\\n", " ")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)
OLD_PLACES = r"(?:^|\s)((?:tools|demo)/\w+\.(?:py|sh))([^\n#]*)"
# What detectron2_tool.py is given are options of detectron2's commands.
COMMANDS = sorted(
    {found for found in re.findall(OLD_PLACES, BLOCKS) if "detectron2_tool" not in found[0]}
)
MASKDINO = sorted(set(re.findall(r"(?:^|\s)maskdino ([a-z-]+)([^\n#]*)", BLOCKS)))


def defined(path: Path) -> set[str]:
    """Names of classes and functions of a file, methods as `Class.method`."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = (part for part in node.body if isinstance(part, ast.FunctionDef))
            names.update(f"{node.name}.{method.name}" for method in methods)
    return names


def test_there_is_something_to_check() -> None:
    assert len(SYMBOLS) > 15
    assert len(COMMANDS) > 10


@pytest.mark.parametrize(("file", "symbol"), SYMBOLS)
def test_part_of_the_paper_is_where_the_readme_says(file: str, symbol: str) -> None:
    assert symbol in defined(REPOSITORY / file)


def source_of(module: str) -> str:
    """The code of a command, with that which it shares with others."""
    folder = REPOSITORY / "maskdino" / "cli"
    path = folder.joinpath(*module.split("."))
    own = path.with_suffix(".py")
    files = [own] if own.is_file() else sorted(path.glob("*.py"))
    files += [folder / "common.py", folder.parent / "integration" / "extensions.py"]
    return "".join(file.read_text() for file in files)


def check_words(source: str, words: str) -> None:
    """Each option of a command is one that its code defines; named configurations exist."""
    for option in re.findall(r"(?<=\s)--[a-z][\w-]*", words):
        assert option in ("--help", "--nproc-per-node") or f'"{option}"' in source, option
    for config in re.findall(r"configs/[\w/]+\.yaml", words):
        assert (REPOSITORY / config).is_file(), config


@pytest.mark.parametrize(("file", "words"), COMMANDS)
def test_command_at_its_old_place_and_its_options_exist(file: str, words: str) -> None:
    source = (REPOSITORY / file).read_text()
    for module in re.findall(r"from maskdino\.cli\.([\w.]+) import", source):
        source += source_of(module)
    if file == "tools/benchmark.py":  # each of its commands is a module
        families = (REPOSITORY / "tools" / "benchmarks").glob("*.py")
        source += "".join(path.read_text() for path in families)
    check_words(source, words)


@pytest.mark.parametrize(("command", "words"), MASKDINO)
def test_command_of_the_package_and_its_options_exist(command: str, words: str) -> None:
    entry = main.COMMANDS[command]
    part = entry.parts.get(words.split()[0]) if entry.parts and words.split() else None
    check_words(source_of((part or entry).module), words)


def bare(source: str) -> str:
    """Code without docstrings and annotations, and without imports that only these need."""
    tree = ast.parse(source.replace("import torch\n", ""))  # annotations alone need it
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            del node.body[0]
        if isinstance(node, ast.FunctionDef):
            node.returns = None
            for argument in node.args.args:
                argument.annotation = None
        if isinstance(node, ast.ImportFrom):
            node.names = [name for name in node.names if name.name != "CfgNode"]
    return ast.unparse(tree)


def test_script_with_detectron2s_trainer_is_the_one_that_is_tested() -> None:
    page = (REPOSITORY / "docs" / "python.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    shown = next(block for block in blocks if "(DefaultTrainer)" in block)
    tested = REPOSITORY / "tools" / "train_plain_detectron2.py"
    assert bare(shown) == bare(tested.read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([\w./-]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target

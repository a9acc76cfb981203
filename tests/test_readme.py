"""What the README names is there: symbols of the paper's parts, files, options of the commands."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text()
SYMBOLS = re.findall(r"`([\w/]+\.py)::([\w.]+)`", README)
BLOCKS = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL)).replace("\\\n", " ")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)
COMMANDS = re.findall(r"(?:^|\s)((?:tools|demo)/\w+\.(?:py|sh))([^\n#]*)", BLOCKS)


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


@pytest.mark.parametrize(("file", "words"), COMMANDS)
def test_command_and_its_options_exist(file: str, words: str) -> None:
    path = REPOSITORY / file
    source = path.read_text()
    for module in re.findall(r"from maskdino\.(cli[\w.]*) import main", source):
        source = (REPOSITORY / "maskdino" / module.replace(".", "/")).with_suffix(".py").read_text()
    for option in re.findall(r"--[\w-]+", words):
        assert option == "--help" or f'"{option}"' in source or option == "--nproc-per-node"
    for config in re.findall(r"configs/[\w/]+\.yaml", words):
        assert (REPOSITORY / config).is_file()


def bare(source: str) -> str:
    """Code without docstrings and annotations, and without imports that only these need."""
    tree = ast.parse(source)
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
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    shown = next(block for block in blocks if "DefaultTrainer" in block)
    tested = REPOSITORY / "tools" / "train_plain_detectron2.py"
    assert bare(shown) == bare(tested.read_text())


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (REPOSITORY / target).exists(), target

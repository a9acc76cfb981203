"""Which part of the package may import which: the layers, read off the sources and held here.

The flow is image -> backbone -> modeling -> losses | postprocess, and only ``model.py`` sees it
all. A part that imports a neighbour could no longer be read, tested or replaced alone.
"""

from __future__ import annotations

import ast
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "maskdino"


@dataclass(frozen=True)
class Rule:
    """What the modules of one room may import, besides the standard library and their own room.

    Attributes:
        room: module or package below ``maskdino``.
        rooms: those it may import, or modules of them.
        outside: prefixes of other packages that it may import; None: all.
        own: the modules of the room may import one another.
    """

    room: str
    rooms: tuple[str, ...] = ()
    outside: tuple[str, ...] | None = None
    own: bool = True


TENSORS = ("torch", "numpy")
# Each room, those below first: a room imports rooms of the lines above it alone.
RULES = (
    Rule("structures", outside=TENSORS),
    Rule("system"),
    Rule("integration", ("system.program",)),
    Rule("config", ("integration", "system.errors"), outside=("detectron2.config", "yaml")),
    Rule("categories", outside=("detectron2.config", "detectron2.data")),
    Rule("metrics", outside=()),
    Rule("ops", ("structures",), outside=(*TENSORS, "triton", "pycocotools")),
    Rule(
        "modeling",
        (
            "ops",
            "structures",
            *(f"modeling.{name}" for name in ("layers", "norms", "attention", "half_weights")),
        ),
        outside=(*TENSORS, "detectron2.config", "detectron2.layers"),
        own=False,
    ),
    Rule(
        "losses",
        ("ops", "structures"),
        outside=(*TENSORS, "scipy", "detectron2.config", "detectron2.utils.comm"),
    ),
    Rule(
        "targets", ("ops", "structures"), outside=(*TENSORS, "pycocotools", "detectron2.structures")
    ),
    Rule(
        "postprocess",
        ("ops", "structures"),
        outside=(*TENSORS, "detectron2.config", "detectron2.structures"),
    ),
    Rule("backbones", ("integration", "ops", "system.errors")),
    Rule("data", ("categories", "integration", "ops.rle", "structures", "system")),
    Rule(
        "model",
        (
            "backbones",
            "categories",
            "config",
            "integration",
            "losses",
            "modeling",
            "ops",
            "postprocess",
            "structures",
            "system",
            "targets",
        ),
    ),
    Rule(
        "checkpoint",
        ("backbones", "categories", "config", "integration", "metrics", "model", "modeling")
        + ("system",),
    ),
    Rule("model_zoo", ("checkpoint", "config", "model", "system")),
    Rule(
        "visualization",
        ("categories", "data", "ops.masks", "ops.rle", "ops.runs", "structures", "system"),
    ),
    Rule(
        "inference",
        (
            "categories",
            "checkpoint",
            "config",
            "data.images",
            "data.reading",
            "model",
            "model_zoo",
            "modeling",
            "ops",
            "postprocess",
            "structures",
            "system",
            "visualization",
        ),
    ),
    Rule(
        "evaluation",
        (
            "categories",
            "data",
            "inference.predictor",
            "inference.tiles",
            "integration",
            "metrics",
            "ops",
            "postprocess",
            "structures",
            "system",
            "visualization",
        ),
    ),
    Rule(
        "engine",
        (
            "backbones",
            "checkpoint",
            "config",
            "data",
            "evaluation",
            "integration",
            "metrics",
            "model",
            "system",
        ),
    ),
    Rule(
        "export",
        (
            "backbones.swin",
            "categories",
            "config",
            "inference",
            "model",
            "modeling",
            "ops",
            "postprocess",
            "structures",
            "system",
            "visualization",
        ),
    ),
    Rule(
        "custom",
        (
            "checkpoint",
            "config",
            "data",
            "engine",
            "evaluation",
            "integration",
            "model_zoo",
            "ops.rle",
            "structures",
            "system",
        ),
    ),
)
# Modules that are read before PyTorch is loaded, or by a Python that has nothing installed.
BARE = ("system.program", "system.errors", "integration.released_names")
ROOMS = tuple(rule.room for rule in RULES)
RULES += (
    Rule("api", ROOMS, outside=()),
    Rule("cli", (*ROOMS, "api")),
    Rule("__main__", ("cli",), outside=()),
)


def module_name(path: Path, root: Path) -> str:
    """Absolute module name of a file below ``root``."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


class WithoutTypeChecking(ast.NodeTransformer):
    """Drops the blocks that only type checkers read."""

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        if ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            return [self.visit(statement) for statement in node.orelse]
        return self.generic_visit(node)


def imported_modules(path: Path, root: Path) -> set[str]:
    """Absolute names of all that a file imports, anywhere in it.

    ``from a import b`` counts as ``a.b`` where ``b`` is a module below ``root`` or ``a`` lies
    outside of it, so that neither form hides what is used. Blocks ``if TYPE_CHECKING:`` do not
    count: the name of a type does not tie a part to the one that makes it.
    """
    name = module_name(path, root)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(WithoutTypeChecking().visit(ast.parse(path.read_text(), str(path)))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                anchor = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*anchor, *([base] if base else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                target = root.joinpath(*full.split("."))
                local = base.split(".")[0] == PACKAGE.name
                is_module = target.is_dir() or target.with_suffix(".py").is_file()
                found.add(full if is_module or not local else base)
    return found


def has_prefix(name: str, prefixes: tuple[str, ...]) -> bool:
    """Whether ``name`` is one of the modules ``prefixes`` or lies below one."""
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def violations(path: Path, rule: Rule, root: Path) -> list[str]:
    """The imports of a file that ``rule`` does not allow, sorted."""
    name = module_name(path, root)
    room = f"maskdino.{rule.room}"
    allowed = tuple(f"maskdino.{other}" for other in rule.rooms)
    if rule.own or name == room:
        allowed = (*allowed, room)
    wrong = []
    for imported in sorted(imported_modules(path, root)):
        if imported.split(".")[0] in sys.stdlib_module_names:
            continue
        if imported.split(".")[0] != "maskdino":
            fine = rule.outside is None or has_prefix(imported, rule.outside)
        else:
            fine = has_prefix(imported, allowed)
        if not fine:
            wrong.append(imported)
    return wrong


def files_of(rule: Rule) -> list[Path]:
    """The sources of a room that exist."""
    module = PACKAGE / f"{rule.room.replace('.', '/')}.py"
    return [module] if module.is_file() else sorted((PACKAGE / rule.room).rglob("*.py"))


@pytest.mark.parametrize(
    "rule",
    (*RULES, *(Rule(module, outside=(), own=False) for module in BARE)),
    ids=lambda rule: rule.room,
)
def test_rooms_import_what_they_may(rule: Rule) -> None:
    files = files_of(rule)
    assert files, f"maskdino has no room {rule.room!r}; has it moved?"
    wrong = {
        str(path.relative_to(REPOSITORY)): found
        for path in files
        if (found := violations(path, rule, REPOSITORY))
    }
    assert not wrong


def test_every_module_lives_in_a_room() -> None:
    rooms = {
        path.stem
        for path in PACKAGE.iterdir()
        if (path.is_dir() and list(path.glob("*.py"))) or path.suffix == ".py"
    }
    assert rooms - {"__init__"} == {rule.room for rule in RULES}


def test_rooms_form_no_circle() -> None:
    below: set[str] = set()
    for rule in RULES:
        others = {room.partition(".")[0] for room in rule.rooms} - {rule.room}
        assert others <= below, f"{rule.room} imports {others - below}, which stand above it"
        below.add(rule.room)


@pytest.mark.parametrize("files", ["maskdino/cli/**/*.py", "tools/*.py", "demo/*.py"])
def test_commands_use_public_names(files: str) -> None:
    """Commands import public names of modules of rooms (``maskdino.engine.trainer``)."""
    wrong = []
    for path in sorted(REPOSITORY.glob(files)):
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            if isinstance(node, ast.ImportFrom) and has_prefix(node.module or "", ("maskdino",)):
                parts = [*node.module.split("."), *(alias.name for alias in node.names)]
                wrong += [f"{path.name}: {part}" for part in parts if part.startswith("_")]
    assert not wrong


def test_config_is_never_stored() -> None:
    """``cfg`` is read where a module is built; an object that kept it would depend on all keys.

    The trainer is left out: ``cfg`` is an attribute of detectron2's trainer, which hooks read.
    """
    wrong = []
    for path in sorted(set(PACKAGE.rglob("*.py")) - {PACKAGE / "engine" / "trainer.py"}):
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            stored = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
            if stored and node.attr in ("cfg", "_cfg", "config"):
                wrong.append(f"{path.relative_to(REPOSITORY)}:{node.lineno}")
    assert not wrong


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch.nn.functional as F\nimport math\n", []),
        ("from torch import Tensor\nfrom ..structures import Memory\n", []),
        ("from .layers import MLP\nfrom . import attention\n", []),
        ("from .decoder import Decoder\n", ["maskdino.modeling.decoder"]),
        ("from . import decoder, layers\n", ["maskdino.modeling.decoder"]),
        ("from ..losses.matcher import Matcher\n", ["maskdino.losses.matcher"]),
        ("from maskdino import losses\n", ["maskdino.losses"]),
        ("def f():\n    import detectron2.data\n", ["detectron2.data"]),
        ("from detectron2.config import configurable\n", []),
        ("from detectron2 import data\n", ["detectron2.data"]),
        ("import torchvision\n", ["torchvision"]),
        ("if TYPE_CHECKING:\n    from .decoder import Decoder\n", []),
        (
            "if TYPE_CHECKING:\n    pass\nelse:\n    from .decoder import Decoder\n",
            ["maskdino.modeling.decoder"],
        ),
    ],
)
def test_reader_finds_forbidden_imports(source: str, expected: list[str], tmp_path: Path) -> None:
    """The reader itself, on modules of a package in the same shape."""
    for name in ("modeling/layers", "modeling/attention", "modeling/decoder", "losses/matcher"):
        file = tmp_path / "maskdino" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    (tmp_path / "maskdino" / "structures.py").touch()
    path = tmp_path / "maskdino" / "modeling" / "encoder.py"
    path.write_text(source)
    (rule,) = (rule for rule in RULES if rule.room == "modeling")
    assert violations(path, rule, tmp_path) == expected

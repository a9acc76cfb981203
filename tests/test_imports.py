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

# What everybody may use: tensors, and the two parts that know nothing but tensors.
LEAVES = ("torch", "numpy", "maskdino.ops", "maskdino.structures")
# The wiring around the model: may use everything, and nothing below may use it.
OUTER = (
    "trainer",
    "train_step",
    "hooks",
    "launch",
    "data_stream",
    "devices",
    "solver",
    "evaluation",
    "coco_evaluation",
    "augmented_inference",
    "semantic_evaluation",
    "panoptic_evaluation",
    "predictor",
    "data",
    "checkpoint",
)


@dataclass(frozen=True)
class Rule:
    """What the modules of one part may import, besides the standard library and their own part.

    Attributes:
        part: module or package below ``maskdino``.
        allowed: prefixes of absolute module names; None allows all that is not forbidden.
        forbidden: prefixes that are forbidden whatever ``allowed`` says.
        own: the modules of the part may import one another.
    """

    part: str
    allowed: tuple[str, ...] | None
    forbidden: tuple[str, ...] = ()
    own: bool = True


def inside(*parts: str) -> tuple[str, ...]:
    """Absolute names of parts of the package."""
    return tuple(f"maskdino.{part}" for part in parts)


RULES = (
    Rule("ops", LEAVES),
    Rule("structures", LEAVES),
    Rule("config", ("detectron2.config",)),
    Rule(
        "backbones",
        None,
        forbidden=inside("modeling", "losses", "targets", "postprocess", "model", *OUTER),
    ),
    Rule(
        "modeling",
        (
            *LEAVES,
            "maskdino.modeling.layers",
            "maskdino.modeling.attention",
            "detectron2.config",
            "detectron2.layers",
        ),
        own=False,
    ),
    Rule("losses", (*LEAVES, "scipy", "detectron2.config", "detectron2.utils.comm")),
    Rule("targets", (*LEAVES, "pycocotools", "detectron2.structures")),
    Rule("postprocess", (*LEAVES, "detectron2.structures")),
    Rule("model", None, forbidden=inside(*(part for part in OUTER if part != "checkpoint"))),
    Rule("data", None, forbidden=inside("modeling", "losses", "ops", "model", "trainer")),
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
    part = f"maskdino.{rule.part}"
    own: tuple[str, ...] = (part,) if rule.own or name == part else ()
    wrong = []
    for imported in sorted(imported_modules(path, root)):
        if imported.split(".")[0] in sys.stdlib_module_names or has_prefix(imported, own):
            continue
        allowed = rule.allowed is None or has_prefix(imported, rule.allowed)
        if not allowed or has_prefix(imported, rule.forbidden):
            wrong.append(imported)
    return wrong


def files_of(rule: Rule) -> list[Path]:
    """The sources of a part that exist."""
    module = PACKAGE / f"{rule.part}.py"
    return [module] if module.is_file() else sorted((PACKAGE / rule.part).rglob("*.py"))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.part)
def test_package_keeps_its_layers(rule: Rule) -> None:
    files = files_of(rule)
    assert files, f"maskdino has no part {rule.part!r}; has it moved?"
    wrong = {
        str(path.relative_to(REPOSITORY)): found
        for path in files
        if (found := violations(path, rule, REPOSITORY))
    }
    assert not wrong


@pytest.mark.parametrize("folder", ["tools", "demo"])
def test_commands_use_public_names(folder: str) -> None:
    """Commands import parts of the package by name (``maskdino.trainer``), and nothing deeper."""
    wrong = {}
    for path in sorted((REPOSITORY / folder).glob("*.py")):
        ours = {m for m in imported_modules(path, REPOSITORY) if has_prefix(m, ("maskdino",))}
        if found := sorted(module for module in ours if module.count(".") > 1):
            wrong[path.name] = found
    assert not wrong


def test_config_is_never_stored() -> None:
    """``cfg`` is read where a module is built; an object that kept it would depend on all keys.

    The trainer is left out: ``cfg`` is an attribute of detectron2's trainer, which hooks read.
    """
    wrong = []
    for path in sorted(set(PACKAGE.rglob("*.py")) - {PACKAGE / "trainer.py"}):
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
    (rule,) = (rule for rule in RULES if rule.part == "modeling")
    assert violations(path, rule, tmp_path) == expected

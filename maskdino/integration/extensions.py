"""What users add from outside: modules of their own, imported by name, and registries they add to.

Commands take ``--import MODULE_OR_FILE``. The module is imported before the configuration is read,
and again in every process that is started from there (through the environment variable
``MASKDINO_IMPORT``, which also works where there is no such option). It may

- register datasets, backbones and meta-architectures with detectron2, and anything below with us;
- define ``add_config(cfg)``, which adds keys to every configuration before its file is read.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from fvcore.common.registry import Registry

VARIABLE = "MASKDINO_IMPORT"  # names and absolute paths, joined as those of PATH are
HEADER = "# made with "  # of a configuration's file: the modules that its keys may come from

Item = TypeVar("Item", bound=Callable[..., Any])

_modules: dict[str, ModuleType] = {}  # by their names in Python, in the order of their import


class ExtensionError(ImportError):
    """A module of the user's does not exist, or fails."""


class ExtensionRegistry(Registry):
    """A registry of fvcore that tells what it holds, and takes what is defined a second time.

    The key is that of the configuration that asks for its names.
    """

    def __init__(self, name: str, key: str) -> None:
        super().__init__(name)
        self.key = key

    def register(self, obj: Any = None, *, name: str | None = None) -> Any:
        """Registers a function or class; also as a decorator, ``@REGISTRY.register()``.

        What is defined once more, as in a cell of a notebook, takes the place of what it was; an
        AssertionError where something else has the name, which is that of the object if none is
        given.
        """
        if obj is None:
            return lambda item: self.register(item, name=name)
        name = name or obj.__name__
        old = self._obj_map.get(name)
        if old is not None and _origin(old) == _origin(obj):
            del self._obj_map[name]
        self._do_register(name, obj)
        return obj

    def find(self, name: str) -> Any:
        """Gives what was registered under a name; ValueError if nothing was."""
        if name not in self:
            known = ", ".join(sorted(known for known, _ in self)) or "so far nothing"
            raise ValueError(
                f"{self.key} names {name!r}, which is not registered (registered: {known}). "
                "A module of your own that registers it is imported with --import."
            )
        return self.get(name)

    def check(self, names: Iterable[str]) -> None:
        """Raises a ValueError unless all names are registered."""
        for name in names:
            self.find(name)


def _origin(item: Any) -> tuple[str, str]:
    return item.__module__, item.__qualname__


# (cfg, is_train=True) -> function from a dict of the dataset to a training example.
MAPPER_REGISTRY = ExtensionRegistry("MAPPER", "INPUT.DATASET_MAPPER_NAME")
# (cfg) -> what `maskdino.data.augmentations.own_augmentations` takes.
AUGMENTATION_REGISTRY = ExtensionRegistry("AUGMENTATION", "INPUT.AUGMENTATIONS")
# (cfg, dataset_name, output_folder) -> detectron2's DatasetEvaluator.
EVALUATOR_REGISTRY = ExtensionRegistry("EVALUATOR", "TEST.EVALUATORS")
# (cfg) -> detectron2's EventWriter.
WRITER_REGISTRY = ExtensionRegistry("WRITER", "LOG.WRITERS")


def add_import_option(parser: argparse.ArgumentParser) -> None:
    """Adds ``--import`` to a command; it acts while the command line is read.

    So the modules are there before any configuration is, whatever the command does. A module that
    is missing or fails ends the command with status 1 and one line, below the module's traceback.
    """
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        type=_imported,
        metavar="MODULE",
        help="import your own module or .py file first (may be repeated)",
    )


def _imported(word: str) -> str:
    """Imports a module that the command line names, or ends the command."""
    try:
        import_extension(word)
    except ExtensionError as error:
        if error.__cause__ is not None:
            traceback.print_exception(error.__cause__)
        sys.exit(f"error: {error}")
    return word


def import_extension(word: str | os.PathLike[str]) -> ModuleType:
    """Imports a module, here and in the processes that this one starts.

    Args:
        word: dotted name of a module, to be found as others are or below the current folder; or
            the path of a ``.py`` file, whose folder's other modules it may import.

    Raises:
        ExtensionError: there is no such module or file, or it fails (then the cause is attached).
    """
    word = os.fspath(word)
    if word.endswith(".py") or len(Path(word).parts) > 1:
        word = os.path.abspath(word)
        module = _import(word, Path(word).stem, Path(word).parent)
        found = getattr(module, "__file__", None)
        if found is None or not Path(word).samefile(found):
            raise ExtensionError(
                f"--import {word}: its name is that of {found or module.__name__}; rename the file"
            )
    else:
        module = _import(word, word, Path.cwd())
    _modules[module.__name__] = module
    words = _recorded()
    if word not in words:
        os.environ[VARIABLE] = os.pathsep.join([*words, word])
    return module


def import_recorded() -> None:
    """Imports what the process that started this one did, or what the environment names."""
    for word in _recorded():
        import_extension(word)


def extend_config(cfg: Any) -> None:
    """Lets each imported module add its keys to a new configuration (in place)."""
    for module in _modules.values():
        add_config = getattr(module, "add_config", None)
        if add_config is not None:
            add_config(cfg)


def config_header() -> str:
    """Gives the line that tells a reader of a written configuration what to import; or nothing."""
    words = _recorded()
    return HEADER + " ".join(f"--import {word}" for word in words) + "\n" if words else ""


def read_header(config_file: str) -> str:
    """Gives what a configuration's file was made with, as a sentence; empty if it does not tell."""
    if os.path.isfile(config_file):
        with open(config_file, encoding="utf-8") as file:
            line = file.readline().strip()
        if line.startswith(HEADER):
            return f" The file was made with {line.removeprefix(HEADER)}."
    return ""


def _recorded() -> list[str]:
    return [word for word in os.environ.get(VARIABLE, "").split(os.pathsep) if word]


def _import(word: str, name: str, folder: Path) -> ModuleType:
    """Imports a module that may lie in a folder."""
    if word.endswith(".py") and not Path(word).is_file():
        raise ExtensionError(f"--import {word}: there is no such file")
    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # last: it must not hide what is installed
    try:
        return importlib.import_module(name)
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and f"{name}.".startswith(f"{missing}."):
            raise ExtensionError(
                f"--import {word}: there is no such module; give the path of a .py file, or a name "
                f"that Python finds from {folder}"
            ) from None
        raise ExtensionError(
            f"--import {word} failed: {type(error).__name__}: {error}".replace("\n", " ")
        ) from error

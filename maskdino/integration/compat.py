"""What other packages need to work together: the one place where their objects are changed.

Each entry names the releases that it is for. ``tests/integration/test_compat.py`` has a test for
each that fails once the newest release of a package does without.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import NoReturn

import numpy as np
import torch.distributed
from detectron2.config import CfgNode
from detectron2.data import detection_utils
from detectron2.solver.build import GradientClipType
from detectron2.utils import comm
from torch import nn

# Where detectron2's main branch (2023 and later) looks for Cityscapes' scripts.
CITYSCAPES_ALIAS = "deeplearning.projects.cityscapesApi.cityscapesscripts"


class _CityscapesAlias(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds Cityscapes' scripts, and the empty packages above them, under `CITYSCAPES_ALIAS`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`; packages that exist go first."""
        if f"{CITYSCAPES_ALIAS}.".startswith(f"{fullname}."):
            exists = importlib.machinery.PathFinder.find_spec(fullname, path, target) is not None
        elif fullname.startswith(f"{CITYSCAPES_ALIAS}."):
            exists = sys.modules[CITYSCAPES_ALIAS].__name__ == CITYSCAPES_ALIAS
        else:
            return None
        return None if exists else importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def exec_module(self, module: ModuleType) -> None:
        """Puts the real module in the place of the new one, so that each is loaded once."""
        if f"{module.__name__}.".startswith(f"{CITYSCAPES_ALIAS}."):
            real = module.__name__[CITYSCAPES_ALIAS.rfind(".") + 1 :]
            sys.modules[module.__name__] = importlib.import_module(real)


def alias_cityscapes_scripts() -> None:
    """Lets detectron2's main branch import ``cityscapesscripts``, which it knows by another name.

    Nothing is imported before detectron2 asks; a second call does nothing. Detectron2 0.6 imports
    the package by its own name.
    """
    if not any(isinstance(finder, _CityscapesAlias) for finder in sys.meta_path):
        sys.meta_path.insert(0, _CityscapesAlias())


@contextmanager
def cityscapes_scripts() -> Iterator[None]:
    """Inside, cityscapesscripts (up to 2.3) evaluate with any NumPy, and leave no file behind.

    They call `numpy.in1d`, which NumPy 2.4 removed, and write ``matches.json`` to the current
    folder.
    """
    from cityscapesscripts.evaluation import evalInstanceLevelSemanticLabeling as scripts

    has_in1d = hasattr(np, "in1d")
    write = scripts.writeDict2JSON
    scripts.writeDict2JSON = lambda *_: None
    if not has_in1d:
        vars(np)["in1d"] = np.isin
    try:
        yield
    finally:
        scripts.writeDict2JSON = write
        if not has_in1d:
            del vars(np)["in1d"]


def name_keys_of_our_trainer() -> None:
    """Lets detectron2 (0.6 and main) say which key has a value that only our own trainer knows.

    Its messages name neither the key nor what to do. A second call does nothing.
    """

    def refuse(key: str, value: object, known: str, instead: str) -> NoReturn:
        raise ValueError(
            f"{key} is {value!r}, which detectron2 itself does not know: use {known}, or {instead}"
        )

    def missing(_: type, value: object) -> NoReturn:
        instead = "build the optimizer with maskdino.build_optimizer(cfg, model)"
        refuse("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", value, "'norm' or 'value'", instead)

    def build(cfg: CfgNode, is_train: bool) -> list:
        if is_train and cfg.INPUT.RANDOM_FLIP not in flips:
            instead = "call maskdino.adapt_to_detectron2(cfg)"
            refuse(
                "INPUT.RANDOM_FLIP", cfg.INPUT.RANDOM_FLIP, " or ".join(map(repr, flips)), instead
            )
        return original(cfg, is_train)

    flips = ("horizontal", "vertical", "none")
    original = detection_utils.build_augmentation
    if "_missing_" not in vars(GradientClipType):
        GradientClipType._missing_ = classmethod(missing)
        detection_utils.build_augmentation = build


def create_local_process_group(processes: int) -> None:
    """Tells detectron2 which processes share a machine, in all processes of a training.

    Its `comm.get_local_rank` depends on it. Only releases after 0.6 have a function for that.
    """
    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(processes)
        return
    rank, world_size = comm.get_rank(), comm.get_world_size()
    for first in range(0, world_size, processes):
        ranks = list(range(first, first + processes))
        group = torch.distributed.new_group(ranks)  # every process must create every group
        if rank in ranks:
            comm._LOCAL_PROCESS_GROUP = group


def change_class(model: nn.Module, counterparts: dict[type[nn.Module], type[nn.Module]]) -> None:
    """Gives modules inside `model` a subclass of their class (in place).

    timm (1.0) builds the blocks of its Swin Transformers from a class that no argument changes.
    """
    for module in model.modules():
        if type(module) in counterparts:
            module.__class__ = counterparts[type(module)]

"""What is changed about other packages works, and is still needed."""

from __future__ import annotations

import inspect
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data.datasets import cityscapes
from detectron2.utils import comm
from timm.models.swin_transformer import SwinTransformerBlock

from maskdino.backbones.swin import SwinBlock, pad_before_shift
from maskdino.integration.compat import (
    CITYSCAPES_ALIAS,
    _CityscapesAlias,
    alias_cityscapes_scripts,
    cityscapes_scripts,
)

SCRIPTS = "cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling"


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A package in the shape of cityscapesscripts, whose evaluation does as that of 2.3."""
    folder = tmp_path / "cityscapesscripts"
    for name in ("evaluation", "helpers"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").touch()
    (folder / "__init__.py").touch()
    (folder / "helpers" / "labels.py").write_text("labels = ['road']\n")
    (folder / "evaluation" / f"{SCRIPTS.rpartition('.')[2]}.py").write_text(
        "import numpy as np\n"
        "def writeDict2JSON(content, name):\n"
        "    open(name, 'w').write(str(content))\n"
        "def evaluate(labels, ignored):\n"
        "    writeDict2JSON({}, 'matches.json')\n"
        "    return np.in1d(labels, ignored, invert=True)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    before = dict(sys.modules)
    for name in before:
        if name.partition(".")[0] in ("cityscapesscripts", "deeplearning"):
            monkeypatch.delitem(sys.modules, name)
    from cityscapesscripts.evaluation import evalInstanceLevelSemanticLabeling

    yield evalInstanceLevelSemanticLabeling
    for name in sys.modules.keys() - before.keys():
        if name.partition(".")[0] in ("cityscapesscripts", "deeplearning"):
            del sys.modules[name]


def test_cityscapes_scripts_run_with_every_numpy_and_leave_no_file(
    scripts: types.ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delattr(np, "in1d", raising=False)
    write = scripts.writeDict2JSON
    with cityscapes_scripts():
        found = scripts.evaluate(np.array([3, 5, 7]), [7, 3])
    assert found.tolist() == [False, True, False]
    assert not (tmp_path / "matches.json").exists()
    assert not hasattr(np, "in1d")
    assert scripts.writeDict2JSON is write


def test_cityscapes_scripts_are_found_where_detectron2_looks(scripts: types.ModuleType) -> None:
    alias_cityscapes_scripts()
    alias_cityscapes_scripts()
    assert sum(isinstance(finder, _CityscapesAlias) for finder in sys.meta_path) == 1
    namespace: dict = {}
    exec(  # in the two forms of detectron2's main branch
        f"from {CITYSCAPES_ALIAS}.helpers.labels import labels\n"
        f"import {CITYSCAPES_ALIAS}.evaluation.{SCRIPTS.rpartition('.')[2]} as evaluation\n",
        namespace,
    )
    assert namespace["labels"] == ["road"]
    assert namespace["evaluation"] is scripts
    assert scripts.__spec__.name == SCRIPTS
    with pytest.raises(ModuleNotFoundError, match=r"cityscapesscripts\.lost"):
        __import__(f"{CITYSCAPES_ALIAS}.lost")
    with pytest.raises(ModuleNotFoundError, match=r"deeplearning\.other"):
        __import__("deeplearning.other")


@pytest.mark.usefixtures("scripts")
def test_a_real_package_goes_before_the_alias(tmp_path: Path) -> None:
    package = tmp_path.joinpath(*CITYSCAPES_ALIAS.split("."))
    package.mkdir(parents=True)
    (tmp_path / "deeplearning" / "__init__.py").write_text("VALUE = 3\n")
    (package / "__init__.py").touch()
    (package / "helpers.py").write_text("VALUE = 4\n")
    alias_cityscapes_scripts()
    import deeplearning.projects.cityscapesApi.cityscapesscripts.helpers as found

    assert found.VALUE == 4
    assert sys.modules["deeplearning"].VALUE == 3


def test_detectron2_still_needs_the_alias() -> None:
    """Fails with a release whose main branch imports cityscapesscripts by its own name again."""
    if not hasattr(comm, "create_local_process_group"):
        pytest.skip("detectron2 0.6 imports cityscapesscripts by its own name")
    assert CITYSCAPES_ALIAS in inspect.getsource(cityscapes)


def test_cityscapes_scripts_still_need_numpys_old_function() -> None:
    """Fails with a release of cityscapesscripts that calls what every NumPy has."""
    module = pytest.importorskip(SCRIPTS)
    assert "np.in1d(" in inspect.getsource(module)
    assert 'writeDict2JSON(matches,"matches.json")' in inspect.getsource(module)


def test_timm_still_rolls_before_it_pads() -> None:
    """Fails with a release of timm whose Swin computes what detectors' Swin computes."""
    torch.manual_seed(0)
    sizes = {"always_partition": True, "dynamic_mask": True, "window_size": 4, "shift_size": 2}
    block = SwinTransformerBlock(8, (7, 7), num_heads=2, **sizes).eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    image = torch.randn(1, 7, 7, 8)  # windows do not divide it
    before = block(image)
    pad_before_shift(block)
    assert type(block) is SwinBlock
    assert not torch.allclose(block(image), before, atol=1e-3)

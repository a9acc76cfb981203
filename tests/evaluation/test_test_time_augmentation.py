"""Tests of maskdino.evaluation.test_time_augmentation."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from maskdino.config import load_config
from maskdino.data.reading import DataError
from maskdino.evaluation.test_time_augmentation import AugmentedSemanticModel

SEMANTIC = ["MODEL.MASK_DINO.TEST.INSTANCE_ON", "False", "MODEL.MASK_DINO.TEST.SEMANTIC_ON", "True"]


class ColorsAsClasses(nn.Module):
    """Scores of three classes are the colours; of the fourth the position from left to right."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, inputs: list[dict]) -> list[dict]:
        (example,) = inputs
        self.seen.append(example["image"])
        size = (example["height"], example["width"])
        colors = F.interpolate(example["image"][None].float(), size, mode="area")[0]
        ramp = torch.arange(size[1], dtype=torch.float32).expand(1, *size)
        return [{"sem_seg": torch.cat([colors, ramp])}]


@pytest.fixture
def picture(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """An image of 40 x 60 pixels whose left half is red."""
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, :30] = (200, 40, 0)
    path = tmp_path / "half.png"
    Image.fromarray(pixels).save(path)
    return path, pixels


def augmented(sizes: str, flip: bool, image_format: str = "RGB") -> AugmentedSemanticModel:
    words = ["TEST.AUG.MIN_SIZES", sizes, "TEST.AUG.MAX_SIZE", "100", "INPUT.FORMAT", image_format]
    cfg = load_config(None, [*SEMANTIC, *words, "TEST.AUG.FLIP", str(flip)])
    return AugmentedSemanticModel(cfg, ColorsAsClasses())


def test_sizes_and_mirrors(picture: tuple[Path, np.ndarray]) -> None:
    path, pixels = picture
    model = augmented("(20, 40, 80)", flip=True)
    (output,) = model([{"file_name": str(path)}])
    shapes = [tuple(image.shape) for image in model.model.seen]
    # The longest edge is limited to 100: 80 x 120 becomes 67 x 100.
    assert shapes == [(3, 20, 30)] * 2 + [(3, 40, 60)] * 2 + [(3, 67, 100)] * 2
    upright, mirrored = model.model.seen[2:4]
    assert torch.equal(upright, torch.from_numpy(pixels).permute(2, 0, 1))
    assert torch.equal(mirrored, upright.flip(-1))
    scores = output["sem_seg"]
    # Maps of mirrored images are turned back: colours stay, and the ramp meets its mirror image.
    edge = slice(25, 35)  # resizing blurs the edge between the halves
    keep = [x for x in range(60) if not edge.start <= x < edge.stop]
    expected = torch.from_numpy(pixels).permute(2, 0, 1).float()
    torch.testing.assert_close(scores[:3, :, keep], expected[:, :, keep], rtol=0, atol=1)
    torch.testing.assert_close(scores[3], torch.full((40, 60), 59 / 2))


def test_mean_of_the_versions_without_mirrors(picture: tuple[Path, np.ndarray]) -> None:
    path, _ = picture
    model = augmented("(20, 80)", flip=False)
    example = {"file_name": str(path), "height": 12, "width": 18}
    (output,) = model([example])
    single = [
        ColorsAsClasses()([{"image": image, "height": 12, "width": 18}])[0]["sem_seg"]
        for image in model.model.seen
    ]
    assert len(single) == 2
    torch.testing.assert_close(output["sem_seg"], (single[0] + single[1]) / 2)


def test_format_of_the_image(picture: tuple[Path, np.ndarray]) -> None:
    model = augmented("(40,)", flip=False, image_format="BGR")
    model([{"file_name": str(picture[0])}])
    assert model.model.seen[0][:, 0, 0].tolist() == [0, 40, 200]


def test_wrong_use(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="INSTANCE_ON True, PANOPTIC_ON False; set them"):
        AugmentedSemanticModel(load_config(), ColorsAsClasses())
    with pytest.raises(ValueError, match=r"TEST\.AUG\.MIN_SIZES is empty"):
        augmented("()", flip=True)
    with pytest.raises(DataError, match="none.png does not exist"):
        augmented("(20,)", flip=True)([{"file_name": str(tmp_path / "none.png")}])

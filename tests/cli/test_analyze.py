"""Tests of tools/analyze_model.py."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from maskdino.cli import analyze
from maskdino.config import load_config


class Nested(nn.Module):
    """Its part `outer` calls its part `head`, and it has a product of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.outer = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4, 5)

    def forward(self, images: Tensor) -> Tensor:
        pixels = self.outer(images).flatten(2).transpose(1, 2)  # (B, HW, 4)
        return self.head(pixels) @ torch.ones(5, 2, device=images.device)


def test_parts_are_counted_apart() -> None:
    model = Nested().to("meta")
    with analyze.PartCounter(model) as counter:
        model(torch.zeros(2, 3, 6, 7, device="meta"))
    pixels = 2 * 6 * 7
    expected = {"outer": pixels * 27 * 4, "head": pixels * 4 * 5, "rest": pixels * 5 * 2}
    assert {part: n for part, n in counter.counts.items() if n} == expected
    assert analyze.count_parameters(model) == {"outer": 112, "head": 25}


def test_sampling_is_counted_apart() -> None:
    with analyze.PartCounter(nn.Identity()) as counter:
        functional.grid_sample(
            torch.zeros(1, 8, 4, 4), torch.zeros(1, 5, 6, 2), align_corners=False
        )
    assert {part: n for part, n in counter.counts.items() if n} == {analyze.SAMPLING: 8 * 30 * 4}


@pytest.mark.parametrize(("queries", "expected"), [(300, 286e9), (100, 280e9)])
def test_paper_model(repository: Path, queries: int, expected: float) -> None:
    """52M parameters; 286 G multiply-adds at about the mean size of COCO's images."""
    path = repository / "configs" / "coco" / "instance" / "maskdino_R50.yaml"
    selection = "MODEL.MASK_DINO.QUERY_SELECTION"
    overrides = [f"{selection}.NUM_QUERIES", str(queries)]
    cfg = load_config(str(path), [*overrides, f"{selection}.MASK_ENHANCED_ANCHORS", "none"])
    assert sum(
        analyze.count_parameters(analyze.build_on_meta(cfg)).values()
    ) / 1e6 == pytest.approx(52, abs=0.5)
    counts = analyze.count_multiply_adds(cfg, Counter({(800, 1120): 1}))
    total = sum(count for part, count in counts.items() if part != analyze.SAMPLING)
    assert total == pytest.approx(expected, rel=0.02)


def test_values_that_make_no_sense_are_refused() -> None:
    words = ["--config-file", "nuclei/instance/maskdino_tiny", "MODEL.MASK_DINO.NUM_CLASSES", "0"]
    with pytest.raises(SystemExit, match="^error: MODEL.MASK_DINO.NUM_CLASSES is 0; it must be"):
        analyze.main(words)


def test_an_image_without_pixels_is_refused() -> None:
    words = ["--config-file", "nuclei/instance/maskdino_tiny", "--size", "0", "100"]
    with pytest.raises(SystemExit, match="error: an image of 0 x 100 pixels: give a --size of 1"):
        analyze.main(words)

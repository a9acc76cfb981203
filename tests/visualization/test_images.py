"""Pictures of every kind become the same upright RGB; what is none is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maskdino.visualization.images import ImageError, load_image, network_image, network_size

COLOR = np.zeros((4, 6, 3), np.uint8)
COLOR[:2, :3] = (250, 10, 30)
COLOR[2:, 3:] = (0, 128, 255)


def test_every_source_gives_the_same_picture(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    Image.fromarray(COLOR).save(path)
    sources = [path, str(path), Image.fromarray(COLOR), COLOR, COLOR / 255.0]
    sources += [torch.from_numpy(COLOR).permute(2, 0, 1)]
    for source in sources:
        np.testing.assert_array_equal(load_image(source), COLOR)
    np.testing.assert_array_equal(load_image(COLOR[..., ::-1], "BGR"), COLOR)


def test_tensors_of_half_numbers() -> None:
    values = torch.rand(3, 4, 5)
    for dtype in (torch.float16, torch.bfloat16):
        expected = (values.to(dtype).float() * 255).round().byte().movedim(0, -1).numpy()
        np.testing.assert_allclose(load_image(values.to(dtype)), expected, atol=1)


def test_tensors_with_channels_last_are_named_as_they_are() -> None:
    with pytest.raises(ImageError, match=r"a tensor of shape \(5, 6, 3\) is no image \(C, H, W\)"):
        load_image(torch.zeros(5, 6, 3))


def test_grey_of_8_and_16_bits(tmp_path: Path) -> None:
    grey = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10
    wide = grey.astype(np.uint16) * 257
    for pixels in (grey, wide, grey[..., None], wide[..., None]):
        np.testing.assert_array_equal(load_image(pixels), np.repeat(grey[..., None], 3, axis=2))
    for pixels, name in ((grey, "8.png"), (wide, "16.png"), (wide, "16.tif")):
        Image.fromarray(pixels).save(tmp_path / name)
        found = load_image(tmp_path / name)
        np.testing.assert_array_equal(found, np.repeat(grey[..., None], 3, axis=2))
    np.testing.assert_array_equal(load_image(grey > 100)[..., 0], (grey > 100) * 255)


def test_transparency_is_laid_on_white() -> None:
    rgba = np.concatenate([COLOR, np.full((4, 6, 1), 255, np.uint8)], axis=2)
    rgba[0, 0, 3], rgba[0, 1, 3] = 0, 51
    expected = COLOR.copy()
    expected[0, 0] = 255
    expected[0, 1] = [round(0.2 * c + 0.8 * 255) for c in COLOR[0, 1].tolist()]
    for source in (rgba, Image.fromarray(rgba)):
        assert np.abs(load_image(source).astype(int) - expected).max() <= 1
    palette = Image.fromarray(COLOR).quantize(8)
    np.testing.assert_array_equal(load_image(palette), np.array(palette.convert("RGB")))


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    path = tmp_path / "turned.png"
    Image.fromarray(COLOR).save(path, exif=exif)
    np.testing.assert_array_equal(load_image(path), np.rot90(COLOR, -1))


def test_what_is_no_picture_is_named(tmp_path: Path) -> None:
    text = tmp_path / "text.png"
    text.write_text("hello")
    with pytest.raises(ImageError, match=r"text\.png"):
        load_image(text)
    whole = tmp_path / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(whole)
    cut = tmp_path / "cut.png"
    cut.write_bytes(whole.read_bytes()[:2000])
    with pytest.raises(ImageError, match=r"cut\.png.*truncated"):
        load_image(cut)
    with pytest.raises(ImageError, match="does not exist"):
        load_image(tmp_path / "nothing.jpg")
    with pytest.raises(ImageError, match="is a folder"):
        load_image(tmp_path)
    with pytest.raises(TypeError, match="not int"):
        load_image(3)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 6, 2), np.uint8), r"\(4, 6, 2\)"),
        (np.zeros((0, 6, 3), np.uint8), r"\(0, 6, 3\)"),
        (np.zeros((4, 6), np.int64), "int64"),
        (np.full((4, 6), 3.0), r"\[3\.0, 3\.0\]"),
        (np.full((4, 6), np.nan), "nan"),
    ],
)
def test_wrong_arrays(array: np.ndarray, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        load_image(array)
    with pytest.raises(ValueError, match="RBG"):
        load_image(COLOR, "RBG")


def test_sizes_are_those_of_detectron2() -> None:
    from detectron2.data.transforms import ResizeShortestEdge

    for size in ((480, 640), (640, 480), (427, 640), (100, 1000), (1, 1), (9000, 12000), (75, 75)):
        image = np.zeros((*size, 1), np.uint8)
        expected = ResizeShortestEdge([80, 80], 133).get_transform(image)
        assert network_size(size, 80, 133) == (expected.new_h, expected.new_w)
    assert network_size((480, 640), 0, 1333) == (480, 640)
    assert network_size((1, 100000), 800, 1333) == (1, 1333)


def test_network_image_has_the_order_of_channels_that_is_asked_for() -> None:
    rgb = network_image(COLOR, (4, 6), "RGB")
    assert rgb.shape == (3, 4, 6)
    assert rgb.dtype == torch.uint8
    torch.testing.assert_close(network_image(COLOR, (4, 6), "BGR"), rgb.flip(0))
    assert network_image(COLOR, (8, 12), "RGB").shape == (3, 8, 12)

"""Training, evaluation, prediction and the check of own data see one image in one file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskdino.custom.checks import file_problem
from maskdino.data import DataError
from maskdino.data.images import ImageError
from maskdino.data.reading import read_image, read_map
from maskdino.visualization.images import load_image

GRAY = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10
COLOR = np.stack([GRAY, GRAY[::-1], GRAY[:, ::-1]], axis=2)
EXIF_ORIENTATION = 0x0112


def exif(orientation: int) -> Image.Exif:
    """EXIF data that tell how the camera was turned."""
    result = Image.Exif()
    result[EXIF_ORIENTATION] = orientation
    return result


def rgba() -> np.ndarray:
    """Colors, some of which are transparent."""
    alpha = np.full((4, 6, 1), 255, np.uint8)
    alpha[0, 0], alpha[0, 1] = 0, 51
    return np.concatenate([COLOR, alpha], axis=2)


WHITE_CORNER = COLOR.copy()
WHITE_CORNER[0, 0] = 255
WHITE_CORNER[0, 1] = [round(0.2 * c + 0.8 * 255) for c in COLOR[0, 1].tolist()]
GRAY_RGB = np.repeat(GRAY[..., None], 3, axis=2)
# Name of the file, what it holds, options of its format, what must be seen.
FILES = [
    ("gray.png", GRAY, {}, GRAY_RGB),
    ("gray16.png", GRAY.astype(np.uint16) * 257, {}, GRAY_RGB),
    ("gray16.tif", GRAY.astype(np.uint16) * 257, {}, GRAY_RGB),
    ("int32.tif", GRAY.astype(np.int32) * 257, {}, GRAY_RGB),
    ("float.tif", GRAY.astype(np.float32) / 255, {}, GRAY_RGB),
    ("color.png", COLOR, {}, COLOR),
    ("color.bmp", COLOR, {}, COLOR),
    ("alpha.png", rgba(), {}, WHITE_CORNER),
    ("opaque.png", np.dstack([COLOR, np.full((4, 6), 255, np.uint8)]), {}, COLOR),
    ("bits.png", GRAY > 100, {}, np.repeat((GRAY > 100)[..., None] * np.uint8(255), 3, axis=2)),
    ("turned.png", COLOR, {"exif": exif(6)}, np.rot90(COLOR, -1)),
    ("mirrored.png", COLOR, {"exif": exif(5)}, COLOR.transpose(1, 0, 2)),
]


@pytest.mark.parametrize(("name", "pixels", "options", "expected"), FILES)
def test_one_reader(
    name: str, pixels: np.ndarray, options: dict, expected: np.ndarray, tmp_path: Path
) -> None:
    path = tmp_path / name
    Image.fromarray(pixels).save(path, **options)
    for found in (read_image(str(path), "RGB"), load_image(path), load_image(Image.open(path))):
        np.testing.assert_array_equal(found, expected)
    bgr = read_image(str(path), "BGR")
    np.testing.assert_array_equal(bgr, expected[..., ::-1])
    assert bgr.flags.c_contiguous
    assert file_problem(path, expected.shape[:2]) is None


@pytest.mark.parametrize("mode", ["P", "CMYK", "LAB", "YCbCr", "PA", "LA"])
@pytest.mark.parametrize("suffix", ["png", "tif", "gif", "jpg"])
def test_modes_of_pillow(mode: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"image.{suffix}"
    try:
        Image.fromarray(rgba()).convert("RGB").convert(mode).save(path)
        with Image.open(path) as image:
            image.load()  # not all that it writes can it read: YCbCr in TIFF before Pillow 13
    except (OSError, ValueError):
        pytest.skip(f"Pillow writes, or reads, no {mode} in {suffix}")
    np.testing.assert_array_equal(read_image(str(path), "RGB"), load_image(path))


def test_transparent_palette_lies_on_white(tmp_path: Path) -> None:
    path = tmp_path / "clear.gif"
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(path, transparency=0)
    np.testing.assert_array_equal(read_image(str(path), "RGB"), [[[255] * 3, [10, 20, 30]]])


def test_transparent_arrays_of_either_order() -> None:
    bgra = rgba()[..., [2, 1, 0, 3]]
    np.testing.assert_array_equal(load_image(bgra, "BGR"), load_image(rgba()))


def test_a_gray_model_sees_gray(tmp_path: Path) -> None:
    path = tmp_path / "gray16.png"
    Image.fromarray(GRAY.astype(np.uint16) * 257).save(path)
    np.testing.assert_array_equal(read_image(str(path), "L"), GRAY[..., None])


def test_transparency_changes_no_labels(tmp_path: Path) -> None:
    path = tmp_path / "map.png"
    Image.fromarray(rgba()).save(path)
    np.testing.assert_array_equal(read_map(str(path), "RGB"), COLOR)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((4, 6), 70000, np.int32), "values from 70000 to 70000 do not fit into 16 bits"),
        (np.full((4, 6), 200.0, np.float32), r"float values must lie in \[0, 1\]"),
    ],
)
def test_values_that_nobody_understands(values: np.ndarray, message: str, tmp_path: Path) -> None:
    path = tmp_path / "wild.tif"
    Image.fromarray(values).save(path)
    with pytest.raises(DataError, match=rf"wild\.tif: {message}.*\. Replace the file"):
        read_image(str(path), "RGB")
    with pytest.raises(ImageError, match=message):
        load_image(path)
    kind, detail = file_problem(path, (4, 6))
    assert kind == "image cannot be read"
    assert values.dtype.name.startswith(("int", "float")) and "values" in detail

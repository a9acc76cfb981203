"""Parts of images: the same pixels as of the whole image, and no more of it in memory."""

from __future__ import annotations

import importlib.util
import logging
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from maskdino.inference import tiles
from maskdino.inference.tiles import TiledImage
from maskdino.visualization.images import ImageError, load_image
from tests.memory import needs_linux, resident_mib

real_rasterio = pytest.mark.skipif(
    importlib.util.find_spec("rasterio") is None, reason="rasterio is not installed"
)
ROWS, COLUMNS = slice(3, 40), slice(5, 90)


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (70, 90, 4), np.uint8)


def check_part(path: Path, *, whole: bool) -> None:
    image = TiledImage(path)
    assert image.whole == whole and image.size == load_image(path).shape[:2]
    part = image.part(ROWS, slice(5, image.size[1]))
    np.testing.assert_array_equal(part, load_image(path)[ROWS, 5:])


@pytest.mark.parametrize("name", ["a.tif", "a.ppm", "a.pgm"])
def test_uncompressed_files_are_read_in_parts(
    name: str, pixels: np.ndarray, tmp_path: Path
) -> None:
    Image.fromarray(pixels[..., 0] if name == "a.pgm" else pixels[..., :3]).save(tmp_path / name)
    check_part(tmp_path / name, whole=False)


@pytest.mark.parametrize("big", [False, True])
def test_tiff_of_more_than_4_gigabytes_has_another_header(
    big: bool, pixels: np.ndarray, tmp_path: Path
) -> None:
    Image.fromarray(pixels[..., :3]).save(tmp_path / "a.tif", big_tiff=big)
    check_part(tmp_path / "a.tif", whole=False)


@pytest.mark.parametrize("name", ["a.png", "packed.tif", "turned.tif", "palette.png", "alpha.png"])
def test_other_files_are_read_whole(
    name: str, pixels: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "IN_WINDOWS", frozenset())
    image = Image.fromarray(pixels if name == "alpha.png" else pixels[..., :3])
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"packed.tif": {"compression": "tiff_lzw"}, "turned.tif": {"exif": exif}}
    image = image.quantize(9) if name == "palette.png" else image
    image.save(tmp_path / name, **options.get(name, {}))
    check_part(tmp_path / name, whole=True)


def test_the_guard_against_huge_images_is_lifted_for_slices_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Image.new("RGB", (90, 70)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    monkeypatch.setattr(tiles, "MUCH", 10_000)
    with pytest.raises(ImageError, match="exceeds limit of 200 pixels"):
        load_image(tmp_path / "a.png")
    with caplog.at_level(logging.WARNING):
        assert TiledImage(tmp_path / "a.png").size == (70, 90)
    assert Image.MAX_IMAGE_PIXELS == 100
    (record,) = caplog.records
    assert "a.png can only be decoded as a whole, in 0.0 GB of memory; TIFF" in record.message


def test_what_does_not_fit_into_memory_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (90, 70)).save(tmp_path / "a.png")

    def load(_image: Image.Image) -> None:
        raise MemoryError

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    with pytest.raises(
        ImageError, match=r"a\.png of 90 x 70 pixels does not fit into memory; TIFF"
    ):
        TiledImage(tmp_path / "a.png")


def test_broken_files_are_named(tmp_path: Path) -> None:
    Image.new("RGB", (90, 70)).save(tmp_path / "cut.ppm")
    Image.new("RGB", (90, 70)).save(tmp_path / "cut.jpg")
    for name in ("cut.ppm", "cut.jpg"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) * 3 // 5])
        with pytest.raises(ImageError, match=rf"cannot read image .*{name}"):
            TiledImage(tmp_path / name)
    with pytest.raises(ImageError, match=r"missing\.tif does not exist"):
        TiledImage(tmp_path / "missing.tif")


@needs_linux
def test_pages_of_a_mapped_file_do_not_stay(tmp_path: Path) -> None:
    path = tmp_path / "large.ppm"
    with path.open("wb") as file:
        file.write(b"P6 8000 5000 255\n")
        file.truncate(17 + 8000 * 5000 * 3)  # 120 MB
    image = TiledImage(path)
    before = resident_mib()
    for top in range(0, 5000, 500):
        image.part(slice(top, top + 500), slice(0, 8000))
    assert resident_mib() - before < 60


def test_rasterio_reads_windows_where_it_is_installed(
    tmp_path: Path, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in with the functions of rasterio that are used."""
    windows = []

    def read(bands: list[int], window: tuple) -> np.ndarray:
        windows.append(window)
        (top, bottom), (left, right) = window
        return pixels[top:bottom, left:right].transpose(2, 0, 1)[[band - 1 for band in bands]]

    def opened(path: Path) -> SimpleNamespace:
        if not path.is_file():
            raise stand_in.errors.RasterioError("No such file or directory")
        if "broken" in path.name:
            raise stand_in.errors.RasterioError("not a supported file format")
        kinds = {"count": 4, "colorinterp": "rgbx", "dtypes": ("uint8",) * 4}
        return SimpleNamespace(height=70, width=90, read=read, **kinds)

    class Env:
        def __init__(self, **options: int) -> None:
            assert options == {"GDAL_CACHEMAX": 256}

        def __enter__(self) -> None: ...

        def __exit__(self, *error: object) -> None: ...

    stand_in = ModuleType("rasterio")
    stand_in.__spec__ = SimpleNamespace()
    stand_in.open, stand_in.Env = opened, Env
    stand_in.enums = SimpleNamespace(ColorInterp=SimpleNamespace(alpha="alpha"))
    stand_in.errors = SimpleNamespace(
        RasterioError=type("RasterioError", (Exception,), {}),
        NotGeoreferencedWarning=type("NotGeoreferencedWarning", (UserWarning,), {}),
    )
    monkeypatch.setitem(sys.modules, "rasterio", stand_in)
    Image.fromarray(pixels[..., 0]).save(tmp_path / "packed.tif", compression="tiff_lzw")
    image = TiledImage(tmp_path / "packed.tif")
    np.testing.assert_array_equal(image.part(ROWS, COLUMNS), pixels[ROWS, COLUMNS, :3])
    assert windows == [((3, 40), (5, 90))] and not image.whole
    (tmp_path / "broken.tif").write_bytes(b"II")
    with pytest.raises(ImageError, match=r"cannot read image .*broken\.tif: not a supported file"):
        TiledImage(tmp_path / "broken.tif")
    (tmp_path / "folder.tif").mkdir()
    for name, reason in (("missing.tif", "does not exist"), ("folder.tif", "is a folder")):
        with pytest.raises(ImageError, match=rf"{name} {reason}"):
            TiledImage(tmp_path / name)


@real_rasterio
@pytest.mark.parametrize(
    ("name", "channels", "whole"),
    [
        ("rows.tif", 3, False),
        ("gray.tif", 1, False),
        ("alpha.tif", 4, False),
        ("tiled.tif", 3, False),
        ("a.png", 3, False),
        ("palette.png", 3, True),
        ("palette.tif", 3, True),
        ("turned.tif", 3, True),
    ],
)
def test_what_rasterio_reads_is_what_pillow_reads(
    name: str,
    channels: int,
    whole: bool,
    pixels: np.ndarray,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tiles, "LARGE_PNG", 0)
    path = tmp_path / name
    image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels[..., :channels])
    if name == "tiled.tif":
        import rasterio

        kinds = {"count": 3, "dtype": "uint8", "photometric": "rgb", "compress": "deflate"}
        shape = {"height": 70, "width": 90, "tiled": True, "blockxsize": 32, "blockysize": 32}
        with rasterio.open(path, "w", driver="GTiff", BIGTIFF="YES", **kinds, **shape) as file:
            file.write(pixels[..., :3].transpose(2, 0, 1))
    else:
        exif = Image.Exif()
        exif[0x0112] = 6
        image = image.quantize(9) if "palette" in name else image
        options = {"exif": exif} if name == "turned.tif" else {}
        packed = {"compression": "tiff_lzw"} if name.endswith("tif") else {}
        image.save(path, **options, **packed)
    check_part(path, whole=whole)

"""Image files of all kinds, as training, evaluation, own data and prediction read them."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from maskdino.data.reading import read_image
from tests.corpus.case import Case, Either, Outcome, Ran, Refused, Works
from tests.corpus.scene import (
    SIZE,
    content,
    custom_words,
    evaluation_words,
    pixels,
    training_words,
    write_images,
)
from tests.corpus.small_model import prediction_words

KIND = "images"
WAYS = ("train", "evaluate", "train-custom", "predict")
RGB = pixels(1)
GRAY = RGB[..., 0]
Make = Callable[[Path], object]


@dataclass(frozen=True)
class File:
    """An image file.

    Attributes:
        name: of what is special about it.
        suffix: of the file.
        make: writes it.
        truth: (H, W, 3) uint8 that is to be read; None: it is refused; "either": one or the other.
        tolerance: largest difference of a value.
    """

    name: str
    suffix: str
    make: Make
    truth: np.ndarray | str | None
    tolerance: int = 0


def saved(array: np.ndarray | Image.Image, **options: object) -> Make:
    """Writes pixels as Pillow does."""
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    return lambda path: image.save(path, **options)


def of_bytes(data: bytes) -> Make:
    """Writes bytes."""
    return lambda path: path.write_bytes(data)


def encoded(kind: str, **options: object) -> bytes:
    """The image in a file format."""
    buffer = io.BytesIO()
    Image.fromarray(RGB).save(buffer, kind, **options)
    return buffer.getvalue()


def gray(values: np.ndarray) -> np.ndarray:
    """(H, W) to (H, W, 3)."""
    return np.repeat(values[..., None], 3, axis=2)


def whole() -> Iterator[File]:
    """Files in which nothing is wrong."""
    yield File("8 bits, gray", ".png", saved(GRAY), gray(GRAY))
    yield File("gray jpeg", ".jpg", saved(GRAY, quality=95), gray(GRAY), 40)
    yield File("one bit", ".png", saved(Image.fromarray(GRAY > 99)), gray(255 * (GRAY > 99)))
    wide = GRAY.astype(np.uint16) * 257
    for suffix in (".png", ".tif", ".pgm"):
        yield File("16 bits, gray", suffix, saved(wide), gray(GRAY))
    parts = GRAY.astype(np.float32) / 255
    yield File("floats from 0 to 1", ".tif", saved(parts), gray(GRAY))
    yield File("32 bits, small values", ".tif", saved(wide.astype(np.int32)), gray(GRAY))
    few = Image.fromarray(RGB).quantize(16)
    yield File("palette", ".png", saved(few), np.array(few.convert("RGB")))
    yield File("palette", ".gif", saved(few), np.array(few.convert("RGB")))
    yield File("palette", ".bmp", saved(few), np.array(few.convert("RGB")))
    for alpha in (255, 128, 0):
        rgba = np.dstack([RGB, np.full(SIZE, alpha, np.uint8)])
        mixed = (RGB * (alpha / 255) + 255 * (1 - alpha / 255)).round().astype(np.uint8)
        yield File(f"alpha {alpha}", ".png", saved(rgba), mixed, 1)
        yield File(f"alpha {alpha}", ".webp", saved(rgba, lossless=True, exact=True), mixed, 1)
        gray_alpha = Image.fromarray(np.dstack([GRAY, rgba[..., 3]]), "LA")
        yield File(f"gray and alpha {alpha}", ".png", saved(gray_alpha), gray(mixed[..., 0]), 1)
    seen = few.copy()
    index = int(np.array(few)[0, 0])
    laid = np.array(few.convert("RGB"))
    laid[np.array(few) == index] = 255
    yield File("transparent color", ".png", saved(seen, transparency=index), laid)
    for suffix in (".bmp", ".tif", ".tga", ".ppm", ".webp", ".png"):
        options = {"lossless": True} if suffix == ".webp" else {}
        yield File("colors", suffix, saved(RGB, **options), RGB)
    for compression in ("tiff_lzw", "packbits", "tiff_deflate", "tiff_adobe_deflate"):
        yield File(compression, ".tif", saved(RGB, compression=compression), RGB)
    yield File("jpeg", ".jpg", saved(RGB, quality=98), RGB, 120)
    yield File("progressive jpeg", ".jpg", saved(RGB, quality=98, progressive=True), RGB, 120)
    yield File(
        "cmyk jpeg", ".jpg", saved(Image.fromarray(RGB).convert("CMYK"), quality=98), RGB, 120
    )
    yield File("cmyk", ".tif", saved(Image.fromarray(RGB).convert("CMYK")), RGB, 1)
    yield File("jpeg called png", ".png", of_bytes(encoded("JPEG", quality=98)), RGB, 120)
    yield File("png called jpg", ".jpg", of_bytes(encoded("PNG")), RGB)
    yield File("no known suffix", ".data", of_bytes(encoded("PNG")), RGB)
    more = [Image.fromarray(np.zeros_like(RGB))]
    for suffix in (".tif", ".png", ".webp"):
        options = {"save_all": True, "append_images": more}
        options |= {"lossless": True} if suffix == ".webp" else {}
        yield File("several pages", suffix, saved(RGB, **options), RGB)
    yield File("broken exif", ".png", saved(RGB, exif=b"Exif\x00\x00garbage"), RGB)
    yield File("broken profile", ".png", saved(RGB, icc_profile=b"garbage"), RGB)
    yield File("bytes behind the end", ".png", of_bytes(encoded("PNG") + b"more"), RGB)
    turns: dict[int, Callable[[np.ndarray], np.ndarray]] = {
        1: lambda x: x,
        2: np.fliplr,
        3: lambda x: np.rot90(x, 2),
        4: np.flipud,
        5: lambda x: x.swapaxes(0, 1),
        6: np.rot90,
        7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
        8: lambda x: np.rot90(x, -1),
    }
    for orientation, turn in turns.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = np.ascontiguousarray(turn(RGB))
        yield File(f"turned, {orientation}", ".png", saved(stored, exif=exif), RGB)
    for orientation in (0, 9, 700):
        exif = Image.Exif()
        exif[0x0112] = orientation
        yield File(f"turned, {orientation}", ".png", saved(RGB, exif=exif), RGB)


def broken() -> Iterator[File]:
    """Files that cannot be read."""
    png = encoded("PNG")
    for name, data in {
        "empty": b"",
        "zeros": bytes(500),
        "text": b"no image\n",
        "html": b"<!DOCTYPE html><html></html>",
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="64" height="48"/>',
        "pdf": b"%PDF-1.4\n%%EOF\n",
        "zip": b"PK\x03\x04" + bytes(60),
        "lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n",
        "signature alone": png[:8],
        "header alone": png[:33],
        "no end of header": png[:20],
        "array": b"\x93NUMPY\x01\x00" + bytes(90),
        "random": bytes((i * 7919) % 251 for i in range(2000)),
    }.items():
        yield File(name, ".png", of_bytes(data), None)
    for kind, suffix in (
        ("PNG", ".png"),
        ("JPEG", ".jpg"),
        ("BMP", ".bmp"),
        ("TIFF", ".tif"),
        ("WEBP", ".webp"),
        ("PPM", ".ppm"),
    ):
        data = encoded(kind)
        for percent in (10, 50, 90):
            cut = data[: len(data) * percent // 100]
            yield File(f"cut at {percent} %", suffix, of_bytes(cut), None)
    for name, size in (("bomb", (60_000, 60_000)), ("beyond memory", (2**31 - 1, 2**31 - 1))):
        head = png[:16] + struct.pack(">II", *size) + png[24:]
        yield File(name, ".png", of_bytes(head), None)
    for name, size in (("no width", (0, 48)), ("no height", (64, 0))):
        yield File(name, ".png", of_bytes(png[:16] + struct.pack(">II", *size) + png[24:]), None)
    pattern = np.linspace(0, 1, GRAY.size, dtype=np.float32).reshape(SIZE)
    yield File("floats beyond 1", ".tif", saved(pattern * 300), None)
    yield File("negative floats", ".tif", saved(pattern - 0.5), None)
    yield File(
        "floats not finite",
        ".tif",
        saved(np.where(pattern == pattern[3, 3], np.inf, pattern)),
        None,
    )
    yield File("floats not numbers", ".tif", saved(pattern * np.float32("nan")), None)
    yield File("32 bits", ".tif", saved((pattern * 2**30).astype(np.int32)), None)
    yield File("32 bits, negative", ".tif", saved((pattern * -300).astype(np.int32)), None)
    yield File("a folder", ".png", lambda path: path.mkdir(), None)
    yield File("a link to itself", ".png", lambda path: path.symlink_to(path), None)
    yield File("a link to nothing", ".png", lambda path: path.symlink_to("lost.png"), None)
    yield File("missing", ".png", lambda _: None, None)


def damaged() -> Iterator[File]:
    """Files of which some bytes are others: read, or refused."""
    for kind, suffix in (("PNG", ".png"), ("JPEG", ".jpg"), ("TIFF", ".tif"), ("WEBP", ".webp")):
        data = encoded(kind)
        for seed in range(10):
            generator = np.random.default_rng(seed)
            bytes_ = bytearray(data)
            for place in generator.integers(8, len(data), 1 + 3 * seed):
                bytes_[place] ^= int(generator.integers(1, 256))
            yield File(f"damaged, {seed}", suffix, of_bytes(bytes(bytes_)), "either")


def _outcome(file: File, way: str) -> Outcome:
    name = f"bad{file.suffix}"

    def near(found: np.ndarray) -> None:
        assert isinstance(file.truth, np.ndarray)
        assert found.shape == file.truth.shape, found.shape
        worst = int(np.abs(found.astype(int) - file.truth).max())
        assert worst <= file.tolerance, f"values differ by up to {worst}"

    def read(ran: Ran) -> None:
        near(read_image(str(ran.folder / "images" / name), "RGB"))

    def drawn(ran: Ran) -> None:
        suffix = ".jpg" if file.suffix == ".jpg" else ".png"
        found = np.array(Image.open(ran.folder / "out" / f"bad{suffix}").convert("RGB"))
        if suffix == ".png":  # nothing is drawn on it
            near(found)

    refused = Refused((name.replace(".", r"\."),), lines=20 if way == "train-custom" else 1)
    if file.truth is None:
        return refused
    if isinstance(file.truth, str):
        return Either((refused, Works()))
    return Works(drawn if way == "predict" else read)


def _write(file: File, way: str, folder: Path) -> list[str]:
    images = write_images(folder)
    (images / "a.png").unlink()
    path = images / f"bad{file.suffix}"
    file.make(path)
    if way == "predict":
        words = ["--input", path, "--output", folder / "out", "--confidence-threshold", 1]
        return prediction_words(*words)
    data = content()
    data["images"][0]["file_name"] = path.name
    json_file = folder / "scene.json"
    json_file.write_text(json.dumps(data))
    words_of = {"train": training_words, "evaluate": evaluation_words}
    return words_of.get(way, custom_words)(folder, json_file)


def cases() -> list[Case]:
    """Every file on every way."""
    return [
        Case(KIND, way, f"{f.name} {f.suffix[1:]}", partial(_write, f, way), _outcome(f, way))
        for group in (whole, broken, damaged)
        for f in group()
        for way in WAYS
    ]

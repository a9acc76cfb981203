"""Parts of images that are too large to lie in memory, where their format allows.

Without compression, TIFF and PNM files are mapped: what is not read costs nothing. With `rasterio`
installed, other TIFF files (in tiles or rows, compressed, BigTIFF), JPEG 2000 and large PNG files
are read in windows. All others, such as JPEG, can only be decoded as a whole: four bytes to a pixel
of colors, and one of gray.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import threading
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from maskdino.data.images import BROKEN_IMAGE, orientation
from maskdino.visualization.images import ImageError, ImageSource, load_image

IN_WINDOWS = frozenset((".tif", ".tiff", ".jp2", ".png"))  # what rasterio reads in parts
# PNG is decoded from its beginning: with fewer pixels, at one time.
LARGE_PNG = 1 << 26
# What Pillow and rasterio read alike; palettes, inks and transparent colors are left to Pillow.
PLAIN_MODES = frozenset(("L", "RGB", "RGBA", "YCbCr", "I;16", "I;16B", "F"))
MAPPED_MODES = {"L": 1, "RGB": 3}  # and their channels of 8 bits
CACHE = 256  # MiB that rasterio keeps of what it decoded: rows of slices overlap
MUCH = 1 << 30  # bytes of an image in memory, of more of which a warning tells

logger = logging.getLogger(__name__)
_LIMIT = threading.Lock()


class TiledImage:
    """An image of which parts are read.

    Attributes:
        size: (H, W) in pixels.
        source: the image's path, or (H, W, 3) uint8 RGB.
        whole: whether all of it lies in memory.
    """

    def __init__(self, source: ImageSource, channel_order: str = "RGB") -> None:
        """Opens an image.

        Args:
            source: see `maskdino.visualization.images.load_image`; however large.
            channel_order: "RGB" or "BGR", of arrays and tensors.

        Raises:
            ImageError: something is no image; names it.
        """
        read = None
        if isinstance(source, str | os.PathLike):
            self.source: ImageSource = source
            read = _mapped(Path(source)) or _in_windows(Path(source))
            self.whole = read is None
            read = read or _decoded(Path(source))
        if read is None:
            self.whole = True
            with _of_any_size():
                image = load_image(source, channel_order)
            if not isinstance(source, str | os.PathLike):
                self.source = image
            read = image.shape[:2], lambda rows, columns: image[rows, columns]
        self.size, self._read = read

    def __reduce__(self) -> tuple[type[TiledImage], tuple[ImageSource]]:
        """Another process opens the file again, or gets the pixels."""
        return TiledImage, (self.source,)

    def part(self, rows: slice, columns: slice) -> np.ndarray:
        """(h, w, 3) uint8 RGB of some rows and columns, both with a beginning and an end.

        Raises:
            ImageError: that part of the file is broken, or its values are none of an image.
        """
        try:
            return load_image(np.ascontiguousarray(self._read(rows, columns)))
        except ImageError as error:
            raise ImageError(f"image {self.source}: {error}") from error


Reader = tuple[tuple[int, int], Callable[[slice, slice], np.ndarray]]


@contextmanager
def _of_any_size() -> Iterator[None]:
    """Inside, Pillow opens images of any size: whoever asks for slices expects large ones."""
    with _LIMIT:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _mapped(path: Path) -> Reader | None:
    """Maps a file that holds its pixels without compression, row by row; None for all others."""
    try:
        with _of_any_size(), Image.open(path) as image:
            blocks, (width, height) = image.tile, image.size
            if image.format not in ("TIFF", "PPM") or not _is_plain(image, MAPPED_MODES):
                return None
            channels = MAPPED_MODES[image.mode]
            row = width * channels
            offset = blocks[0][2]
            for decoder, (left, top, right, _), begin, arguments in blocks:
                raw = arguments if isinstance(arguments, str) else arguments[0]
                if (decoder, left, right, raw) != ("raw", 0, width, image.mode):
                    return None
                if begin != offset + top * row:
                    return None
    except (*BROKEN_IMAGE, IndexError, TypeError):
        return None  # `load_image` says what is wrong
    if path.stat().st_size < offset + height * row:
        return None

    def read(rows: slice, columns: slice) -> np.ndarray:
        # Mapped anew each time: pages that were read would count as memory of the process.
        shape = rows.stop - rows.start, width, channels
        pixels = np.memmap(path, np.uint8, "r", offset + rows.start * row, shape)
        return np.array(pixels[:, columns])

    return (height, width), read


def _is_plain(image: Image.Image, modes: Collection[str]) -> bool:
    """Whether pixels are colors as they stand in the file."""
    return image.mode in modes and orientation(image) == 1 and "transparency" not in image.info


def _in_windows(path: Path) -> Reader | None:
    """Reads with rasterio, if installed, what that reads in parts and as Pillow does; else None."""
    if path.suffix.lower() not in IN_WINDOWS or importlib.util.find_spec("rasterio") is None:
        return None
    is_png = path.suffix.lower() == ".png"
    try:
        with _of_any_size(), Image.open(path) as image:
            small = is_png and image.size[0] * image.size[1] < LARGE_PNG
            if small or not _is_plain(image, PLAIN_MODES):
                return None
    except BROKEN_IMAGE:  # Pillow does not know all that rasterio does
        if is_png or not path.is_file():  # `load_image` says what is wrong
            return None
    import rasterio

    def attempt(act: Callable[[], Any]) -> Any:
        try:
            with warnings.catch_warnings(), rasterio.Env(GDAL_CACHEMAX=CACHE):
                warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
                return act()
        except rasterio.errors.RasterioError as error:
            raise ImageError(f"cannot read image {path}: {error}") from error

    file = attempt(lambda: rasterio.open(path))
    if is_png and set(file.dtypes) != {"uint8"}:  # Pillow keeps the upper 8 of 16 bits
        return None
    bands = [1, 2, 3] if file.count >= 3 else [1]
    if file.count == 4 and file.colorinterp[3] == rasterio.enums.ColorInterp.alpha:
        bands.append(4)

    def read(rows: slice, columns: slice) -> np.ndarray:
        window = (rows.start, rows.stop), (columns.start, columns.stop)
        return attempt(lambda: file.read(bands, window=window)).transpose(1, 2, 0)

    return (file.height, file.width), read


def _decoded(path: Path) -> Reader | None:
    """Decodes a file once with Pillow; None where its values are to be converted (`load_image`)."""
    size = 0, 0
    try:
        with _of_any_size(), Image.open(path) as image:
            width, height = size = image.size
            if not _is_plain(image, MAPPED_MODES):
                return None
            needed = width * height * (4 if image.mode == "RGB" else 1)
            if needed > MUCH:
                logger.warning(
                    "%s can only be decoded as a whole, in %.1f GB of memory; TIFF files, and with "
                    "rasterio PNG files, are read in parts",
                    path,
                    needed / 1e9,
                )
            image.load()
    except MemoryError as error:
        raise ImageError(
            f"image {path} of {size[0]} x {size[1]} pixels does not fit into memory; TIFF files, "
            "and with rasterio PNG files, are read in parts"
        ) from error
    except BROKEN_IMAGE:
        return None  # `load_image` says what is wrong

    def read(rows: slice, columns: slice) -> np.ndarray:
        with _of_any_size():  # Pillow before 13 asks for the size of a part, too
            part = image.crop((columns.start, rows.start, columns.stop, rows.stop))
        return np.asarray(part)

    return (height, width), read

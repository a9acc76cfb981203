"""Parts of images that are too large to lie in memory, where their format allows.

Without compression, TIFF and PNM files are mapped: what is not read costs nothing. With `rasterio`
installed, TIFF and JPEG 2000 files are read in windows, whatever their compression. All others,
such as PNG and JPEG, can only be decoded from their beginning: they are read whole, three bytes to
a pixel.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from maskdino.visualization.images import ImageError, ImageSource, load_image

EXIF_ORIENTATION = 0x0112
IN_WINDOWS = frozenset((".tif", ".tiff", ".jp2"))  # what rasterio reads in parts
MAPPED_MODES = {"L": 1, "RGB": 3}  # and their channels of 8 bits


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
        if read is None:
            with _of_any_size():
                image = load_image(source, channel_order)
            if not isinstance(source, str | os.PathLike):
                self.source = image
            read = image.shape[:2], lambda rows, columns: image[rows, columns]
        self.size, self._read = read

    def part(self, rows: slice, columns: slice) -> np.ndarray:
        """(h, w, 3) uint8 RGB of some rows and columns, both with a beginning and an end."""
        part = self._read(rows, columns)
        return part if self.whole else load_image(np.ascontiguousarray(part))


Reader = tuple[tuple[int, int], Callable[[slice, slice], np.ndarray]]


@contextmanager
def _of_any_size() -> Iterator[None]:
    """Pillow refuses what looks like an attack; who asks for slices means the image to be large."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _mapped(path: Path) -> Reader | None:
    """Of a file whose pixels stand there as they are, row by row; None for all others."""
    try:
        with _of_any_size(), Image.open(path) as image:
            blocks, (width, height) = image.tile, image.size
            if (
                image.format not in ("TIFF", "PPM")
                or image.mode not in MAPPED_MODES
                or image.getexif().get(EXIF_ORIENTATION, 1) != 1
                or "transparency" in image.info
            ):
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
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError):
        return None  # `load_image` says what is wrong
    if path.stat().st_size < offset + height * row:
        return None
    pixels = np.memmap(path, np.uint8, "r", offset, (height, width, channels))
    return (height, width), lambda rows, columns: np.asarray(pixels[rows, columns])


def _in_windows(path: Path) -> Reader | None:
    """By rasterio, where it is installed; None for formats that it would read whole."""
    if path.suffix.lower() not in IN_WINDOWS or importlib.util.find_spec("rasterio") is None:
        return None
    import rasterio

    try:
        file = rasterio.open(path)
    except rasterio.errors.RasterioError as error:
        raise ImageError(f"cannot read image {path}: {error}") from error
    bands = [1, 2, 3] if file.count >= 3 else [1]

    def read(rows: slice, columns: slice) -> np.ndarray:
        try:
            part = file.read(bands, window=((rows.start, rows.stop), (columns.start, columns.stop)))
        except rasterio.errors.RasterioError as error:
            raise ImageError(f"cannot read image {path}: {error}") from error
        return part.transpose(1, 2, 0)

    return (file.height, file.width), read

"""Images of any kind to (H, W, 3) uint8 RGB: one reader for training, evaluation, prediction."""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
from detectron2.utils.file_io import PathManager
from PIL import Image, ImageOps, UnidentifiedImageError

from maskdino.system.errors import UserError
from maskdino.system.files import written_whole

ImageSource = str | os.PathLike | np.ndarray | Image.Image | torch.Tensor
CHANNEL_ORDERS = ("RGB", "BGR")
EXIF_ORIENTATION = 0x0112
# What Pillow's decoders raise for broken files.
BROKEN_IMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class ImageError(UserError):
    """Something is no image that can be read; the message names it and says why."""


def load_image(source: ImageSource, channel_order: str = "RGB") -> np.ndarray:
    """Reads an image.

    Gray becomes RGB, transparency is laid on white, 16-bit values are divided by 257, and images
    are turned upright as their EXIF orientation says.

    Args:
        source: a path; a Pillow image; an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), or a
            tensor with the channels first. Arrays and tensors are bool, uint8, uint16, or floats
            in [0, 1].
        channel_order: "RGB" or "BGR", of arrays and tensors with three or four channels.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        ImageError: a file that is missing, truncated or no image; an array of another shape,
            type or range.
        TypeError: the source is something else altogether.
    """
    if channel_order not in CHANNEL_ORDERS:
        raise ValueError(f"channel_order is {channel_order!r}; it must be RGB or BGR")
    if isinstance(source, str | os.PathLike):
        return _from_file(os.fspath(source))
    if isinstance(source, Image.Image):
        return decode(source)
    if isinstance(source, torch.Tensor):
        if source.ndim not in (2, 3) or (source.ndim == 3 and len(source) not in (1, 3, 4)):
            raise ImageError(
                f"a tensor of shape {tuple(source.shape)} is no image (C, H, W) with C of 1, 3 or 4"
            )
        array = source.detach().cpu()
        array = array.float() if array.dtype == torch.bfloat16 else array  # NumPy has no such type
        source = (array.movedim(0, -1) if array.ndim == 3 else array).numpy()
    if isinstance(source, np.ndarray):
        return _from_array(source, channel_order)
    raise TypeError(
        f"an image is a path, an array, a Pillow image or a tensor, not {type(source).__name__}"
    )


def _from_file(path: str) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            # Large images are welcome; Pillow refuses by itself what looks like an attack.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with PathManager.open(path, "rb") as file, Image.open(file) as image:
                return decode(image)
    except FileNotFoundError as error:
        raise ImageError(f"image {path} does not exist") from error
    except IsADirectoryError as error:
        raise ImageError(f"image {path} is a folder") from error
    except ImageError as error:
        raise ImageError(f"image {path}: {error}") from error
    except UnidentifiedImageError as error:  # whose text shows a Python object
        raise ImageError(f"cannot read image {path}: cannot identify its format") from error
    except BROKEN_IMAGE as error:
        raise ImageError(f"cannot read image {path}: {error}") from error


def orientation(image: Image.Image) -> int:
    """How an image is to be turned, in EXIF's numbers from 1 to 8; 1, not at all, is usual."""
    try:
        value = image.getexif().get(EXIF_ORIENTATION)
    except BROKEN_IMAGE:  # metadata that are none
        return 1
    return value if isinstance(value, int) and 2 <= value <= 8 else 1


def decode(image: Image.Image) -> np.ndarray:
    """Turns a Pillow image of any mode into (H, W, 3) uint8 RGB, as `load_image` says.

    Raises:
        ImageError: values do not fit into 16 bits or, floats, into [0, 1].
        OSError, ValueError, ...: see `BROKEN_IMAGE`.
    """
    if orientation(image) != 1:  # else Pillow would make a copy
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        return _from_array(_wide_values(image), "RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _wide_values(image: Image.Image) -> np.ndarray:
    """Values of a gray image with more than 8 bits; Pillow may give 16 bits as 32."""
    values = np.array(image)
    if values.dtype.kind == "f":
        return values
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise ImageError(f"values from {values.min()} to {values.max()} do not fit into 16 bits")
    return values.astype(np.uint16)


def _from_array(array: np.ndarray, channel_order: str) -> np.ndarray:
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or channels not in (1, 3, 4) or 0 in array.shape:
        raise ImageError(
            f"an array of shape {array.shape} is no image: (height, width) with 1, 3 or 4 "
            "channels last, and at least one pixel"
        )
    array = _to_uint8(array.reshape(*array.shape[:2], channels))
    if channels == 1:
        return np.repeat(array, 3, axis=2)
    colors = array[..., :3] if channel_order == "RGB" else array[..., 2::-1]
    if channels == 4:
        alpha = array[..., 3:].astype(np.uint16)
        colors = ((colors * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    return np.ascontiguousarray(colors)


def _to_uint8(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if array.dtype == np.uint16:
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if array.dtype.kind == "f":
        low, high = float(array.min()), float(array.max())
        if not 0 <= low <= high <= 1:  # also false for NaN
            raise ImageError(f"float values must lie in [0, 1], not in [{low}, {high}]")
        return (array * 255).round().astype(np.uint8)
    raise ImageError(f"values of type {array.dtype}; they must be bool, uint8, uint16 or float")


def save_png(path: Path, pixels: np.ndarray) -> None:
    """Writes (H, W) of 8 or 16 bits, or (H, W, 3) uint8, whole or not at all; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path, sync=False) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")

"""Draws regions, boxes and labels on images, and puts images side by side.

Colors are (red, green, blue), 0 to 255. Images are (H, W, 3) uint8 RGB.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from maskdino.ops.masks import Mask

Color = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

FILL_OPACITY = 0.35
MAX_LABELS = 30  # with more regions than this, labels would hide the image
GOLDEN_RATIO = 0.618033988749895
LUMINANCE = np.array([0.299, 0.587, 0.114])  # share of red, green and blue
MIN_LUMINANCE = 0.4
PIXELS_OF_A_PLACE = 1 << 20  # of a mask, at which the place of its label is found
ROWS_AT_ONCE = 256
GAP = 8  # pixels between images


@dataclass(frozen=True)
class Region:
    """One thing to draw.

    Attributes:
        color: of fill, contour, box and label.
        label: text, "" for none.
        box: x0, y0, x1, y1 in pixels, or None.
        mask: or None.
    """

    color: Color
    label: str = ""
    box: tuple[float, float, float, float] | None = None
    mask: Mask | None = None


@lru_cache(maxsize=4096)
def color_of(index: int) -> Color:
    """A bright color; neighboring numbers get colors that are far apart."""
    hue = (index * GOLDEN_RATIO + 0.02) % 1
    saturation = (0.95, 0.6, 0.8)[index % 3]
    value = (1.0, 1.0, 0.8)[(index // 3) % 3]
    color = np.array(colorsys.hsv_to_rgb(hue, saturation, value))
    # Pure blue and violet are too dark to be seen on a dark image: mix in white.
    white = max(0.0, (MIN_LUMINANCE - color @ LUMINANCE) / (1 - color @ LUMINANCE))
    red, green, blue = (int(part) for part in (255 * (color + white * (1 - color))).round())
    return red, green, blue


def draw_regions(
    image: np.ndarray,
    regions: Sequence[Region],
    *,
    scale: int = 1,
    show_boxes: bool | None = None,
    max_labels: int = MAX_LABELS,
) -> np.ndarray:
    """Draws regions, the largest first.

    Args:
        image: (H, W, 3) uint8; left as it is.
        regions: their masks have the size of the image.
        scale: whole factor by which the image is enlarged first, so that thin lines show.
        show_boxes: None: boxes of regions without a mask, and of those that carry a label.
        max_labels: with more regions than this, no label is drawn.

    Returns:
        (scale * H, scale * W, 3) uint8.
    """
    canvas = enlarge(image, scale)
    width = line_width(canvas)
    for region in sorted(regions, key=_area, reverse=True):
        if region.mask is not None:
            _draw_mask(canvas, region.mask, region.color, scale, width)
    labelled = len(regions) <= max_labels
    drawing = ImageDraw.Draw(drawn := Image.fromarray(canvas))
    for region in regions:
        explained = (labelled and region.label) or region.mask is None
        if region.box is not None and (explained if show_boxes is None else show_boxes):
            box = [scale * value for value in region.box]
            drawing.rectangle(_ordered(box), outline=region.color, width=width)
    if labelled:
        font = ImageFont.load_default(size=font_size(canvas))
        for region in regions:
            if region.label:
                _draw_label(drawing, region, scale, font)
    for top in range(0, len(canvas), ROWS_AT_ONCE):  # of a large image, one copy less
        rows = canvas[top : top + ROWS_AT_ONCE]
        rows[:] = np.asarray(drawn.crop((0, top, rows.shape[1], top + len(rows))))
    return canvas


def enlarge(image: np.ndarray, scale: int) -> np.ndarray:
    """A copy, uint8, with every pixel repeated `scale` times in both directions.

    Raises:
        ValueError: the scale is no whole number from 1 on.
    """
    if scale < 1 or scale != int(scale):
        raise ValueError(f"images are enlarged by whole factors from 1 on, not by {scale}")
    size = (scale * image.shape[1], scale * image.shape[0])
    pixels = np.ascontiguousarray(image, np.uint8)
    return cv2.resize(pixels, size, interpolation=cv2.INTER_NEAREST)


def line_width(image: np.ndarray) -> int:
    """Pixels of lines that look thin at the size of an image."""
    return max(1, round(max(image.shape[:2]) / 900))


def font_size(image: np.ndarray) -> int:
    """Pixels of letters that can be read at the size of an image."""
    return int(np.clip(max(image.shape[:2]) / 55, 10, 200))


def _area(region: Region) -> float:
    if region.mask is not None:
        return region.mask.area
    x0, y0, x1, y1 = region.box or (0, 0, 0, 0)
    return (x1 - x0) * (y1 - y0)


def _ordered(box: Sequence[float]) -> list[float]:
    """The box with its corners in order, which Pillow asks for."""
    x0, y0, x1, y1 = box
    return [x0, y0, max(x0, x1), max(y0, y1)]


def _draw_mask(canvas: np.ndarray, mask: Mask, color: Color, scale: int, width: int) -> None:
    """Fills and outlines in place, strip by strip."""
    values = np.arange(256)[:, None] * (1 - FILL_OPACITY)
    blended = (values + np.multiply(color, FILL_OPACITY)).round().astype(np.uint8)[:, None]
    margin = -(-width // scale)  # columns beside a strip that tell its outline
    for left, right in mask.strips():
        begin, end = max(left - margin, mask.left), min(right + margin, mask.right)
        part = enlarge(mask.columns(begin, end), scale).astype(bool)
        inside = slice(scale * (left - begin), scale * (right - begin))
        filled, outlined = part[:, inside], contour(part, width)[:, inside]
        rows = slice(scale * mask.top, scale * mask.bottom)
        window = canvas[rows, scale * left : scale * right]
        # By table, and cv2 for chosen pixels: many times faster than NumPy's arithmetic on them.
        cv2.copyTo(cv2.LUT(window, blended), filled.view(np.uint8), window)
        window[outlined] = color


def contour(mask: np.ndarray, width: int = 1) -> np.ndarray:
    """(H, W) bool: the foreground pixels that are at most `width` pixels from the background."""
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    inner = cv2.erode(
        mask.astype(np.uint8),
        cross,
        iterations=width,
        borderType=cv2.BORDER_CONSTANT,
        borderValue=0,
    )
    return mask & (inner == 0)


def _draw_label(drawing: ImageDraw.ImageDraw, region: Region, scale: int, font: Font) -> None:
    """Writes above the upper left corner of the box, or on the middle of the mask."""
    left, top, right, bottom = drawing.textbbox((0, 0), region.label, font=font)
    width, height = right - left + 4, bottom - top + 4
    x, y = _label_place(region, width, height, scale)
    limit_x, limit_y = drawing.im.size[0] - width, drawing.im.size[1] - height
    x, y = min(max(x, 0), max(limit_x, 0)), min(max(y, 0), max(limit_y, 0))
    drawing.rectangle([x, y, x + width, y + height], fill=region.color)
    ink = "black" if np.dot(region.color, LUMINANCE) > 110 else "white"
    drawing.text((x + 2 - left, y + 2 - top), region.label, fill=ink, font=font)


def _label_place(region: Region, width: float, height: float, scale: int) -> tuple[float, float]:
    if region.box is not None:
        return scale * region.box[0], scale * region.box[1] - height
    mask = region.mask
    if mask is None or not mask.area:
        return 0, 0
    pixels = (mask.bottom - mask.top) * (mask.right - mask.left)
    rows, columns = _some_pixels(mask, max(1, math.isqrt(pixels // PIXELS_OF_A_PLACE)))
    if len(rows) == 0:  # none of them is of the mask
        rows, columns = _some_pixels(mask, 1)
    distance = (rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2
    nearest = distance.argmin()
    x, y = scale * (mask.left + columns[nearest]), scale * (mask.top + rows[nearest])
    return float(x - width / 2), float(y - height / 2)


def _some_pixels(mask: Mask, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of a mask's pixels in its bounding box, of each `step`th row and column."""
    parts = [mask.columns(*strip)[::step, ::step] for strip in mask.strips(unit=step)]
    rows, columns = np.nonzero(np.concatenate(parts, 1))
    return step * rows, step * columns


def beside(panels: Sequence[tuple[str, np.ndarray]]) -> np.ndarray:
    """Puts images, which may differ in size, side by side on white, each below its caption."""
    size = max(12, min(28, max(image.shape[1] for _, image in panels) // 32))
    font = ImageFont.load_default(size=size)
    strip = size + 10
    height = strip + max(image.shape[0] for _, image in panels)
    width = sum(image.shape[1] for _, image in panels) + GAP * (len(panels) - 1)
    sheet = Image.new("RGB", (width, height), "white")
    drawing, x = ImageDraw.Draw(sheet), 0
    for caption, image in panels:
        text = _shortened(caption, image.shape[1], font)
        drawing.text((x + 2, 4), text, fill="black", font=font)
        sheet.paste(Image.fromarray(image), (x, strip))
        x += image.shape[1] + GAP
    return np.array(sheet)


def below(images: Sequence[np.ndarray]) -> np.ndarray:
    """Puts images one below the other, on white."""
    width = max(image.shape[1] for image in images)
    padded = [
        cv2.copyMakeBorder(
            image, 0, GAP, 0, width - image.shape[1], cv2.BORDER_CONSTANT, value=(255,) * 3
        )
        for image in images
    ]
    return np.concatenate(padded)[:-GAP]


def _shortened(text: str, width: int, font: Font) -> str:
    """The text, its middle left out where it is too long for `width` pixels."""
    if font.getlength(text) <= width:
        return text
    keep = len(text)
    while keep > 2 and font.getlength(text[: keep // 2] + "..." + text[-(keep // 2) :]) > width:
        keep -= 1
    return text[: keep // 2] + "..." + text[-(keep // 2) :]

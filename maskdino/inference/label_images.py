"""Panoptic and semantic results of many images as datasets of PNG images, to be trained on.

`maskdino train-custom` reads both, and so do annotation tools.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from maskdino.categories import Categories
from maskdino.data.images import save_png
from maskdino.data.reading import colors_of_ids
from maskdino.inference.labels import common_folder, name_below, write_dataset
from maskdino.inference.sources import refuse_to_replace
from maskdino.system.files import write_text
from maskdino.system.words import counted
from maskdino.visualization.results import ImageResult


class LabelImages:
    """One PNG image for each image, of its name, below `folder`.

    Attributes:
        root: folder that the images' file names are relative to.
        count: images so far.
    """

    def __init__(self, categories: Categories, images: Sequence[Path], folder: Path) -> None:
        """An empty dataset.

        Args:
            categories: its classes.
            images: all paths that may come.
            folder: of the PNG images; it is made with the first.

        Raises:
            ValueError: two images would have one PNG image, or one would replace an image, or
                another file beside one.
        """
        self.categories, self.folder = categories, folder
        self.root = common_folder(images)
        self.count = 0
        named: dict[str, Path] = {}
        for path in images:
            other = named.setdefault(self._name(path), path)
            if other is not path:
                raise ValueError(f"{other} and {path} would have one label image: rename one")
        refuse_to_replace(map(folder.joinpath, named), images, "--coco")

    def _name(self, path: Path) -> str:
        return name_below(self.root, path).with_suffix(".png").as_posix()

    def _save(self, path: Path, values: np.ndarray) -> str:
        """Writes values (H, W) of 8 or 16 bits, or (H, W, 3); returns the name in the folder."""
        self.count += 1
        name = self._name(path)
        save_png(self.folder / name, values)
        return name


class SemanticLabels(LabelImages):
    """Classes as values; 255 is no class, so that more of them take 16 bits."""

    def add(self, path: Path, result: ImageResult) -> None:
        """Writes the classes of an image's pixels."""
        assert result.label_map is not None
        large = len(self.categories) > 255
        self._save(path, np.asarray(result.label_map, np.uint16 if large else np.uint8))

    def write(self, _: Path) -> None:
        """Writes classes.txt, a name in a line."""
        names = "".join(f"{name}\n" for name in self.categories.names)
        write_text(self.folder / "classes.txt", names)

    def __str__(self) -> str:
        return f"{counted(self.count, 'label image')} in {self.folder}"


class PanopticLabels(LabelImages):
    """COCO's panoptic form: a JSON file, and segments as red + 256 green + 65536 blue."""

    def __init__(self, categories: Categories, images: Sequence[Path], path: Path) -> None:
        """See `LabelImages`; PNG images are in a folder of the JSON file's name, without suffix."""
        super().__init__(categories, images, path.with_suffix(""))
        self.path = path
        self.images: list[dict] = []
        self.annotations: list[dict] = []

    def add(self, path: Path, result: ImageResult) -> None:
        """Writes the segments of an image."""
        assert result.panoptic_ids is not None and result.segments is not None
        png = self._save(path, colors_of_ids(result.panoptic_ids))
        height, width = result.size
        name = name_below(self.root, path).as_posix()
        self.images.append({"id": self.count, "file_name": name, "height": height, "width": width})
        entries = result.to_coco(self.count, "panoptic")
        segments = [
            {
                "id": int(segment["id"]),
                "iscrowd": 0,
                **{k: v for k, v in entry.items() if k in ("category_id", "bbox", "area", "score")},
            }
            for segment, entry in zip(result.segments, entries, strict=True)
            if entry["area"]
        ]
        annotation = {"image_id": self.count, "file_name": png, "segments_info": segments}
        self.annotations.append(annotation)

    def write(self, path: Path) -> None:
        """Writes the JSON file, whole or not at all."""
        lists = {"images": self.images, "annotations": self.annotations}
        write_dataset(path, self.categories, "things have scores", lists, told_apart=True)

    def __str__(self) -> str:
        number = sum(len(entry["segments_info"]) for entry in self.annotations)
        beside = f"{self.folder}; its images are below {self.root}"
        of = f"{counted(number, 'segment')} of {counted(self.count, 'image')}"
        return f"{of} in {self.path} and {beside}"

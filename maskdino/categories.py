"""The classes of a model or dataset: what each is called, and whether it is a thing.

Whoever asks either question, in training, evaluation, inference or drawing, asks here.

Shape key: K classes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog


@dataclass(frozen=True)
class Categories:
    """The classes by their number, 0 to K - 1.

    Attributes:
        names: of each class.
        is_thing: whether a class has countable objects; the others are "stuff". Where the data do
            not tell things from stuff, as a semantic map alone, all count as things.
        dataset_ids: the number of each class in the dataset's own files.
    """

    names: tuple[str, ...]
    is_thing: tuple[bool, ...]
    dataset_ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.names)

    @staticmethod
    def from_config(cfg: CfgNode) -> Categories:
        """Those of the first registered dataset of DATASETS.TRAIN and TEST.

        Names that its metadata do not tell are those of CLASS_NAMES, else "class 0", "class 1"...
        Where they do not tell things from stuff, STUFF_CLASSES does.
        """
        node = cfg.MODEL.MASK_DINO
        datasets = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
        known = [name for name in datasets if name in MetadataCatalog.list()]
        metadata = MetadataCatalog.get(known[0]) if known else Metadata()
        found = Categories.from_metadata(metadata, node.NUM_CLASSES, tuple(node.CLASS_NAMES))
        if metadata.get("thing_dataset_id_to_contiguous_id") is not None:
            return found
        return replace(found, is_thing=tuple(x not in node.STUFF_CLASSES for x in found.names))

    @staticmethod
    def of_dataset(name: str, number: int) -> Categories:
        """Those of a registered dataset with `number` classes.

        Reads its annotations where only they tell the names of the classes.

        Raises:
            ValueError: there is no such dataset.
        """
        if name not in DatasetCatalog.list():
            raise ValueError(
                f"there is no dataset {name!r}; registered are {', '.join(DatasetCatalog.list())}"
            )
        metadata = MetadataCatalog.get(name)
        if _complete_names(metadata, number) is None:
            DatasetCatalog.get(name)
        return Categories.from_metadata(metadata, number)

    @staticmethod
    def from_metadata(
        metadata: Metadata, number: int, otherwise: tuple[str, ...] = ()
    ) -> Categories:
        """From detectron2's metadata of a dataset with `number` classes.

        Args:
            metadata: with "thing_classes" or "stuff_classes", and the ids of the dataset's files.
            number: K.
            otherwise: names to take where the metadata do not tell those of all classes.
        """
        things = metadata.get("thing_dataset_id_to_contiguous_id")
        stuff = metadata.get("stuff_dataset_id_to_contiguous_id")
        told_apart = things is not None  # also where there are none
        things, stuff = things or {}, stuff or {}
        names = _complete_names(metadata, number)
        if names is None and len(otherwise) == number:
            names = otherwise
        labels = set(things.values())
        ids = {label: i for i, label in {**things, **stuff}.items()}
        return Categories(
            names or tuple(f"class {label}" for label in range(number)),
            tuple(label in labels or not told_apart for label in range(number)),
            tuple(ids.get(label, label) for label in range(number)),
        )


def _complete_names(metadata: Metadata, number: int) -> tuple[str, ...] | None:
    """Names of all classes, if the metadata have them: panoptic data tell only all "stuff"."""
    for names in (metadata.get("thing_classes"), metadata.get("stuff_classes")):
        if names and len(names) == number:
            return tuple(names)
    return None

"""Who asks for the classes of a model or dataset gets the same answer everywhere."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog

from maskdino.categories import Categories
from maskdino.data.mappers import PanopticMapper
from maskdino.model import MaskDINO
from tests.helpers import NUM_CLASSES, tiny_cfg

NAME = "drawn_panoptic_for_categories"
EXPECTED = (True, False, False, True, False)


@pytest.fixture
def cfg() -> Iterator[CfgNode]:
    """Of a model for a panoptic dataset, whose annotations nobody has read yet."""
    names = ["car", "road", "sky", "bus", "wall"]
    DatasetCatalog.register(NAME, lambda: MetadataCatalog.get(NAME).set(stuff_classes=names) and [])
    MetadataCatalog.get(NAME).set(
        thing_classes=["car", "bus"],
        thing_dataset_id_to_contiguous_id={7: 3, 9: 0},
        stuff_dataset_id_to_contiguous_id={1: 1, 7: 3, 8: 2, 9: 0, 10: 4},
    )
    yield tiny_cfg()
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


@pytest.mark.parametrize(
    ("train", "test"), [((NAME,), ()), (("never_registered",), (NAME,)), ((NAME, "x"), ("y",))]
)
def test_things_come_from_the_first_registered_dataset(
    cfg: CfgNode, train: tuple[str, ...], test: tuple[str, ...]
) -> None:
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = train, test
    categories = Categories.from_config(cfg)
    assert categories.is_thing == EXPECTED
    assert categories.dataset_ids == (9, 1, 8, 7, 10)
    assert tuple(MaskDINO(cfg).is_thing.tolist()) == EXPECTED
    assert PanopticMapper(cfg).thing_classes == {0, 3}


def test_without_a_dataset_all_are_things_of_the_configured_names(cfg: CfgNode) -> None:
    cfg.DATASETS.TRAIN = ("never_registered",)
    assert MaskDINO(cfg).is_thing.all()
    plain = Categories.from_config(cfg)
    assert plain.is_thing == (True,) * NUM_CLASSES == (True,) * len(plain)
    assert plain.names == tuple(f"class {i}" for i in range(NUM_CLASSES))
    assert plain.dataset_ids == tuple(range(NUM_CLASSES))
    cfg.MODEL.MASK_DINO.CLASS_NAMES = list("abcde")
    assert Categories.from_config(cfg).names == tuple("abcde")
    cfg.DATASETS.TRAIN = (NAME,)  # its metadata name the things alone
    assert Categories.from_config(cfg).names == tuple("abcde")


def test_names_that_only_the_annotations_tell(cfg: CfgNode) -> None:
    cfg.DATASETS.TRAIN = (NAME,)
    assert Categories.from_config(cfg).names[0] == "class 0"
    assert Categories.of_dataset(NAME, NUM_CLASSES).names == ("car", "road", "sky", "bus", "wall")
    assert Categories.from_config(cfg).names[0] == "car"
    with pytest.raises(ValueError, match=f"no dataset 'nowhere'; registered are .*{NAME}"):
        Categories.of_dataset("nowhere", 5)


def test_things_of_another_number_are_no_names() -> None:
    metadata = Metadata(thing_classes=["a"], stuff_classes=["a", "b", "c"])
    assert Categories.from_metadata(metadata, 3).names == ("a", "b", "c")
    assert Categories.from_metadata(metadata, 2).names == ("class 0", "class 1")
    assert Categories.from_metadata(metadata, 2, ("x", "y")).names == ("x", "y")


def test_only_data_with_things_tell_stuff() -> None:
    """Class 1 alone is stuff, or where no ids of things are known, all count as things."""
    stuff = {"stuff_dataset_id_to_contiguous_id": {4: 1}}
    things = {"thing_dataset_id_to_contiguous_id": {3: 0}}
    assert Categories.from_metadata(Metadata(**stuff), 2).is_thing == (True, True)
    assert Categories.from_metadata(Metadata(**stuff, **things), 2).is_thing == (True, False)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"thing_classes": ["a", "b"], "thing_dataset_id_to_contiguous_id": {3: 0, 5: 1}}, True),
        ({"stuff_classes": ["a", "b"]}, True),  # one region for each class is all that is known
        ({"thing_dataset_id_to_contiguous_id": {}}, False),
        ({"thing_dataset_id_to_contiguous_id": {}, "stuff_dataset_id_to_contiguous_id": {}}, False),
    ],
)
def test_data_that_do_not_tell_things_from_stuff(metadata: dict, expected: bool) -> None:
    """As before, their boxes are trained; only data that say "stuff" take them out."""
    found = Categories.from_metadata(Metadata(**metadata), 2)
    assert found.is_thing == (expected, expected)

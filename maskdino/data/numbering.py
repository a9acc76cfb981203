"""Annotation files of others whose categories have other numbers than the dataset's."""

from __future__ import annotations

import logging

from detectron2.data import Metadata

from maskdino.data.reading import DataError

logger = logging.getLogger(__name__)


def renumber_things(content: dict, metadata: Metadata) -> None:
    """Gives the categories of an instance file the numbers of its panoptic dataset (in place).

    Files for one dataset differ in that: ADE20K's 100 things are counted from 0 by some scripts,
    and have their numbers among all 150 classes in others. What is meant is known by the names, or
    by the order where there are as many categories as things.

    Raises:
        DataError: the numbering is neither.
    """
    numbers = metadata.thing_dataset_id_to_contiguous_id
    found = {category["id"]: category["name"] for category in content["categories"]}
    names = [metadata.thing_classes[number] for number in numbers.values()]
    by_name = {name: i for i, name in zip(numbers, names, strict=True) if names.count(name) == 1}
    in_order = dict(zip(sorted(found), sorted(numbers), strict=False))
    candidates = [{i: i for i in found}, {i: by_name.get(name) for i, name in found.items()}]
    if len(found) == len(numbers):
        candidates.insert(1, in_order)
    for meant in candidates:
        fits = all(i in numbers for i in meant.values())
        if fits and all(by_name.get(found[i], j) == j for i, j in meant.items()):
            break
    else:
        raise DataError(
            f"{metadata.json_file}: its {len(found)} categories (such as {min(found)}: "
            f"{found[min(found)]!r}) are not the {len(numbers)} things of dataset "
            f"{metadata.name!r} (such as {min(numbers)}: {names[0]!r})"
        )
    if any(i != j for i, j in meant.items()):
        logger.warning("%s numbers its categories otherwise: converted.", metadata.json_file)
    for category in content["categories"]:
        category["id"] = meant[category["id"]]
    for annotation in content.get("annotations", ()):
        annotation["category_id"] = meant[annotation["category_id"]]

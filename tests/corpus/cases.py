"""All cases of the corpus."""

from __future__ import annotations

from tests.corpus import (
    annotations,
    checkpoints,
    configurations,
    cvat,
    images,
    labelme,
    maps,
    places,
    voc,
    yolo,
)
from tests.corpus.case import Case

KINDS = (annotations, images, checkpoints, configurations, places, yolo, labelme, voc, cvat, maps)


def all_cases() -> list[Case]:
    """In an order that does not change."""
    return [case for kind in KINDS for case in kind.cases()]

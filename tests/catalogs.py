"""Detectron2's catalogs of datasets, as they were before a test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from detectron2.data import DatasetCatalog, MetadataCatalog

from maskdino.integration.registration import register_postponed


@contextmanager
def own_datasets() -> Iterator[None]:
    """Datasets that are registered inside are forgotten afterwards."""
    register_postponed()  # which else would be among them
    before = [(catalog, set(catalog)) for catalog in (DatasetCatalog, MetadataCatalog)]
    yield
    for catalog, names in before:
        for name in set(catalog) - names:
            catalog.remove(name)

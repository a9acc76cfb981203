"""Names of ours in detectron2's registries and catalogs, beside other packages that want the same.

Such names are global, and detectron2 refuses one that is taken. Whoever comes first keeps it: ours
gives way with one line in the log. Names that other packages are known to register too
(`D2SwinTransformer`, `ade20k_panoptic_train`, ...) wait until a configuration is made, so that such
a package may also be imported after this one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

Item = TypeVar("Item", bound=Callable)

_logger = logging.getLogger(__name__)


@dataclass
class Offer:
    """One name and what it stands for with us."""

    name: str  # in its registry
    find: Callable[[], Any]  # what the registry holds under the name now; None: nothing
    put: Callable[[], None]  # registers ours under the name, which is free
    drop: Callable[[], None]  # frees the name
    placed: Any = None  # what `find` returned after `put`; None before


_offers: list[Offer] = []
_waiting: list[Offer] = []
_readers: list[Callable[[str], None]] = []
_last_read: list[str] = []  # the path of a configuration, or nothing


def offer(entry: Offer, *, postponed: bool = False) -> None:
    """Registers a name now, if it is free, or with `register_postponed`."""
    _offers.append(entry)
    if postponed:
        _waiting.append(entry)
    else:
        _register([entry])


def offer_to(registry: Any, *, postponed: bool = False) -> Callable[[Item], Item]:
    """Decorator of what a registry of fvcore is to hold by its name; see `offer`."""

    def decorate(item: Item) -> Item:
        objects, name = registry._obj_map, item.__name__  # a Registry can neither tell nor free
        entry = Offer(
            name,
            find=lambda: objects.get(name),
            put=lambda: registry.register(item),
            drop=lambda: objects.pop(name),
        )
        offer(entry, postponed=postponed)
        return item

    return decorate


def register_postponed() -> None:
    """Registers the names that waited, where they are still free; from then on does nothing."""
    entries = list(_waiting)
    _waiting.clear()
    _register(entries)


def when_configuration_is_read(act: Callable[[str], None]) -> None:
    """Calls a function with the path of each configuration that is read, and of the last one."""
    _readers.append(act)
    for path in _last_read:
        act(path)


def tell_configuration(path: str) -> None:
    """Tells those who wait for it that a configuration has been read from a file."""
    _last_read[:] = [path]
    for act in _readers:
        act(path)


def register_all(*, replace: bool = False) -> None:
    """Registers every name of ours with detectron2: the model, backbones and datasets.

    `import maskdino` and `add_maskdino_config` do so for names that are free. A later call takes
    what has become free since, or what others hold.

    Args:
        replace: take the names that others registered, for the rest of the process; otherwise
            they are left alone, with one line in the log.
    """
    _waiting.clear()
    _register(_offers, replace=replace)


def _register(entries: Iterable[Offer], *, replace: bool = False) -> None:
    taken = []
    for entry in entries:
        holder = entry.find()
        if holder is not None and holder is entry.placed:
            continue
        if holder is not None and not replace:
            owner = getattr(holder, "__module__", type(holder).__module__)
            taken.append(f"{entry.name} (of {owner})")
            continue
        if holder is not None:
            entry.drop()
        entry.put()
        entry.placed = entry.find()
    if taken:
        _logger.warning(
            "Left alone, as registered with detectron2 before: %s; "
            "maskdino.register_all(replace=True) puts Mask DINO's own in their place.",
            ", ".join(taken),
        )

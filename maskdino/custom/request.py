"""What somebody asks for: data, where to start from, and what the plan shall not choose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TASKS = ("instance", "panoptic", "semantic")  # what data can teach


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be trained, and on what."""

    output: Path  # folder for everything that comes of it
    # Folder that holds images and labels, or its file of settings; None: they are named one by one.
    data: Path | None = None
    # train_json, train_images: annotations, and the folder of their images.
    train_json: Path | None = None
    train_images: Path | None = None
    # val_json, val_images: likewise for validation; None: a part of the training data.
    val_json: Path | None = None
    val_images: Path | None = None
    # One of `TASKS`, where the data teach more than one; None: what they teach.
    task: str | None = None
    # Names of the classes of label images, with commas between them, or their file; None: a
    # file in the folder names them.
    classes: str | None = None
    # Leave out images and annotations that are wrong, instead of an error.
    skip_invalid: bool = False
    config: str | None = None  # path or name of a configuration; None: one that suits the machine
    # Path or address to start from, "released", or "none" for random weights; None: the
    # configuration's.
    weights: str | None = None
    # epochs, batch_size, image_size: None leaves the choice to the plan.
    epochs: int | None = None
    batch_size: int | None = None
    image_size: int | None = None
    # How long the training may take, instead of epochs; None leaves the choice too.
    minutes: float | None = None
    boxes_only: bool = False  # do not learn masks
    processes: int = 1  # number of GPUs, or of processes without one
    overrides: Sequence[str] = ()  # keys and values of the configuration, which have the last word

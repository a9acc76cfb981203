"""What somebody asks for: data, where to start from, and what the plan shall not choose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TASKS = ("instance", "panoptic", "semantic")  # what data can teach


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be trained, and on what.

    Attributes:
        data: folder that holds all, or its file of settings; None: the next four say where it is.
        train_json, train_images: annotations, and the folder of their images.
        val_json, val_images: likewise for validation; None: a part of the training data.
        task: one of `TASKS`, where the data teach more than one; None: what they teach.
        classes: names of the classes of label images, with commas between them, or their file;
            None: a file in the folder names them.
        skip_invalid: leave out images and annotations that are wrong, instead of an error.
        output: folder for everything that comes of it.
        config: path or name of a configuration; None: one that suits the machine.
        weights: path or address to start from, "released", or "none" for random weights; None: the
            configuration's.
        epochs, batch_size, image_size: None leaves the choice to the plan.
        minutes: how long the training may take, instead of epochs; None leaves the choice too.
        boxes_only: do not learn masks.
        processes: number of GPUs, or of processes without one.
        overrides: keys and values of the configuration, which have the last word.
    """

    output: Path
    data: Path | None = None
    train_json: Path | None = None
    train_images: Path | None = None
    val_json: Path | None = None
    val_images: Path | None = None
    task: str | None = None
    classes: str | None = None
    skip_invalid: bool = False
    config: str | None = None
    weights: str | None = None
    epochs: int | None = None
    batch_size: int | None = None
    image_size: int | None = None
    minutes: float | None = None
    boxes_only: bool = False
    processes: int = 1
    overrides: Sequence[str] = ()

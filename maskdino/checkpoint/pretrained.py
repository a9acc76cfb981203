"""Models as folders that others can use: weights, configuration, classes, results, and a card.

A folder holds `model.safetensors`, `config.yaml`, `categories.json` (COCO's form of categories),
`metrics.json` and `README.md`, a card as model hubs show it. The file of weights alone is enough,
too: it has the configuration and all that is known of the model among its texts.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from safetensors import SafetensorError
from torch import Tensor, nn

from maskdino.categories import Categories
from maskdino.checkpoint.model_card import model_card, tasks_of
from maskdino.checkpoint.reading import CheckpointError
from maskdino.checkpoint.tensor_files import SUFFIX, read_texts, write_tensors
from maskdino.integration.extensions import config_header
from maskdino.metrics import flatten
from maskdino.system.errors import reason_of
from maskdino.system.files import write_text

WEIGHTS = f"model{SUFFIX}"
CONFIG, CATEGORIES, METRICS, CARD = "config.yaml", "categories.json", "metrics.json", "README.md"
FILES = (WEIGHTS, CONFIG, CATEGORIES, METRICS, CARD)
ABOUT = "maskdino"  # the text of a file of weights that holds `Facts`
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True)
class Facts:
    """What is known of a model beside its weights and its configuration."""

    categories: Categories  # its classes
    name: str = "Mask DINO"  # that the card gives it
    tasks: tuple[str, ...] = ()  # what it does, in words
    # Whether the weights are an average of a training's (EMA); None: not known.
    averaged: bool | None = None
    iterations: int | None = None  # steps of training behind the weights; None: not known
    # By their whole names, such as "segm/AP".
    metrics: Mapping[str, float] = field(default_factory=dict)
    dataset: str = ""  # that they were measured on
    license: str = "other"  # of the weights, as hubs name it
    rounded: bool = False  # weights are rounded to float16

    def to_json(self) -> str:
        """All of it as text."""
        return json.dumps(asdict(self) | {"categories": categories_to_list(self.categories)})

    @staticmethod
    def from_json(text: str) -> Facts:
        """The facts of a text; CheckpointError if it holds none."""
        try:
            values = json.loads(text)
            categories = categories_of_list(values["categories"])
            return Facts(**values | {"categories": categories, "tasks": tuple(values["tasks"])})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"what it says of its model cannot be read ({error})") from error


def categories_to_list(categories: Categories) -> list[dict[str, Any]]:
    """Classes in COCO's form of panoptic categories, in the order of their numbers."""
    fields = (categories.dataset_ids, categories.names, categories.is_thing)
    return [
        {"id": number, "name": name, "isthing": int(thing)}
        for number, name, thing in zip(*fields, strict=True)
    ]


def categories_of_list(entries: list[dict[str, Any]]) -> Categories:
    """Classes of such a list; KeyError, TypeError or ValueError if it is none."""
    return Categories(
        tuple(str(entry["name"]) for entry in entries),
        tuple(bool(entry.get("isthing", 1)) for entry in entries),
        tuple(int(entry["id"]) for entry in entries),
    )


def save_pretrained(
    model: nn.Module,
    cfg: CfgNode,
    folder: str | os.PathLike,
    *,
    categories: Categories | None = None,
    half: bool = False,
    metrics: Mapping[str, Any] | None = None,
    **facts: Any,
) -> Path:
    """Writes a model as a folder, which `load_pretrained` and `from_pretrained` read.

    Args:
        model: in PyTorch.
        cfg: its configuration.
        folder: made if need be; files of a model that is there are replaced.
        categories: the classes; None: those of the configuration.
        half: round the weights to float16: half the size, but no longer equal results.
        metrics: results, by name or nested by task.
        facts: `name`, `averaged`, `iterations`, `dataset` and `license`; see `Facts`.

    Raises:
        FileExistsError: the folder holds files of these names that are no model's.
        ValueError: with `half`, a weight is too large for float16.
        WriteError: it cannot be written.
    """
    folder = Path(folder)
    if not (folder / WEIGHTS).exists():
        for name in FILES:
            if (folder / name).exists():
                raise FileExistsError(
                    f"{folder} holds a {name}, but no model: choose another folder"
                )
    known = Facts(
        Categories.from_config(cfg) if categories is None else categories,
        tasks=tuple(tasks_of(cfg)),
        metrics={name: x for name, x in flatten(metrics or {}).items() if math.isfinite(x)},
        rounded=half,
        **facts,
    )
    configuration = config_header() + _portable(cfg, known.categories).dump()
    state = model.state_dict()
    if half:
        state = _rounded(state)
    texts = {
        CONFIG: configuration,
        CATEGORIES: json.dumps(categories_to_list(known.categories), indent=1),
        METRICS: json.dumps(known.metrics, indent=1),
        CARD: model_card(cfg, known, sum(x.numel() for x in model.parameters())),
    }
    folder.mkdir(parents=True, exist_ok=True)
    # The large file first: where it has no room, there is nothing else.
    write_tensors(folder / WEIGHTS, state, {ABOUT: known.to_json(), "config": configuration})
    for name, text in texts.items():
        write_text(folder / name, text)
    return folder


def _portable(cfg: CfgNode, categories: Categories) -> CfgNode:
    """The configuration without what is of one machine, and with the names of the classes."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR = "", "./output"
    cfg.MODEL.TIMM.WEIGHTS, cfg.MODEL.TIMM.PRETRAINED = "", False
    node = cfg.MODEL.MASK_DINO
    node.CLASS_NAMES = list(categories.names)
    things = zip(categories.names, categories.is_thing, strict=True)
    node.STUFF_CLASSES = [name for name, is_thing in things if not is_thing]
    return cfg


def _rounded(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Floating-point tensors in float16."""
    result = {}
    for name, tensor in state.items():
        result[name] = tensor.half() if tensor.is_floating_point() else tensor
        if tensor.is_floating_point() and not result[name].isfinite().all():
            raise ValueError(
                f"{name} holds {tensor.abs().max():.3g}, too large for float16: write it without "
                "--half"
            )
    return result


@dataclass(frozen=True)
class Pretrained:
    """A model that was found."""

    weights: str  # path of the file
    configuration: str  # the text of its YAML file
    categories: Categories | None = None  # its classes; None: those that the configuration tells
    path: Path | None = None  # of that YAML file; None: the text is one of the file of weights

    @contextmanager
    def config_file(self) -> Iterator[str]:
        """A file with the configuration, which is there inside the block."""
        if self.path is not None:  # errors name it
            yield str(self.path)
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, CONFIG)
            path.write_text(self.configuration, encoding="utf-8")
            yield str(path)


def find_pretrained(source: str | os.PathLike, revision: str | None = None) -> Pretrained:
    """Finds a model.

    Args:
        source: folder of `save_pretrained`; or a file of weights that has its configuration with
            it, in its folder, or (as in a folder of a training) in the one above; or "user/name" of
            a model of the Hugging Face Hub, which is downloaded.
        revision: of the latter.

    Raises:
        FileNotFoundError: there is no such folder or file, or it lacks the configuration.
        ModuleNotFoundError: the hub is asked, and huggingface_hub not installed.
        ConnectionError: the model cannot be downloaded.
        CheckpointError: a file cannot be read.
    """
    path = Path(source)
    if path.is_file():
        return _of_file(path)
    if not path.is_dir():
        if not HUB_NAME.fullmatch(str(source)):
            raise FileNotFoundError(f"there is no folder or file {source}")
        path = _download(str(source), revision)
    return _of_folder(path)


def _of_folder(folder: Path) -> Pretrained:
    for name in (WEIGHTS, CONFIG):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} holds no {name}: give a folder that `maskdino publish` made, or a file "
                "of weights"
            )
    categories = None
    path = folder / CATEGORIES
    if path.is_file():
        try:
            categories = categories_of_list(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{path} holds no categories ({error!r})") from error
    text = (folder / CONFIG).read_text(encoding="utf-8")
    return Pretrained(str(folder / WEIGHTS), text, categories, folder / CONFIG)


def _of_file(path: Path) -> Pretrained:
    texts = texts_of(path)
    if "config" in texts and ABOUT in texts:
        return Pretrained(str(path), texts["config"], Facts.from_json(texts[ABOUT]).categories)
    config = config_of(path)
    if config is None:
        raise FileNotFoundError(
            f"{path} has no configuration with it: neither a {CONFIG} in its folder, or the one "
            "above, nor one among its texts"
        )
    if (config.parent / CATEGORIES).is_file():
        return replace(_of_folder(config.parent), weights=str(path))
    return Pretrained(str(path), config.read_text(encoding="utf-8"), path=config)


def config_of(weights: Path) -> Path | None:
    """The configuration in the folder of a file of weights, or (of a training) in the one above."""
    for folder in (weights.parent, weights.absolute().parent.parent):
        if (folder / CONFIG).is_file():
            return folder / CONFIG
    return None


def texts_of(path: Path) -> dict[str, str]:
    """The texts of a file of weights; none if it is no safetensors file, or cannot be read."""
    if path.suffix != SUFFIX:
        return {}
    try:
        return read_texts(path)
    except (OSError, SafetensorError):  # whoever reads the weights says what is wrong
        return {}


def _download(name: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"there is no folder {name}, and models of the Hugging Face Hub need its package: "
            "pip install huggingface_hub"
        ) from error
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(FILES)))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise ConnectionError(
            f"there is no folder {name}, nor can a model of this name be downloaded from the "
            f"Hugging Face Hub ({reason_of(error)})"
        ) from error

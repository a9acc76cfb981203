"""The command `maskdino`: finds the module of a command, and runs it.

Help and mistakes need no more than this module: a command's own module, and PyTorch with it, is
imported when it runs. (Importing the package loads everything, but not where this is the program;
see `maskdino.system.program`.)
"""

from __future__ import annotations

import difflib
import importlib
import sys
from dataclasses import dataclass, field

from maskdino.cli.common import errors_in_one_line
from maskdino.system import program


@dataclass(frozen=True)
class Command:
    """A command, or a group of commands."""

    help: str  # what it does, in a few words
    module: str = ""  # below `maskdino.cli`, with a function `main`
    before: tuple[str, ...] = ()  # words that stand before the user's
    needs_detectron2: bool = True  # whether it runs at all without
    parts: dict[str, Command] = field(default_factory=dict)  # commands of a group, by name


PREPARED = {
    "ade20k": Command("ADE20K: semantic maps, instances, panoptic maps", "prepare.ade20k"),
    "cityscapes": Command("Cityscapes: training classes, panoptic maps", "prepare.cityscapes"),
    "coco-semantic": Command("semantic maps from COCO's panoptic maps", "prepare.coco_semantic"),
    "objects365": Command("Objects365: the images that are there", "prepare.objects365"),
    "instances-from-panoptic": Command(
        "instances of a dataset that has panoptic maps alone", "prepare.instances_from_panoptic"
    ),
    "semantic-from-instances": Command(
        "semantic maps of a dataset that has instances alone", "prepare.semantic_from_instances"
    ),
}
CONVERTED = {
    "released": Command("a configuration and weights of the released code", "convert_released"),
    "backbone": Command("ImageNet weights of a backbone", "convert_backbone"),
}
COMMANDS = {
    "train": Command("train as a configuration says", "train"),
    "evaluate": Command("evaluate weights: train --eval-only", "train", before=("--eval-only",)),
    "train-custom": Command("train on your own data, in one command", "train_custom"),
    "predict": Command("draw what a model sees in images, videos or a camera", "predict"),
    "visualize": Command("draw training data, predictions, attention", "visualize"),
    "report": Command("one HTML page about an evaluation", "report"),
    "plot": Command("curves of a training's losses and results", "plot_metrics"),
    "analyze": Command("count a model's parameters and multiply-adds", "analyze"),
    "export": Command("write a model as ONNX or torch.export program", "export"),
    "convert": Command("convert released configurations and weights", parts=CONVERTED),
    "prepare": Command("prepare downloaded datasets", parts=PREPARED),
    "publish": Command("a model's folder of a training; what is in a file", "publish"),
    "doctor": Command("what is installed, what is missing", "doctor", needs_detectron2=False),
}
MAIN = Command("", parts=COMMANDS)


@errors_in_one_line()
def main(words: list[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    words = sys.argv[1:] if words is None else words
    name, command = "maskdino", MAIN
    while command.parts:
        word = words[0] if words else "--help"
        if word in ("-h", "--help"):
            print(overview(name, command))
            return 0
        if word == "--version" and command is MAIN:
            print(f"maskdino {program.VERSION}")
            return 0
        if word not in command.parts:
            print(f"error: {mistaken(name, word, command)}", file=sys.stderr)
            return 2
        name, command, words = f"{name} {word}", command.parts[word], words[1:]
    return run(name, command, words)


def run(name: str, command: Command, words: list[str]) -> int:
    """Imports and runs a command; `name` is what its messages call it."""
    program.wait_briefly()
    if command.needs_detectron2:
        load_package()
    module = importlib.import_module(f"maskdino.cli.{command.module}")
    sys.argv = [name, *command.before, *words]
    return module.main(sys.argv[1:]) or 0


def load_package() -> None:
    """Does what importing the package does where this is not the program."""
    program.require_detectron2()
    package, api = map(importlib.import_module, ("maskdino", "maskdino.api"))
    vars(package).update({name: getattr(api, name) for name in ("__all__", *api.__all__)})
    importlib.import_module("maskdino.integration.extensions").import_recorded()


def overview(name: str, command: Command) -> str:
    """The help of a group of commands."""
    width = max(map(len, command.parts))
    lines = [f"  {part:<{width}}  {command.parts[part].help}" for part in command.parts]
    about = "Mask DINO: detection, instance, panoptic and semantic segmentation"
    return "\n".join(
        (
            f"usage: {name} COMMAND ...",
            "",
            command.help or f"{about} ({program.VERSION})",
            "",
            *lines,
            "",
            f"{name} COMMAND --help shows the options of a command.",
        )
    )


def mistaken(name: str, word: str, command: Command) -> str:
    """What to say about a command that there is not."""
    near = difflib.get_close_matches(word, command.parts, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"{name} --help shows all"
    return f"{name} has no command {word!r}; {hint}"

"""What is in a file of weights, of any kind, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from maskdino.checkpoint.pretrained import ABOUT, Facts, texts_of
from maskdino.checkpoint.reading import (
    is_of_backbone,
    iterations_of,
    read_checkpoint,
    shapes_of,
)
from maskdino.checkpoint.released_weights import foreign_model, is_released
from maskdino.metrics import of_classes_together
from maskdino.system.words import counted

CLASS_HEADS = ("heads.class_head.weight", "sem_seg_head.predictor.class_embed.weight")
PARTS = {  # beside the weights, by their names in a file
    "optimizer": "the optimizer's state",
    "scheduler": "the schedule",
    "ema": "averaged weights",
    "trainer": "the state of a training",
}


@dataclass(frozen=True)
class Contents:
    """What a file of weights holds."""

    path: str
    size: int  # bytes
    kind: str  # of what the weights are, in words
    tensors: int  # how many
    numbers: Mapping[str, int]  # how many, by their type
    class_scores: int | None  # of the class head; None: there is none
    beside: tuple[str, ...]  # what else is in the file, in words
    iterations: int | None  # steps of training behind the weights; None: not told
    facts: Facts | None  # what the file says of its model; None: nothing

    def lines(self) -> list[str]:
        """All of it, to be printed."""
        types = ", ".join(f"{count:,} {kind}" for kind, count in self.numbers.items())
        rows = {
            "file": f"{self.path}, {self.size / 2**20:.1f} MiB",
            "holds": self.kind,
            "numbers": f"{types}, in {counted(self.tensors, 'tensor')}",
        }
        if self.facts is not None:
            rows |= _told(self.facts)
        elif self.class_scores is not None:
            rows["classes"] = f"{self.class_scores} (scores of the class head)"
        if "weights" not in rows:
            rows["weights"] = "averaged or not: unknown"
        if self.iterations is not None:
            rows["iterations"] = str(self.iterations)
        if self.beside:
            rows["also"] = ", ".join(self.beside)
        return [f"{name:<11}{value}" for name, value in rows.items()]


def _told(facts: Facts) -> dict[str, str]:
    names = facts.categories.names
    shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    averaged = {True: "averaged (EMA)", False: "not averaged", None: "averaged or not: unknown"}[
        facts.averaged
    ]
    rounded = ", rounded to float16" if facts.rounded else ""
    metrics = [f"{name} {value:.4g}" for name, value in of_classes_together(facts.metrics).items()]
    return {
        "name": facts.name,
        "task": ", ".join(facts.tasks) or "unknown",
        "weights": averaged + rounded,
        "classes": f"{len(names)}: {shown}",
        "metrics": ", ".join(metrics) or "none",
        "license": facts.license,
    }


def contents_of(path: str) -> Contents:
    """Looks into a file, or raises a CheckpointError; of tensors, shapes alone are read."""
    size = Path(path).stat().st_size
    data = read_checkpoint(path, "meta")
    state = data["model"]
    numbers: Counter[str] = Counter()
    for value in state.values():
        numbers[str(value.dtype).removeprefix("torch.")] += (
            value.numel() if isinstance(value, Tensor) else value.size
        )
    shapes = shapes_of(state)
    heads = [shapes[name][0] for name in CLASS_HEADS if name in shapes]
    texts = texts_of(Path(path))
    facts = Facts.from_json(texts[ABOUT]) if ABOUT in texts else None
    return Contents(
        path,
        size,
        _kind(list(state), heuristic=bool(data.get("matching_heuristics"))),
        len(state),
        dict(numbers),
        heads[0] if heads else None,
        tuple(PARTS[name] for name in PARTS if name in data),
        iterations_of(data) if facts is None else facts.iterations,
        facts,
    )


def _kind(names: list[str], *, heuristic: bool) -> str:
    if is_released(names):
        return "a Mask DINO, under the names of the released code"
    if (model := foreign_model(names)) is not None:
        return f"the weights of {model}"
    if any(name.startswith("heads.class_head.") for name in names):
        return "a Mask DINO"
    if heuristic or is_of_backbone(names):
        return "a backbone"
    return f"tensors of no known model, such as {names[0]}"

"""The evaluations of a run, which outlive its interruptions."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

from maskdino.files import written_whole


@dataclass(frozen=True)
class Evaluation:
    """One evaluation.

    Attributes:
        iteration: number of the last step before it, from 0.
        results: task ("segm", "bbox") -> metric -> value in percent.
    """

    iteration: int
    results: dict[str, dict[str, float]]

    @property
    def score(self) -> float:
        """Mask AP, or box AP without masks, in percent; -1 where nothing could be measured."""
        value = self.results.get(self.task, {}).get("AP", -1.0)
        return value if math.isfinite(value) else -1.0

    @property
    def task(self) -> str:
        """The task that the score is of."""
        return "segm" if "segm" in self.results else "bbox"


@dataclass
class History:
    """All evaluations of a run so far, in a file.

    Attributes:
        path: of the JSON file; its folder is made when something is written.
        evaluations: in the order of their iterations.
    """

    path: Path
    evaluations: list[Evaluation] = field(default_factory=list)

    @staticmethod
    def read(path: Path) -> History:
        """Reads the file; without one, the history is empty."""
        if not path.is_file():
            return History(path)
        entries = json.loads(path.read_text())
        return History(path, [Evaluation(**entry) for entry in entries])

    @property
    def best(self) -> Evaluation | None:
        """The first one with the highest score."""
        return max(self.evaluations, key=lambda entry: entry.score, default=None)

    def has(self, iteration: int) -> bool:
        """Whether there was an evaluation after this step."""
        return any(entry.iteration == iteration for entry in self.evaluations)

    def since_best(self) -> int:
        """Evaluations after the best one; none as long as nothing was ever found (score 0)."""
        best = self.best
        if best is None or best.score <= 0:
            return 0
        return sum(entry.iteration > best.iteration for entry in self.evaluations)

    def forget_from(self, iteration: int) -> None:
        """Drops evaluations after steps that a resumed run makes once more."""
        kept = [entry for entry in self.evaluations if entry.iteration < iteration]
        self.evaluations = kept

    def add(self, evaluation: Evaluation) -> bool:
        """Adds an evaluation; returns whether it is the best so far."""
        self.evaluations.append(evaluation)
        return self.best is evaluation

    def write(self) -> None:
        """Writes the file, whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(self.path) as temporary:
            entries = [asdict(entry) for entry in self.evaluations]
            temporary.write_text(json.dumps(entries, indent=1))

"""What is asked of a predictor: tasks, threshold, and the sizes at which the network reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from detectron2.config import CfgNode

from maskdino.visualization.images import fitting_size, network_size
from maskdino.visualization.results import TASKS


@dataclass(frozen=True)
class PredictorOptions:
    """How pictures are read, and what is kept of the predictions.

    Attributes:
        tasks: which of "instance", "panoptic" and "semantic" results hold.
        confidence_threshold: objects with a lower score are left out, in [0, 1].
        shortest, longest: pixels of the edges at which the network reads a picture.
        image_format: INPUT.FORMAT, "RGB" or "BGR".
        size_divisibility: canvases are a multiple of this many pixels.
        batch_size: pictures that the network reads at one time.
        canvas: (height, width) of a network that takes no other; pictures are fitted into it.
            None: it takes any size.
    """

    tasks: tuple[str, ...]
    confidence_threshold: float
    shortest: int
    longest: int
    image_format: str
    size_divisibility: int
    batch_size: int
    canvas: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not self.tasks or not set(self.tasks) <= set(TASKS):
            raise ValueError(f"tasks are {self.tasks}; they must be of {', '.join(TASKS)}")
        if not 0 <= self.confidence_threshold <= 1:
            raise ValueError(f"confidence_threshold {self.confidence_threshold} is not in [0, 1]")
        if self.batch_size < 1 or self.shortest < 0 or self.longest < 1:
            raise ValueError(
                f"batch size {self.batch_size} and sizes {self.shortest}, {self.longest} must be "
                "positive"
            )

    @staticmethod
    def from_config(
        cfg: CfgNode,
        *,
        confidence_threshold: float,
        tasks: Sequence[str] | None,
        size: int | None,
        batch_size: int,
    ) -> PredictorOptions:
        """See `MaskDINOPredictor.from_config`.

        Raises:
            ValueError: the model cannot do a task, or an argument is out of range.
        """
        test, node = cfg.MODEL.MASK_DINO.TEST, cfg.MODEL.MASK_DINO
        switches = (test.INSTANCE_ON, test.PANOPTIC_ON, test.SEMANTIC_ON)
        able = tuple(task for task, on in zip(TASKS, switches, strict=True) if on)
        tasks = able if tasks is None else tuple(tasks)
        if not node.MASK_ON and set(tasks) - {"instance"}:
            raise ValueError(f"a model without masks cannot do {tasks}; it gives boxes only")
        shortest, longest = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
        if size is not None:
            shortest, longest = size, max(size, round(size * longest / max(shortest, 1)))
        return PredictorOptions(
            tasks=tasks,
            confidence_threshold=confidence_threshold,
            shortest=shortest,
            longest=longest,
            image_format=cfg.INPUT.FORMAT,
            size_divisibility=node.SIZE_DIVISIBILITY,
            batch_size=batch_size,
        )

    def sizes_of(self, size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """The (height, width) at which the network reads a picture of a size, and of its canvas."""
        if self.canvas is not None:
            return fitting_size(size, self.canvas), self.canvas
        size = network_size(size, self.shortest, self.longest)
        multiple = max(1, self.size_divisibility)
        return size, tuple(-(-edge // multiple) * multiple for edge in size)

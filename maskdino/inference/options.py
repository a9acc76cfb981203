"""What is asked of a predictor: tasks, threshold, and the sizes at which the network reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from detectron2.config import CfgNode

from maskdino.postprocess import InferenceOptions
from maskdino.visualization.images import fitting_size, network_size, padded_size
from maskdino.visualization.results import TASKS

MOST_AT_ONCE = 1 << 20  # images that are read at one time


@dataclass(frozen=True)
class PredictorOptions:
    """How images are read, and what is kept of the predictions.

    Attributes:
        tasks: which of "instance", "panoptic" and "semantic" results hold.
        confidence_threshold: objects with a lower score are left out, in [0, 1].
        shortest: pixels of the shorter edge at which the network reads an image; 0: the image's.
        longest: pixels that the longer edge may have.
        image_format: INPUT.FORMAT, "RGB" or "BGR".
        size_divisibility: canvases are a multiple of this many pixels.
        batch_size: images that the network reads at one time.
        features: whether results hold the content feature of each object.
        class_scores: whether results hold the scores of all classes of each pixel.
        canvas: (height, width) of a network that takes no other; images are fitted into it.
            None: it takes any size.
        slices: (pixels of their edge, least share that overlaps) of the slices in which images
            are predicted; None: as they are.
    """

    tasks: tuple[str, ...]
    confidence_threshold: float
    shortest: int
    longest: int
    image_format: str
    size_divisibility: int
    batch_size: int
    features: bool = False
    class_scores: bool = False
    canvas: tuple[int, int] | None = None
    slices: tuple[int, float] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.tasks, str) or not self.tasks or not set(self.tasks) <= set(TASKS):
            raise ValueError(f"tasks are {self.tasks!r}; they must be a list of {', '.join(TASKS)}")
        if not 0 <= self.confidence_threshold <= 1:
            raise ValueError(f"confidence_threshold {self.confidence_threshold} is not in [0, 1]")
        if not 1 <= self.batch_size <= MOST_AT_ONCE:
            raise ValueError(
                f"the batch size is {self.batch_size}; it must be at least 1, and at most "
                f"{MOST_AT_ONCE}"
            )
        if self.shortest < 0 or self.longest < 1:
            raise ValueError(
                f"images are read with edges of {self.shortest} to {self.longest} pixels "
                "(size, INPUT.MIN_SIZE_TEST, INPUT.MAX_SIZE_TEST): they must be positive"
            )

    @staticmethod
    def from_config(
        cfg: CfgNode,
        *,
        confidence_threshold: float = 0.5,
        tasks: Sequence[str] | None = None,
        size: int | None = None,
        batch_size: int = 1,
        features: bool = False,
    ) -> PredictorOptions:
        """See `MaskDINOPredictor.from_config`.

        Raises:
            ValueError: the model cannot do a task, or an argument is out of range.
        """
        node = cfg.MODEL.MASK_DINO
        if tasks is None:
            tasks = InferenceOptions.from_config(cfg).tasks
        tasks = (tasks,) if isinstance(tasks, str) else tuple(tasks)
        if not node.MASK_ON and set(tasks) - {"instance"}:
            raise ValueError(f"a model without masks cannot do {tasks}; it gives boxes only")
        shortest, longest = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
        slices = cfg.TEST.SLICES
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
            features=features,
            slices=(slices.SIZE, slices.OVERLAP) if slices.SIZE else None,
        )

    def sizes_of(self, size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """The (height, width) at which the network reads an image of a size, and of its canvas."""
        if self.canvas is not None:
            return fitting_size(size, self.canvas), self.canvas
        size = network_size(size, self.shortest, self.longest)
        return size, padded_size(size, self.size_divisibility)

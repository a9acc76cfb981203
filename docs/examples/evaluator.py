"""An evaluator of one's own: how far the number of objects is off."""

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from maskdino.integration.extensions import EVALUATOR_REGISTRY


@EVALUATOR_REGISTRY.register(name="counting")
class CountingEvaluator(DatasetEvaluator):
    """TEST.EVALUATORS ["counting"], or "counting" as `evaluator_type` of a dataset."""

    def __init__(self, cfg: CfgNode, dataset_name: str, output_folder: str) -> None:
        """Reads the true numbers; files may be written to `output_folder`."""
        records = DatasetCatalog.get(dataset_name)
        self.wanted = {r["file_name"]: len(r["annotations"]) for r in records}
        self.least_score, self.output_folder = cfg.TEST.LEAST_SCORE, output_folder

    def reset(self) -> None:
        """Starts an evaluation."""
        self.errors: list[int] = []

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Takes note of some images."""
        for image, output in zip(inputs, outputs, strict=True):
            number = int((output["instances"].scores > self.least_score).sum())
            self.errors.append(abs(number - self.wanted[image["file_name"]]))

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """Gives the mean over the images of all processes, to the first of them."""
        errors = [error for part in comm.gather(self.errors) for error in part]
        return {"counting": {"error": sum(errors) / len(errors)}} if errors else None


def add_config(cfg: CfgNode) -> None:
    """Adds a key."""
    cfg.TEST.LEAST_SCORE = 0.3

"""What a run tells at its beginning and at its end, as text."""

from __future__ import annotations

from datetime import timedelta

from detectron2.config import CfgNode
from tabulate import tabulate

from maskdino.custom.annotations import Summary
from maskdino.custom.measure import Memory, Pace, total_seconds
from maskdino.custom.plan import Machine
from maskdino.custom.prepare import PreparedData
from maskdino.engine.best_checkpoint import Evaluation
from maskdino.system.words import counted

MOST_LISTED = 10  # classes
BUSY = 0.2  # cores of other programs that are worth a word
_OF_OBJECTS = {"AP": "AP", "AP50": None, "AP75": None}
# Of each task of an evaluation what it is called, and the metrics, with those of single classes.
METRICS: dict[str, tuple[str, dict[str, str | None]]] = {
    "bbox": ("boxes ", _OF_OBJECTS),
    "segm": ("masks ", _OF_OBJECTS),
    "panoptic_seg": ("", {"PQ": "PQ", "SQ": None, "RQ": None}),
    "sem_seg": ("", {"mIoU": "IoU", "mACC": "ACC", "pACC": None}),
}
# Of each task of the data what is measured, and what is counted.
QUALITIES = {
    "instance": "Average precision",
    "panoptic": "Panoptic quality",
    "semantic": "Intersection over union",
}
COUNTED = {"instance": "object", "panoptic": "segment", "semantic": "image"}


def plan_text(
    cfg: CfgNode,
    data: PreparedData,
    machine: Machine,
    epochs: int,
    memory: Memory | None,
    pace: Pace | None,
) -> str:
    """The choices that were made, one in a line, each with what it follows from."""
    solver, size, period = cfg.SOLVER, cfg.INPUT.LSJ.SIZE[0], cfg.TEST.EVAL_PERIOD
    queries = cfg.MODEL.MASK_DINO.QUERY_SELECTION.NUM_QUERIES
    images = f"{data.train.images} to train on, {data.validation.images} to validate on"
    if data.was_split:
        images += " (set aside by a hash of the file names)"
    kind = "the GPU" if machine.device == "cuda" else "the CPU"
    room = f"{machine.processes} x {kind}, {machine.memory_mb / 1024:.1f} GB free"
    batch = counted(solver.IMS_PER_BATCH, "image")
    schedule = f"{counted(epochs, 'epoch')}, {counted(solver.MAX_ITER, 'iteration')}"
    if memory is not None:
        batch += f"; a step needs {memory.fixed_mb:.0f} MB and {memory.image_mb:.0f} MB per image"
    if pace is not None:
        steps = solver.MAX_ITER
        total = total_seconds(steps, period, pace.step, pace.evaluation)
        evaluations = _time(total - steps * pace.step)
        schedule += f", about {_time(total)}, of which {evaluations} in evaluations"
        if pace.others > BUSY:
            schedule += f"; less without other programs, which take {pace.others:.1f} cores now"
    task = data.train.task
    if task == "instance":
        task = "boxes and masks" if cfg.MODEL.MASK_DINO.MASK_ON else "boxes"
    rows = [
        ("classes", f"{cfg.MODEL.MASK_DINO.NUM_CLASSES}: {_counts(data.train)}"),
        ("task", task),
        ("images", images),
        ("machine", room),
        ("image size", f"{size} pixels (median of the data: {data.train.longest_side})"),
        *_slices(cfg, data.train),
        ("queries", f"{queries} ({_fullness(data.train)})"),
        ("batch", batch),
        ("learning rate", f"{solver.BASE_LR:g}, {_decay(cfg)}"),
        ("schedule", schedule),
        ("evaluation", f"every {counted(period, 'iteration')}: {QUALITIES[data.train.task]}"),
        ("starts from", _start(cfg)),
    ]
    return tabulate(rows, tablefmt="plain", disable_numparse=True)


def _slices(cfg: CfgNode, summary: Summary) -> list[tuple[str, str]]:
    """How large objects are in slices, if images are predicted so."""
    slices, side = cfg.TEST.SLICES.SIZE, summary.object_side * cfg.INPUT.LSJ.SIZE[0]
    if not slices:
        return []
    zoom = f"{summary.longest_side / slices:.1f}"
    small = f" (else half have less than {side:.0f} pixels)" if side else ""
    return [("slices", f"{slices} pixels, in which objects are {zoom} times as large{small}")]


def _start(cfg: CfgNode) -> str:
    weights, backbone = cfg.MODEL.WEIGHTS, cfg.MODEL.TIMM.WEIGHTS
    return weights or (f"{backbone} (the backbone)" if backbone else "random weights")


def _time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _fullness(train: Summary) -> str:
    most, many = train.most_objects, train.many_objects
    noun = "class" if train.task == "semantic" else COUNTED[train.task]
    return f"19 of 20 images have at most {counted(many, noun)}; the fullest has {most}"


def _decay(cfg: CfgNode) -> str:
    if cfg.SOLVER.LR_SCHEDULER_NAME != "WarmupMultiStepLR":
        return f"then {cfg.SOLVER.LR_SCHEDULER_NAME}"
    if not cfg.SOLVER.STEPS:
        return "all the time"
    return f"{cfg.SOLVER.GAMMA:g} of it from each of the iterations {list(cfg.SOLVER.STEPS)} on"


def _counts(summary: Summary) -> str:
    """The most common classes with their number of objects, segments or images."""
    common = sorted(summary.counts.items(), key=lambda item: -item[1])
    listed = ", ".join(f"{name} ({count})" for name, count in common[:MOST_LISTED])
    more = len(common) - MOST_LISTED
    listed += f", and {more} more" if more > 0 else ""
    return listed + (f"; no things: {', '.join(summary.stuff)}" if summary.stuff else "")


def results_text(evaluation: Evaluation, validation: Summary) -> str:
    """Results of all classes together, and of each class."""
    columns = [
        (title, evaluation.results[task], metric, of_class)
        for task, (title, metrics) in METRICS.items()
        if task in evaluation.results
        for metric, of_class in metrics.items()
    ]
    titles = (title + metric for title, _, metric, _ in columns)
    head = ["", f"{COUNTED[validation.task]}s", *titles]
    number = validation.images if validation.task == "semantic" else validation.objects
    together = (values.get(metric) for _, values, metric, _ in columns)
    rows = [head, ["all", str(number), *map(_percent, together)]]
    for name, count in validation.counts.items():
        cells = [name, str(count)]
        for _, values, metric, of_class in columns:
            # With a single class, its AP is that of all.
            all_classes = values.get(metric) if len(validation.counts) == 1 else None
            value = values.get(f"{of_class}-{name}", all_classes)
            cells.append(_percent(value) if of_class else "")
        rows.append(cells)
    sides = ("left", *("right" for _ in head[1:]))
    return tabulate(rows, tablefmt="plain", disable_numparse=True, colalign=sides)


def _percent(value: float | None) -> str:
    return "-" if value is None or value != value else f"{value:.1f}"

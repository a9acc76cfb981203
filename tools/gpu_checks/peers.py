"""The released implementation beside this one: same weights, same images, a process for each.

Both packages are named `maskdino`, so each side has a process and a module path of its own. The
released side initializes the weights and saves them, and this side reads them as a released
checkpoint. Released code, configuration, optimizer and trainer are used as they are: its training
step runs under float16 autocast, which its encoder and its decoder layers switch off.

Shape key: B images, Q queries, K class logits, H, W of mask maps, S tokens.
"""

from __future__ import annotations

import importlib
import itertools
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from benchmarks.drawn import drawn_input, drawn_model
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from gpu_checks.common import (
    DEFAULTS,
    PRECISION_KEY,
    R50,
    ROOT,
    Run,
    arithmetic,
    launches,
    measure,
)

RELEASED_CONFIG = (
    "configs/coco/instance-segmentation/maskdino_R50_bs16_50ep_3s_dowsample1_2048.yaml"
)
LARGEST_KEY = "MODEL.MASK_DINO.QUERY_SELECTION.LARGEST_PROPOSALS"
OBJECTS, CLASSES = 10, 80
# Small, because a step whose gradients overflow is left out and takes less time.
FIRST_SCALE = 1.0

Predict = Callable[[Tensor], dict[str, Tensor]]
# A step on a batch, which returns the total loss, and its scaler of gradients.
Training = tuple[Callable[[list[dict]], float], torch.amp.GradScaler]


@dataclass(frozen=True)
class Side:
    """One implementation, ready to run."""

    name: str
    model: nn.Module
    predict: Predict  # normalized images to logits (Q, K), boxes (Q, 4), masks (Q, H, W)
    pack_masks: Callable[[Tensor], object]  # (N, H, W) bool to what its data loader gives
    train_in: Callable[[str], Training]
    training: tuple[str, ...]
    inference: tuple[str, ...]
    set_precision: Callable[[str], None]  # of image to results
    set_anchors: Callable[[bool], None]  # whether they are those of the predicted masks


def side_by_side(run: Run) -> None:
    """Runs both sides, one after the other.

    Both processes import what they need at once, and begin when they are sent the run.
    """
    if run.peer is None:
        run.say(skipped="no --peer")
        return
    with tempfile.TemporaryDirectory() as scratch:
        sides = {name: _start(run, name, scratch) for name in SIDES}
        sent = replace(run, out=run.out.resolve(), peer=run.peer.resolve())
        for name, process in sides.items():
            process.communicate(pickle.dumps(sent))
            if process.returncode:
                run.say(side=name, FAILED=f"ended with status {process.returncode}")


def _start(run: Run, side: str, scratch: str) -> subprocess.Popen:
    command = [sys.executable, "-W", "ignore", "-m", "gpu_checks.peers", side, scratch]
    first = run.peer.resolve() if side == "released" else ROOT
    paths = [str(first), str(ROOT / "tools"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
    return subprocess.Popen(
        command, cwd=scratch, stdin=subprocess.PIPE, env={**os.environ, **environment}
    )


def released(run: Run, scratch: Path) -> Side:
    """The released implementation, whose weights are saved for the other side."""
    from detectron2.config import get_cfg
    from detectron2.engine import AMPTrainer, SimpleTrainer
    from detectron2.modeling import build_model
    from detectron2.projects.deeplab import add_deeplab_config
    from detectron2.utils.events import EventStorage

    maskdino, train_net = (importlib.import_module(name) for name in ("maskdino", "train_net"))
    _check_origin(maskdino, run.peer)
    cfg = get_cfg()
    add_deeplab_config(cfg)
    maskdino.add_maskdino_config(cfg)
    cfg.merge_from_file(str(run.peer / RELEASED_CONFIG))
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = run.device, ""
    torch.manual_seed(1)
    model = build_model(cfg)
    _fill_zeros(model)
    tensors = {k: v.cpu() for k, v in model.state_dict().items() if "criterion" not in k}
    torch.save({"model": tensors}, scratch / "weights.pth")

    def set_anchors(enhanced: bool) -> None:
        decoder = model.sem_seg_head.predictor
        decoder.initialize_box_type = cfg.MODEL.MaskDINO.INITIALIZE_BOX_TYPE if enhanced else "no"

    def predict(images: Tensor) -> dict[str, Tensor]:
        outputs, _ = model.sem_seg_head(model.backbone(images))
        return {part: outputs[f"pred_{part}"][0] for part in ("logits", "boxes", "masks")}

    def train_in(precision: str) -> Training:
        model.train()
        optimizer = train_net.Trainer.build_optimizer(cfg, model)
        scaler = torch.amp.GradScaler(run.device, init_scale=FIRST_SCALE, enabled=run.on_gpu)
        trainers: list = []

        def step(batch: list[dict]) -> float:
            if not trainers:
                parts = model, itertools.repeat(batch), optimizer
                in_half = precision == "float16" and run.on_gpu
                trainers.append(AMPTrainer(*parts, scaler) if in_half else SimpleTrainer(*parts))
            with EventStorage() as storage:
                trainers[0].run_step()
                return storage.latest()["total_loss"][0]

        return step, scaler

    return Side(
        "released",
        model,
        predict,
        pack_masks=lambda masks: masks,
        train_in=train_in,
        training=("float16",),
        inference=(DEFAULTS, "tf32", "float16"),
        set_precision=lambda _: None,  # that of its surroundings
        set_anchors=set_anchors,
    )


def ours(run: Run, scratch: Path) -> Side:
    """This package with the weights that the released side saved."""
    import maskdino
    from gpu_checks.training import train_step
    from maskdino.checkpoint.checkpointer import MaskDINOCheckpointer
    from maskdino.structures import PackedMasks

    _check_origin(maskdino, ROOT)
    keys = (PRECISION_KEY, "float32", LARGEST_KEY, "finest")
    cfg, model = drawn_model(R50, run.device, *keys)
    MaskDINOCheckpointer(model).load(str(scratch / "weights.pth"))

    def set_anchors(enhanced: bool) -> None:
        node = cfg.MODEL.MASK_DINO.QUERY_SELECTION
        anchors = node.MASK_ENHANCED_ANCHORS if enhanced else "none"
        model.query_selection.mask_enhanced_anchors = anchors

    def predict(images: Tensor) -> dict[str, Tensor]:
        found, pixels = model.predict_precisely(images)  # as all commands infer
        masks = torch.einsum("qc,chw->qhw", found.mask_embeddings[0], pixels[0])
        return {"logits": found.class_logits[0], "boxes": found.boxes[0], "masks": masks}

    def train_in(precision: str) -> Training:
        step = train_step(run, cfg, model, precision)
        half = precision == "float16" and run.on_gpu
        step.grad_scaler = torch.amp.GradScaler(run.device, init_scale=FIRST_SCALE, enabled=half)
        return lambda batch: step.run(itertools.repeat(batch))["total_loss"], step.grad_scaler

    def pack_masks(masks: Tensor) -> PackedMasks:
        packed = PackedMasks.from_bool(masks)
        return packed.pin_memory() if run.on_gpu else packed

    def set_precision(precision: str) -> None:
        model.inference = replace(model.inference, precision=precision)

    return Side(
        "ours",
        model,
        predict,
        pack_masks=pack_masks,
        train_in=train_in,
        training=("float16", "bfloat16"),
        inference=("float32", "tf32", "float16", "bfloat16"),
        set_precision=set_precision,
        set_anchors=set_anchors,
    )


SIDES = {"released": released, "ours": ours}


@torch.no_grad()
def _fill_zeros(model: nn.Module) -> None:
    """Small numbers for matrices that begin as zeros, so that what hangs on them is compared."""
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():
            parameter.normal_(std=0.02)


def _check_origin(package: object, folder: Path) -> None:
    """Raises ImportError where the package of the other side was imported."""
    if not Path(package.__file__).resolve().is_relative_to(folder.resolve()):
        raise ImportError(f"maskdino was imported from {package.__file__}, not from {folder}")


def compare(run: Run, side: Side, scratch: Path) -> None:
    """Everything that is measured of one side, most valuable first."""
    with run.attempt(side=side.name, what="equality"):
        _equality(run, side, scratch)
    for precision in side.training if run.on_gpu else side.training[:1]:
        case = {"side": side.name, "what": "training step", "precision": precision}
        with run.attempt(**case):
            _train(run, side, precision, case)
        torch.cuda.empty_cache()
    for precision in side.inference if run.on_gpu else side.inference[:1]:
        with run.attempt(side=side.name, precision=precision):
            _infer(run, side, precision)


def _equality(run: Run, side: Side, scratch: Path) -> None:
    """Saves the predictions in float32 without TF32, or compares them with the other side's.

    With anchors of the predicted masks, too, where one pixel near zero may move a whole box: the
    noise of random weights is full of such pixels, so that only the plain anchors tell of rounding.
    """
    _, images = _noise(run, side)
    side.model.eval()
    for anchors, enhanced in (("predicted", False), ("of masks", True)):
        side.set_anchors(enhanced)
        with torch.no_grad(), arithmetic(run, "float32"):
            found = {part: x.float().cpu() for part, x in side.predict(images).items()}
        path = scratch / f"predictions_{enhanced}.pth"
        if side.name == "released":
            torch.save(found, path)
            continue
        errors, moved = differences(found, torch.load(path))
        case = {"what": "equality", "anchors": anchors, "queries": len(found["boxes"])}
        run.say(**case, relative=errors, moved=moved)
    if side.name == "released":
        run.say(what="released operator", compiled=_runs_compiled(run, side, images))


def differences(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[dict, int]:
    """Largest difference of each part, relative to its largest number, and how many queries moved.

    Queries are selected by score, and near ties may change places: they are paired by nearness.
    """
    rows, columns = (torch.cat([x["logits"], x["boxes"]], dim=1) for x in (found, expected))
    distances = torch.cdist(rows, columns, compute_mode="donot_use_mm_for_euclid_dist")
    pairs = torch.as_tensor(linear_sum_assignment(distances.numpy())[1])
    errors = {
        part: float(f"{((x - expected[part][pairs]).abs().max() / expected[part].abs().max()):.2g}")
        for part, x in found.items()
    }
    return errors, int((pairs != torch.arange(len(pairs))).sum())


def _runs_compiled(run: Run, side: Side, images: Tensor) -> bool:
    """Whether its operator runs: where it raises, the released code takes its PyTorch form."""
    if not run.on_gpu:
        return False
    with torch.no_grad():
        found = launches(run, lambda: side.predict(images))
    return any("ms_deformable" in kernel for kernel, *_ in found["top"])


def _train(run: Run, side: Side, precision: str, case: dict) -> None:
    size = 128 if run.dry else 1024
    torch.manual_seed(5)
    batch = [drawn_input(size, size, OBJECTS, CLASSES, side.pack_masks) for _ in range(2)]
    torch.manual_seed(0)
    step, scaler = side.train_in(precision)
    loss = round(step(batch), 3)
    measure(run, {**case, "first_loss": loss}, lambda: step(batch), repeats=5)
    if scaler.is_enabled() and scaler.get_scale() < FIRST_SCALE:
        run.say(**case, note="gradients overflowed: steps were left out")


def _infer(run: Run, side: Side, precision: str) -> None:
    side.model.eval()
    side.set_precision(precision)
    image, images = _noise(run, side)
    inputs = [{"image": image, "height": 480, "width": 640}]
    calls = {"network": lambda: side.predict(images), "results": lambda: side.model(inputs)}
    for part, call in calls.items():
        case = {"side": side.name, "what": f"inference, {part}", "precision": precision}
        with torch.no_grad(), arithmetic(run, precision):
            measure(run, case, call, repeats=5)


def _noise(run: Run, side: Side) -> tuple[Tensor, Tensor]:
    """An image (3, height, width), and the network's input (1, 3, height, width) of it."""
    torch.manual_seed(5)
    size = (128, 160) if run.dry else (800, 1088)
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    normalized = (image.to(run.device) - side.model.pixel_mean) / side.model.pixel_std
    return image, normalized[None]


def main() -> None:
    """One side, in a process that `side_by_side` started: its name, and a folder of both sides."""
    side, scratch = sys.argv[1], Path(sys.argv[2])
    if sent := sys.stdin.buffer.read():
        run = pickle.loads(sent)
        compare(run, SIDES[side](run, scratch), scratch)


if __name__ == "__main__":
    main()

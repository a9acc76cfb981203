"""Tells what is installed, what is missing and how to get it, and whether the model computes.

    maskdino doctor
    maskdino doctor --install-detectron2     build and install detectron2 0.6 for this PyTorch

Ends with status 1 where something that every command needs is missing or broken.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import platform
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from maskdino.cli.common import CommandError, make_parser
from maskdino.system import program
from maskdino.system.errors import reason_of
from maskdino.system.words import counted

if TYPE_CHECKING:
    import torch

TOLERANCE = 1e-4  # of float32, between two forms of the operator


@dataclass(frozen=True)
class Package:
    """A package that is used."""

    module: str  # that is imported
    use: str = ""  # what it is for; "": every command
    command: str = ""  # that installs it; "": pip, by the name of the module

    @property
    def mend(self) -> str:
        """The command that installs it."""
        return self.command or f"pip install {self.module}"


NEEDED = (
    Package("detectron2", command="maskdino doctor --install-detectron2"),
    Package("torch", command="pip install torch torchvision"),
    Package("torchvision", command="pip install torch torchvision"),
    Package("cv2", command="pip install opencv-python-headless"),
    Package("PIL", command="pip install pillow"),
    Package("yaml", command="pip install pyyaml"),
    *map(Package, ("numpy", "pycocotools", "scipy", "timm", "fvcore", "iopath", "jinja2")),
    *map(Package, ("matplotlib", "tensorboard", "tqdm")),
)
_PANOPTICAPI = "pip install --no-deps panopticapi-lite==0.1.0"
OPTIONAL = (
    Package("faster_coco_eval", "evaluation in less time", "pip install faster-coco-eval"),
    Package("panopticapi", "evaluation of panoptic maps", _PANOPTICAPI),
    Package("cityscapesscripts", "evaluation on Cityscapes"),
    *(
        Package(module, use, f"pip install 'maskdino[{extra}]'")
        for module, use, extra in (
            ("av", "videos", "video"),
            ("onnx", "export", "export"),
            ("onnxscript", "export", "export"),
            ("onnxruntime", "prediction with exported models", "export"),
            ("openvino", "prediction with exported models", "openvino"),
            ("wandb", "logs in W&B", "wandb"),
            ("mlflow", "logs in MLflow", "mlflow"),
        )
    ),
)
SHOWN = ("torch", "torchvision", "detectron2", "numpy", "cv2", "timm", "pycocotools")


@dataclass
class Findings:
    """Packages that could be imported, and what is wrong, in words."""

    modules: dict[str, ModuleType] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def attempt(self, what: str, check: Callable[[], str]) -> None:
        """Runs a check, prints what it tells, and notes where it fails."""
        try:
            print(f"  {what}: {check()}")
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what is asked for
            self.note(f"{what}: {type(error).__name__}: {reason_of(error)}")

    def note(self, fault: str) -> None:
        """Notes something that is wrong."""
        self.faults.append(fault)
        print(f"  BROKEN {fault}")


def check_packages(findings: Findings) -> None:
    """Imports all that every command needs; prints the versions that matter, and what is missing.

    Detectron2 comes first: without it nothing else helps.
    """
    for package in NEEDED:
        name = package.module
        if importlib.util.find_spec(name) is None:
            findings.note(f"{name} is not installed: {package.mend}")
            continue
        try:
            findings.modules[name] = importlib.import_module(name)
        except Exception as error:  # noqa: BLE001 - packages fail in their own ways
            findings.note(f"{name} cannot be imported ({reason_of(error)}): {package.mend}")
    for name in SHOWN:
        if name in findings.modules:
            print(f"  {name} {version_of(findings.modules[name])}")
    for package in OPTIONAL:
        if importlib.util.find_spec(package.module) is None:
            print(f"  without {package.module}, for {package.use}: {package.mend}")


def version_of(module: ModuleType) -> str:
    """The version of an imported package: as it says or as it was installed, the longer one."""
    name = module.__name__
    known = [getattr(module, "__version__", "")]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        known.append(importlib.metadata.version(name))
    version = max(known, key=len)
    if name == "detectron2":
        comm = importlib.import_module("detectron2.utils.comm")
        newer = hasattr(comm, "create_local_process_group")
        return f"{version} ({'main branch' if newer else 'release 0.6'})"
    return version


def devices() -> list[torch.device]:
    """Where this PyTorch can compute, the CPU first; prints what they are."""
    import torch

    found = [torch.device("cpu")]
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"  cpu: {platform.machine()}, {capability}, {torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        found.append(torch.device("cuda", index))
        print(f"  cuda:{index}: {torch.cuda.get_device_name(index)}")
    if torch.backends.mps.is_available():
        found.append(torch.device("mps"))
        print("  mps: Apple's GPU")
    if len(found) == 1:
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU alone"
        print(f"  no GPU (this PyTorch is built for {built})")
    return found


def check_operator(device: torch.device) -> str:
    """Compares the form of deformable attention that a device uses with the plain one."""
    import torch

    from maskdino.ops.ms_deform_attn import (
        explain_backend,
        ms_deform_attn,
        ms_deform_attn_reference,
    )

    choice, reason = explain_backend(device.type, "auto", device.index)
    generator = torch.Generator().manual_seed(0)
    shapes = [(6, 7), (3, 4)]
    value = torch.rand(1, sum(h * w for h, w in shapes), 2, 32, generator=generator)
    locations = torch.rand(1, 5, 2, len(shapes), 4, 2, generator=generator)
    weights = torch.rand(1, 5, 2, len(shapes), 4, generator=generator)
    arguments = (value.to(device), shapes, locations.to(device), weights.to(device))
    expected = ms_deform_attn_reference(*arguments)
    difference = (ms_deform_attn(*arguments) - expected).abs().max().item()
    if not difference <= TOLERANCE:
        raise ArithmeticError(f"the {choice} form differs from the plain one by {difference:.1e}")
    why = f" ({reason})" if reason else ""
    return f"{choice}{why}; differs from the plain form by {difference:.0e}"


def check_model(device: torch.device) -> str:
    """Lets a small model with random weights look at an empty image."""
    import torch

    from maskdino import api, model_zoo

    name = "nuclei/instance/maskdino_tiny"
    cfg = model_zoo.get_config(name)
    cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = "", str(device)
    with torch.no_grad():
        model = api.MaskDINO(cfg).eval()
        (result,) = model([{"image": torch.zeros(3, 96, 128), "height": 96, "width": 128}])
    scores = result["instances"].scores
    if not len(scores) or not scores.isfinite().all():
        raise ArithmeticError("its scores are no numbers")
    return f"{counted(len(scores), 'object')} scored by {name} with random weights"


def examine() -> Findings:
    """Prints everything, and returns what was found."""
    findings = Findings()
    print(f"maskdino {program.VERSION} in {Path(program.__file__).parents[1]}")
    system = f"{platform.system()} {platform.release()}"
    print(f"Python {platform.python_version()} on {system}\n\npackages")
    check_packages(findings)
    if "torch" in findings.modules:
        print("\ndevices")
        places = devices()
        print("\ndeformable attention")
        for place in places:
            findings.attempt(str(place), partial(check_operator, place))
    if not findings.faults:
        print("\nmodel")
        for place in places:
            findings.attempt(str(place), partial(check_model, place))
    return findings


def install_detectron2() -> None:
    """Builds detectron2 0.6 and installs it, where there is none."""
    from maskdino.cli import install_detectron2 as recipe

    try:
        recipe.main([])
    except recipe.BuildError as error:
        raise CommandError(str(error)) from error


def main(words: list[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--install-detectron2",
        action="store_true",
        help="if it is missing: build and install 0.6",
    )
    if parser.parse_args(words).install_detectron2:
        install_detectron2()
        return 0
    warnings.simplefilter("ignore")  # of other packages, while they are imported
    findings = examine()
    if not findings.faults:
        print("\nall is well")
        return 0
    print("\nto mend:", *findings.faults, sep="\n  ")
    return 1

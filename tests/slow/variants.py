"""Worked cases of our own: a parity case with other options, and what the slow model says of it.

A case is a folder as `tools/check_parity.py` reads it. Its weights follow from names and shapes,
so a variant only needs the list of its parameters.
"""

from __future__ import annotations

import ast
import copy
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from torch import Tensor, nn

from maskdino.backbones import build_backbone
from maskdino.checkpoint.released_config import convert_config
from maskdino.checkpoint.released_weights import ReleasedStructure, convert_weights, our_names
from maskdino.config import add_maskdino_config
from tests.conftest import load_module
from tests.slow.losses import Decoded, SlowCriterion, Target
from tests.slow.mask_dino import DECODER, DECODER_HEADS, ENCODER, POINTS, SlowMaskDINO, canonical
from tests.slow.results import Size, SlowResults

OUTPUT_SIZE = (256, 320)  # what every case asks for
CHANNELS = 256
CLASS_MAP_BLOCK = 4  # class maps are kept as means over blocks of pixels, as in the parity cases
# Parameters whose presence or shape follows from the options.
OPTIONAL = ("input_proj.", "predictor.class_embed.", "label_enc.", "query_", "enc_output")


@dataclass(frozen=True)
class Variant:
    """How a case differs from a parity case.

    Attributes:
        name: of the test.
        base: name of the parity case.
        options: released keys below MODEL, dotted, and their values.
        labels: classes of the first objects of each image that are kept; None: as in the case.
        size: height and width that the images are resized to.
        things: classes that are things; None: all.
        dataset: name of the training dataset, which says what is a thing.
    """

    name: str
    base: str
    options: Mapping[str, object] = field(default_factory=dict)
    labels: tuple[tuple[int, ...], ...] | None = None
    size: Size | None = None
    things: tuple[int, ...] | None = None
    dataset: str | None = None


def make_case(variant: Variant, parity: Path, folder: Path) -> None:
    """Writes all files of the case `variant` into `folder`.

    Beside what `tools/check_parity.py` reads, `variant_undecided.npz` tells of each panoptic map
    the pixels whose segment hangs on rounding.
    """
    config = changed_config(variant, parity)
    shutil.copy(parity / "make_weights.py", folder)
    (folder / "variant_config.yaml").write_text(yaml.safe_dump(config))
    listed = dict(parameters(parity / f"{variant.base}_parameters.tsv", config))
    lines = [f"{name}\t{shape}\ttorch.float32\n" for name, shape in listed.items()]
    (folder / "variant_parameters.tsv").write_text("".join(lines))
    inputs = changed_inputs(variant, dict(np.load(parity / f"{variant.base}_inputs.npz")))
    np.savez(folder / "variant_inputs.npz", **inputs)
    num_classes = config["MODEL"]["SEM_SEG_HEAD"]["NUM_CLASSES"]
    is_thing = [variant.things is None or label in variant.things for label in range(num_classes)]
    if variant.dataset is not None:
        tell_things(variant.dataset, is_thing)
    weights = weights_of(folder, "variant")
    expected = SlowCase(config, weights, inputs, is_thing).expected()
    undecided = {
        name.replace("undecided", "seg"): expected.pop(name)
        for name in list(expected)
        if name.endswith("panoptic_undecided")
    }
    np.savez(folder / "variant_expected.npz", **expected)
    np.savez(folder / "variant_undecided.npz", **undecided)


@lru_cache
def read_config(path: Path) -> dict:
    """A configuration, which takes a third of a second."""
    return yaml.safe_load(path.read_text())


def changed_config(variant: Variant, parity: Path) -> dict:
    """The released configuration of a variant."""
    config = copy.deepcopy(read_config(parity / f"{variant.base}_config.yaml"))
    for key, value in variant.options.items():
        *path, last = key.split(".")
        node = config["MODEL"]
        for part in path:
            node = node[part]
        if last not in node:
            raise KeyError(f"{variant.name}: the case has no option MODEL.{key}")
        node[last] = value
    if variant.dataset is not None:
        config["DATASETS"]["TRAIN"] = [variant.dataset]
    return config


def tell_things(dataset: str, is_thing: list[bool]) -> None:
    """Registers which classes of a dataset are things, if the dataset is unknown."""
    if dataset in MetadataCatalog.list():
        return
    things = [label for label, thing in enumerate(is_thing) if thing]
    stuff = [label for label, thing in enumerate(is_thing) if not thing]
    MetadataCatalog.get(dataset).set(
        thing_dataset_id_to_contiguous_id={label: label for label in things},
        stuff_dataset_id_to_contiguous_id={label: label for label in stuff},
    )


def changed_inputs(variant: Variant, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Images and masks of the wanted size, and the wanted objects."""
    if variant.size is not None:
        images = torch.from_numpy(inputs["images"])
        resized = F.interpolate(images, variant.size, mode="bilinear", align_corners=False)
        inputs["images"] = resized.numpy()
        for name in ("masks_0", "masks_1"):
            masks = torch.from_numpy(inputs[name])[None].float()
            inputs[name] = F.interpolate(masks, variant.size)[0].bool().numpy()
    for image, labels in enumerate(variant.labels or ()):
        inputs[f"labels_{image}"] = np.array(labels, dtype=np.int64)
        inputs[f"masks_{image}"] = inputs[f"masks_{image}"][: len(labels)]
        if len(inputs[f"masks_{image}"]) < len(labels):
            raise ValueError(f"{variant.name}: image {image} has fewer objects than {labels}")
    return inputs


def parameters(path: Path, config: dict) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Released name and shape of every float parameter of the configured model.

    Args:
        path: the list of a case with the same backbone and as many layers.
        config: the released configuration.
    """
    head, options = config["MODEL"]["SEM_SEG_HEAD"], config["MODEL"]["MaskDINO"]
    levels, num_classes = head["TOTAL_NUM_FEATURE_LEVELS"], head["NUM_CLASSES"]
    for line in path.read_text().splitlines():
        name, shape, dtype = line.split("\t")
        shape = ast.literal_eval(shape)
        if "float" not in dtype or any(part in name for part in OPTIONAL):
            continue
        if name == f"{ENCODER}adapter_1.weight":
            res2_channels = shape[1]
        heads = options["NHEADS"] if name.startswith(ENCODER) else DECODER_HEADS
        if name.endswith("level_embed"):
            shape = (levels, CHANNELS)
        elif "sampling_offsets" in name:
            shape = (heads * levels * POINTS * 2, *shape[1:])
        elif "attention_weights" in name:
            shape = (heads * levels * POINTS, *shape[1:])
        yield name, shape
    yield from input_projections(head, res2_channels)
    outputs = num_classes + options["SEMANTIC_CE_LOSS"]
    yield f"{DECODER}class_embed.weight", (outputs, CHANNELS)
    yield f"{DECODER}class_embed.bias", (outputs,)
    yield f"{DECODER}label_enc.weight", (num_classes, CHANNELS)
    if options["TWO_STAGE"]:
        yield f"{DECODER}enc_output.weight", (CHANNELS, CHANNELS)
        for name in ("enc_output.bias", "enc_output_norm.weight", "enc_output_norm.bias"):
            yield f"{DECODER}{name}", (CHANNELS,)
    else:
        yield f"{DECODER}query_feat.weight", (options["NUM_OBJECT_QUERIES"], CHANNELS)
        yield f"{DECODER}query_embed.weight", (options["NUM_OBJECT_QUERIES"], 4)


def input_projections(head: dict, res2_channels: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Of the used features in their order, and of the extra level."""
    used = head["DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES"]
    channels = [res2_channels * 2 ** (int(name.removeprefix("res")) - 2) for name in used]
    shapes = [(CHANNELS, number, 1, 1) for number in channels]
    if head["FEATURE_ORDER"] == "high2low":
        shapes.reverse()
    if head["TOTAL_NUM_FEATURE_LEVELS"] > len(used):
        shapes.append((CHANNELS, channels[-1], 3, 3))
    for i, shape in enumerate(shapes):
        yield f"{ENCODER}input_proj.{i}.0.weight", shape
        for name in ("0.bias", "1.weight", "1.bias"):
            yield f"{ENCODER}input_proj.{i}.{name}", (CHANNELS,)


def weights_of(folder: Path, name: str) -> dict[str, Tensor]:
    """The weights of a case under released names."""
    module = load_module(folder / "make_weights.py")
    weights = module.released_weights(str(folder / f"{name}_parameters.tsv"))
    return {key: torch.from_numpy(value) for key, value in weights.items()}


class SlowCase:
    """A case, computed by the slow model; the backbone alone is the package's.

    Args:
        config: nested mapping with released keys.
        weights: under released names.
        inputs: as in the parity cases.
        is_thing: of each class.
    """

    def __init__(
        self,
        config: dict,
        weights: dict[str, Tensor],
        inputs: dict[str, np.ndarray],
        is_thing: list[bool],
    ) -> None:
        self.config, self.released, self.is_thing = config, weights, is_thing
        self.inputs = {name: torch.from_numpy(value) for name, value in inputs.items()}
        self.weights = {
            canonical(name): tensor.clone().requires_grad_()
            for name, tensor in weights.items()
            if name.startswith((ENCODER, DECODER))
        }
        self.model = SlowMaskDINO(self.weights, config)
        self.backbone, self.backbone_names = backbone_of(config, weights)
        self.image_size = tuple(self.inputs["images"].shape[-2:])
        self.canvas = tuple(-(-side // 32) * 32 for side in self.image_size)

    def expected(self) -> dict[str, np.ndarray]:
        """All that `tools/check_parity.py` compares."""
        features = self.backbone(self.padded_images())
        encoded = [
            self.model.encode({name: feature[i] for name, feature in features.items()})
            for i in range(len(self.inputs["images"]))
        ]
        with torch.no_grad():
            expected = self.evaluated(encoded)
        losses = self.losses(encoded)
        sum(losses.values()).backward()
        expected |= {f"loss/{name}": loss for name, loss in losses.items()}
        expected |= self.gradient_norms()
        return {name: value.detach().numpy() for name, value in expected.items()}

    def padded_images(self) -> Tensor:
        """Normalised, padded at the right and at the bottom."""
        mean, std = (
            torch.tensor(self.config["MODEL"][key]).view(3, 1, 1)
            for key in ("PIXEL_MEAN", "PIXEL_STD")
        )
        images = (self.inputs["images"].float() - mean) / std
        below, right = (
            big - small for big, small in zip(self.canvas, self.image_size, strict=True)
        )
        return F.pad(images, (0, right, 0, below))

    def evaluated(self, encoded: list[tuple[list[Tensor], Tensor]]) -> dict[str, Tensor]:
        """Predictions of the last layer and of the encoder, and results."""
        decoded = [Decoded(*self.model.predict(*of_image)) for of_image in encoded]
        expected = {}
        last = [image.predictions[-1] for image in decoded]
        for i, name in enumerate(("pred_logits", "pred_boxes", "pred_masks")):
            expected[f"eval/{name}"] = torch.stack([prediction[i] for prediction in last])
        if decoded[0].proposal is not None:
            for i, name in enumerate(("interm_logits", "interm_boxes")):
                expected[f"eval/{name}"] = torch.stack([image.proposal[i] for image in decoded])
        results = SlowResults(self.config, self.is_thing, self.canvas, self.image_size, OUTPUT_SIZE)
        for i, prediction in enumerate(last):
            expected |= {f"result/{i}/{name}": value for name, value in results(prediction)}
            if f"result/{i}/sem_seg" in expected:
                expected[f"result/{i}/sem_seg"] = F.avg_pool2d(
                    expected[f"result/{i}/sem_seg"], CLASS_MAP_BLOCK
                )
        return expected

    def losses(self, encoded: list[tuple[list[Tensor], Tensor]]) -> dict[str, Tensor]:
        """Weighted losses under released names."""
        targets = [self.target(i) for i in range(len(encoded))]
        criterion = SlowCriterion(
            self.config, targets, self.inputs["points"].float(), self.is_thing
        )
        noised = criterion.noised()
        decoded = [
            Decoded(*self.model.predict(*of_image, None if noised is None else noised[i]))
            for i, of_image in enumerate(encoded)
        ]
        return criterion.losses(decoded, noised)

    def target(self, image: int) -> Target:
        """Masks on the canvas, and their boxes."""
        height, width = self.canvas
        masks = self.inputs[f"masks_{image}"]
        padded = torch.zeros(len(masks), height, width)
        boxes = torch.zeros(len(masks), 4)
        for i, mask in enumerate(masks):
            padded[i, : mask.shape[0], : mask.shape[1]] = mask
            rows, columns = torch.where(mask)
            x0, x1 = columns.min(), columns.max() + 1
            y0, y1 = rows.min(), rows.max() + 1
            box = torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0])
            boxes[i] = box / torch.tensor([width, height, width, height])
        return Target(self.inputs[f"labels_{image}"].tolist(), boxes, padded)

    def gradient_norms(self) -> dict[str, Tensor]:
        """Of every released parameter, once for each module; 0 where it takes no part."""
        own = dict(self.backbone.named_parameters())
        norms, seen = {}, set()
        for name in self.released:
            parameter = self.weights.get(canonical(name))
            if name in self.backbone_names:
                parameter = own.get(self.backbone_names[name])
            if canonical(name) not in seen and parameter is not None:
                seen.add(canonical(name))
                gradient = parameter.grad
                norms[f"grad_norm/{name}"] = (
                    torch.zeros(()) if gradient is None else gradient.norm()
                )
        return norms


def backbone_of(config: dict, weights: dict[str, Tensor]) -> tuple[nn.Module, dict[str, str]]:
    """The package's backbone, and the name in it of each released backbone tensor."""
    ours = get_cfg()
    add_maskdino_config(ours)
    convert_config(copy.deepcopy(config), ours)
    ours.MODEL.DEVICE = "cpu"
    backbone = build_backbone(ours)
    prefix = "backbone."
    converted = {
        name.removeprefix(prefix): tensor
        for name, tensor in convert_weights(weights, config["MODEL"]["MaskDINO"]["NHEADS"]).items()
        if name.startswith(prefix)
    }
    missing = backbone.load_state_dict(converted, strict=False).missing_keys
    missing = [
        name
        for name in missing
        if not name.endswith(("num_batches_tracked", "relative_position_index"))
    ]
    if missing:
        raise ValueError(f"the backbone lacks {missing[:8]}")
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    names = our_names(weights, ReleasedStructure.from_shapes(shapes))
    return backbone, {
        name: own.removeprefix(prefix) for name, own in names.items() if own.startswith(prefix)
    }

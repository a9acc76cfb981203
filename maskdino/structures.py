"""Data that travels between the modules of the network.

Shape key: B images, Q queries, S tokens, K class logits, C channels, N objects of the batch,
O outputs, H, W pixels.

Frame: boxes are (cx, cy, w, h), divided by the width and height of the padded canvas of the batch.
Masks live in pixels of that canvas, whose origin is the image's upper left corner. `targets.py` and
`postprocess.py` are the only places that convert from and to the frames of images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SpatialShapes = Sequence[tuple[int, int]]  # (height, width) of each level, finest first


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host where the device can fetch it: for a GPU, in pinned memory.

    From other memory, a copy waits until the GPU has done all that it was given before.
    """
    if device.type != "cuda" or tensor.device.type != "cpu" or tensor.is_pinned():
        return tensor
    return tensor.pin_memory()


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; the host does not wait for the copy."""
    return pinned(tensor, device).to(device, non_blocking=True)


@dataclass(frozen=True)
class Memory:
    """Tokens of all levels, finest level first, row by row."""

    tokens: Tensor  # (B, S, C)
    spatial_shapes: SpatialShapes  # a tuple; the areas of the levels add up to S

    def finest(self, num_levels: int) -> Memory:
        """The first levels alone."""
        if num_levels == len(self.spatial_shapes):
            return self
        shapes = self.spatial_shapes[:num_levels]
        length = sum(height * width for height, width in shapes)
        return Memory(self.tokens[:, :length], shapes)


@dataclass(frozen=True)
class Queries:
    """What enters the first decoder layer."""

    content: Tensor  # (B, Q, C)
    anchor_logits: Tensor  # (B, Q, 4): sigmoid gives boxes (cx, cy, w, h)


@dataclass(frozen=True)
class Predictions:
    """What the heads say of one or, with a leading dimension O, of several outputs.

    A mask logit is the dot product of a mask embedding with the pixel embedding map (equation 1);
    whoever needs mask maps makes them. `mask_embeddings` is None where there is no mask branch.
    """

    class_logits: Tensor  # ([O,] B, Q, K)
    boxes: Tensor  # ([O,] B, Q, 4) cx, cy, w, h in [0, 1]
    mask_embeddings: Tensor | None  # ([O,] B, Q, C)
    content: Tensor | None = None  # (B, Q, C) what class and mask head read; of inference alone

    def map(self, function: Callable[[Tensor], Tensor]) -> Predictions:
        """Applies a function of one tensor to each part."""
        optional = (self.mask_embeddings, self.content)
        return Predictions(
            function(self.class_logits),
            function(self.boxes),
            *(None if part is None else function(part) for part in optional),
        )

    def of_image(self, index: int) -> Predictions:
        """Those of one image, (Q, ...), of one output."""
        return self.map(lambda x: x[index])

    @staticmethod
    def cat(parts: Sequence[Predictions]) -> Predictions:
        """Joins stacks of outputs along O."""
        masks = [part.mask_embeddings for part in parts if part.mask_embeddings is not None]
        return Predictions(
            torch.cat([part.class_logits for part in parts]),
            torch.cat([part.boxes for part in parts]),
            torch.cat(masks) if masks else None,
        )


def of_mask_branch(
    mask_embeddings: Tensor | None, pixel_embedding: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What masks are made of, where they are needed.

    Raises:
        ValueError: there is no mask branch.
    """
    if mask_embeddings is None or pixel_embedding is None:
        raise ValueError("masks need a mask branch (MODEL.MASK_DINO.MASK_ON)")
    return mask_embeddings, pixel_embedding


@dataclass(frozen=True)
class Outputs:
    """Predictions that losses are computed for, each with its name."""

    predictions: Predictions  # (O, B, Q, ...)
    names: tuple[str, ...]  # O endings of the losses' names, such as "_layer1"

    def map(self, function: Callable[[Tensor], Tensor]) -> Outputs:
        """Applies a function that keeps O to each tensor of the predictions."""
        return Outputs(self.predictions.map(function), self.names)

    def plus(self, predictions: Predictions, name: str) -> Outputs:
        """Adds one output, whose predictions (B, Q, ...) have no dimension O yet."""
        stacked = predictions.map(lambda x: x[None])
        return Outputs(Predictions.cat([self.predictions, stacked]), (*self.names, name))

    def without(self, name: str) -> Outputs:
        """Leaves one output out, if it is there; it must be the first."""
        if name not in self.names:
            return self
        if self.names[0] != name:
            raise ValueError(f"{name!r} is not the first of the outputs {self.names}")
        return Outputs(self.predictions.map(lambda x: x[1:]), self.names[1:])


@dataclass(frozen=True)
class Denoising:
    """Noised ground truth, decoded in front of the matching queries (section 3.6, appendix B.2).

    Slot `group * slots_per_group + i` of an image belongs to its i-th object; slots beyond an
    image's objects are empty, and so are queries beyond the last slot.
    """

    queries: Queries  # of W noised queries, at least G * slots_per_group
    group_of: Tensor  # (W,) int64 group of each
    num_groups: int
    slots_per_group: int
    with_masks: bool

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Content (B, W, C), anchors (B, W, 4) as logits, and groups (W,)."""
        return self.queries.content, self.queries.anchor_logits, self.group_of

    @property
    def num_queries(self) -> int:
        """Noised queries of an image, without those that fill up."""
        return self.num_groups * self.slots_per_group


@dataclass(frozen=True)
class NetworkOutputs:
    """All that losses are computed of, noised queries among it."""

    outputs: Outputs
    proposals: Predictions | None  # (B, Q, ...) of the selected tokens
    pixel_embedding: Tensor | None  # (B, C, H, W)

    def map(self, function: Callable[[Tensor], Tensor]) -> NetworkOutputs:
        """Applies a function that keeps O to each tensor."""
        return NetworkOutputs(
            self.outputs.map(function),
            None if self.proposals is None else self.proposals.map(function),
            None if self.pixel_embedding is None else function(self.pixel_embedding),
        )


@dataclass(frozen=True)
class DenoisedOutputs:
    """What became of noised queries: their outputs, and how they were noised."""

    outputs: Outputs  # of the noised queries alone
    denoising: Denoising


@dataclass(frozen=True)
class Targets:
    """Ground truth of a batch: the objects of all images, one after the other."""

    labels: Tensor  # (N,) int64
    boxes: Tensor  # (N, 4) cx, cy, w, h in [0, 1]
    is_thing: Tensor  # (N,) bool: False for "stuff", of which decoupled box prediction asks no box
    has_mask: Tensor  # (N,) bool
    masks: PackedMasks  # N masks of the canvas; those without a mask are empty
    counts: tuple[int, ...]  # objects of each image
    names: tuple[str, ...]  # of the images, for messages

    def __len__(self) -> int:
        return sum(self.counts)

    @property
    def offsets(self) -> tuple[int, ...]:
        """Index of each image's first object."""
        return tuple(sum(self.counts[:i]) for i in range(len(self.counts)))


@dataclass(frozen=True)
class Matches:
    """Pairs of a prediction and an object, image by image, as index tensors of equal length M."""

    output: Tensor  # (M,) int64 index into O
    image: Tensor  # (M,) int64 index into B
    query: Tensor  # (M,) int64 index into Q
    target: Tensor  # (M,) int64 index into the N objects of the batch
    pairs_per_image: tuple[int, ...]

    @staticmethod
    def from_numpy(pairs: Sequence[np.ndarray], device: torch.device) -> Matches:
        """From one (4, pairs) array for each image: output, image, query, target."""
        index = torch.from_numpy(np.concatenate(pairs, axis=1).astype(np.int64))
        output, image, query, target = send(index, device).unbind(0)
        return Matches(output, image, query, target, tuple(part.shape[1] for part in pairs))


class PackedMasks:
    """Binary masks with eight pixels in a byte, in rows: an eighth of a boolean tensor's memory.

    Attributes:
        bits: (N, H, ceil(W / 8)) uint8; the highest bit of a byte is its leftmost pixel.
        size: (height, width) in pixels.
    """

    def __init__(self, bits: Tensor, size: tuple[int, int]) -> None:
        height, width = size
        if bits.dtype != torch.uint8 or tuple(bits.shape[1:]) != (height, (width + 7) // 8):
            expected = f"(N, {height}, {(width + 7) // 8}) uint8"
            raise ValueError(
                f"masks of {size} pixels need bits {expected}, not {tuple(bits.shape)} {bits.dtype}"
            )
        self.bits = bits
        self.size = (int(height), int(width))

    @staticmethod
    def from_bool(masks: Tensor | np.ndarray) -> PackedMasks:
        """Packs masks (N, H, W) of any dtype; what is not 0 is foreground."""
        array = np.asarray(masks.cpu() if isinstance(masks, Tensor) else masks)
        bits = torch.from_numpy(np.packbits(array != 0, axis=2))
        device = masks.device if isinstance(masks, Tensor) else "cpu"
        return PackedMasks(bits.to(device), array.shape[1:])

    @staticmethod
    def empty(
        number: int, size: tuple[int, int], device: torch.device | str = "cpu"
    ) -> PackedMasks:
        """`number` masks without foreground."""
        return PackedMasks(
            torch.zeros(number, size[0], (size[1] + 7) // 8, dtype=torch.uint8, device=device), size
        )

    def to_bool(self) -> Tensor:
        """(N, H, W) bool."""
        shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=self.bits.device)
        pixels = (self.bits[..., None] >> shifts) & 1
        return pixels.flatten(2)[..., : self.size[1]].bool()

    @staticmethod
    def join(
        masks: Sequence[PackedMasks], size: tuple[int, int], device: torch.device
    ) -> PackedMasks:
        """Joins masks of the host on canvases of one size, which is at least as large, on a device.

        They lie in the upper left corner. Each part is copied once, and the host does not wait for
        it if the part is in pinned memory.
        """
        canvas = PackedMasks.empty(sum(len(part) for part in masks), size, device)
        for part, place in zip(masks, canvas.bits.split([len(m) for m in masks]), strict=True):
            if part.bits.numel():
                height, width = part.bits.shape[1:]
                place[:, :height, :width].copy_(pinned(part.bits, device), non_blocking=True)
        return canvas

    def pin_memory(self) -> PackedMasks:
        """The same masks in memory from which a GPU copies without the host (DataLoader's name)."""
        return PackedMasks(self.bits.pin_memory(), self.size)

    def to(self, *args, **kwargs) -> PackedMasks:
        """Moves to another device, as `Tensor.to` does."""
        return PackedMasks(self.bits.to(*args, **kwargs), self.size)

    @property
    def device(self) -> torch.device:
        """Where the bits are."""
        return self.bits.device

    def __len__(self) -> int:
        return self.bits.shape[0]

    def __getitem__(self, index: int | slice | Tensor) -> PackedMasks:
        bits = self.bits[index]
        return PackedMasks(bits[None] if isinstance(index, int) else bits, self.size)

    def __repr__(self) -> str:
        return f"PackedMasks(number={len(self)}, size={self.size})"

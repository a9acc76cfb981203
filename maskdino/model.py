"""Mask DINO as a detectron2 meta-architecture: the flow from images to losses or results."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone
from detectron2.structures import ImageList
from torch import Tensor, nn

from maskdino.backbones import build_backbone
from maskdino.backbones.resnet import recompute_first_stages
from maskdino.categories import Categories
from maskdino.config import complete_config
from maskdino.integration.registration import offer_to
from maskdino.losses.criterion import BOX_LOSSES, MASK_LOSSES, Criterion
from maskdino.modeling.cuda_graphs import CudaGraphs
from maskdino.modeling.decoder import Decoder, DecoderState
from maskdino.modeling.denoising import (
    DenoisingQueries,
    build_denoising,
    join_noised,
    split_noised,
)
from maskdino.modeling.encoder import MultiScaleDeformableEncoder, PixelEmbedding
from maskdino.modeling.half_weights import half_weights
from maskdino.modeling.heads import PredictionHeads
from maskdino.modeling.prepared import Prepared
from maskdino.modeling.query_selection import build_query_selection
from maskdino.modeling.training_graphs import TrainingGraphs
from maskdino.ops.recompute import set_recompute
from maskdino.postprocess import Frame, InferenceOptions, postprocess
from maskdino.structures import (
    Memory,
    NetworkOutputs,
    Outputs,
    Predictions,
    Targets,
    send,
)
from maskdino.system.precision import check_precision, network_precision
from maskdino.targets import prepare_targets

logger = logging.getLogger(__name__)


@offer_to(META_ARCH_REGISTRY)
class MaskDINO(nn.Module):
    """Image -> backbone -> encoder -> query selection -> decoder -> losses or results.

    Shape key: B images, Q queries, C channels, O outputs; H, W of the pixel embedding, 1/4 of the
    padded canvas.
    """

    pixel_mean: Tensor
    pixel_std: Tensor
    is_thing: Tensor

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        encoder: MultiScaleDeformableEncoder,
        pixel_embedding: PixelEmbedding | None,
        heads: PredictionHeads,
        query_selection: nn.Module,
        denoising: DenoisingQueries | None,
        decoder: Decoder,
        criterion: Criterion,
        inference: InferenceOptions,
        is_thing: Sequence[bool],
        size_divisibility: int,
        pixel_mean: list[float],
        pixel_std: list[float],
        recompute: str = "none",
    ) -> None:
        """Joins the parts; `from_config` makes them.

        Args:
            backbone: gives features of the images, by name.
            encoder: makes of them tokens of several levels that know of each other.
            pixel_embedding: makes the map whose dot product with a mask embedding is a mask; None:
                a detector without masks.
            heads: class, box and mask head, which query selection and every decoder layer share.
            query_selection: makes the decoder's queries: `UnifiedQuerySelection`, or
                `LearnedQueries`, which have nothing of the image.
            denoising: makes noised queries in training; None: none.
            decoder: refines the queries.
            criterion: matching and losses.
            inference: how predictions become results.
            is_thing: (classes,) False for "stuff": without boxes in training where that is asked
                for, and one segment of each class in panoptic results.
            size_divisibility: batches are padded to a multiple of this, in pixels.
            pixel_mean: (channels,) subtracted from the pixels of images.
            pixel_std: (channels,) by which the difference is divided.
            recompute: what the backward pass computes again instead of keeping it
                (`maskdino.ops.recompute`).
        """
        super().__init__()
        self.backbone, self.encoder, self.pixel_embedding = backbone, encoder, pixel_embedding
        self.heads = heads
        self.query_selection, self.denoising, self.decoder = query_selection, denoising, decoder
        self.criterion, self.inference = criterion, inference
        self.size_divisibility = size_divisibility
        self.register_buffer(
            "pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False
        )
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)
        self.register_buffer("is_thing", torch.tensor(is_thing, dtype=torch.bool), persistent=False)
        self._graphs, self._prepared = CudaGraphs(), Prepared()
        self.training_graphs: TrainingGraphs | None = None
        self._freeze_heads_without_loss()
        set_recompute(self, recompute)
        recompute_first_stages(backbone, recompute)

    def _freeze_heads_without_loss(self) -> None:
        """Freezes heads whose losses all have weight 0; what they compute is still used.

        No gradient would ever reach them, and several processes wait for the gradient of each
        trainable parameter. So anchors of a model that learns masks alone are refined by the box
        head as it was loaded; as it was made, it leaves them as they are.
        """
        heads: dict[str, tuple[Iterable[str], list[nn.Module | None]]] = {
            "class head": (["loss_class"], [self.heads.class_head]),
            "box head": (BOX_LOSSES, [self.heads.box_head]),
            "mask head and pixel embedding": (
                MASK_LOSSES,
                [self.heads.mask_head, self.pixel_embedding],
            ),
        }
        for name, (terms, modules) in heads.items():
            present = [module for module in modules if module is not None]
            if present and not any(term in self.criterion.weights for term in terms):
                for module in present:
                    module.requires_grad_(False)
                logger.info("Frozen, as no loss trains it: the %s.", name)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Builds the parts that the configuration describes."""
        cfg = complete_config(cfg)
        backbone = build_backbone(cfg)
        shape = backbone.output_shape()
        node = cfg.MODEL.MASK_DINO
        check_precision(node.TEST.PRECISION, torch.device(cfg.MODEL.DEVICE))
        return {
            "backbone": backbone,
            "encoder": MultiScaleDeformableEncoder(cfg, shape),
            "pixel_embedding": PixelEmbedding(cfg, shape) if node.MASK_ON else None,
            "heads": PredictionHeads(cfg),
            "query_selection": build_query_selection(cfg),
            "denoising": build_denoising(cfg),
            "decoder": Decoder(cfg),
            "criterion": Criterion(cfg),
            "inference": InferenceOptions.from_config(cfg),
            "is_thing": Categories.from_config(cfg).is_thing,
            "size_divisibility": node.SIZE_DIVISIBILITY,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "recompute": node.RECOMPUTE,
        }

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.pixel_mean.device

    def train(self, mode: bool = True) -> MaskDINO:
        """Also forgets what inference has prepared, whose memory training needs."""
        if mode:
            self._graphs, self._prepared = CudaGraphs(), Prepared()
        return super().train(mode)

    def replay_in_training(self) -> None:
        """Lets training steps replay the network as CUDA graphs, one for each shape of a batch.

        The backward pass of a batch must come before the next batch, as in any trainer.
        """
        self.training_graphs = TrainingGraphs()

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor] | list[dict]:
        """Trains or infers.

        Args:
            batched_inputs: detectron2's dicts: `image` (3, h, w) in the range of INPUT.FORMAT; in
                training `instances` (see `maskdino.targets`); for inference `height` and `width` of
                the output, if they differ from the image's.

        Returns:
            In training weighted losses. Else one dict for each image, with `instances`,
            `panoptic_seg` (ids and segments) and `sem_seg` (K, height, width), as
            MODEL.MASK_DINO.TEST asks for.
        """
        images = self.preprocess(batched_inputs)
        if not self.training:
            return self._infer(batched_inputs, images)
        return self.losses(images.tensor, self._targets(batched_inputs, images))

    def preprocess(self, batched_inputs: list[dict]) -> ImageList:
        """Normalized images, padded at the right and at the bottom."""
        images = [
            (send(x["image"], self.device) - self.pixel_mean) / self.pixel_std
            for x in batched_inputs
        ]
        return ImageList.from_tensors(images, self.size_divisibility)

    def _targets(self, batched_inputs: list[dict], images: ImageList) -> Targets:
        names = [
            str(x.get("file_name", x.get("image_id", i))) for i, x in enumerate(batched_inputs)
        ]
        canvas = tuple(images.tensor.shape[-2:])
        bare = [name for name, x in zip(names, batched_inputs, strict=True) if "instances" not in x]
        if bare:
            raise ValueError(
                f"images {', '.join(bare)} have no 'instances' to learn: detectron2's mapper makes "
                "them of a record's 'annotations', an empty list where there are no objects"
            )
        instances = [x["instances"] for x in batched_inputs]
        learned = self.pixel_embedding is not None and self.criterion.weights.keys() & MASK_LOSSES
        return prepare_targets(
            instances, canvas, self.is_thing, self.device, names, with_masks=bool(learned)
        )

    def losses(self, images: Tensor, targets: Targets) -> dict[str, Tensor]:
        """Weighted losses of normalized, padded images (B, 3, height, width): Figure 2."""
        graphs, inputs, denoising = self.training_graphs, (images,), None
        if self.denoising is not None:
            denoising = self.denoising(targets, filled=graphs is not None)
            inputs = images, *denoising.tensors
        found = self._network(*inputs) if graphs is None else graphs(self, self._network, *inputs)
        matched, denoised = split_noised(found.outputs, denoising)
        return self.criterion(matched, found.proposals, denoised, found.pixel_embedding, targets)

    def _network(self, images: Tensor, *noised: Tensor) -> NetworkOutputs:
        """All but the losses.

        Args:
            images: (B, 3, height, width).
            noised: the tensors of `Denoising`, or nothing.
        """
        maps = self.backbone, self.encoder.input_proj
        with half_weights(self, self.device, self.heads.in_full, maps):
            memory, pixel_embedding = self._encode(images)
            queries, proposals = self.query_selection(memory, pixel_embedding, self.heads)
            queries, may_attend = join_noised(queries, *noised)
            decoded = self.decoder(queries, memory, self.heads, may_attend)
            states = self.criterion.supervised(decoded)
            outputs = Outputs(self._predict(list(states.values())), tuple(states))
        return NetworkOutputs(outputs, proposals, pixel_embedding)

    @torch.no_grad()
    def matched_losses(self, batched_inputs: list[dict]) -> dict[str, Tensor]:
        """Losses of the tested decoder layer alone, as in training but without noised queries.

        Args:
            batched_inputs: as for training.

        Returns:
            Weighted scalars by the names of their terms.
        """
        images = self.preprocess(batched_inputs)
        predictions, pixel_embedding = self.predict(images.tensor)
        outputs = Outputs(predictions.map(lambda x: x[None]), ("",))
        targets = self._targets(batched_inputs, images)
        return self.criterion(outputs, None, None, pixel_embedding, targets)

    def predict(self, images: Tensor) -> tuple[Predictions, Tensor | None]:
        """Predictions of the tested decoder layer (TEST.DECODER_LAYER), and the pixel embedding.

        Args:
            images: normalized and padded, (B, 3, height, width).
        """
        memory, pixel_embedding = self._encode(images)
        queries, _ = self.query_selection(memory, pixel_embedding, self.heads, supervised=False)
        layers = self.inference.decoder_layer
        states = self.decoder(
            queries,
            memory,
            self.heads,
            num_layers=None if layers < 0 else layers,
            last_alone=not self.decoder._forward_hooks,  # which would miss the others
        )
        content, boxes = states[-1].content, states[-1].boxes
        classes, masks = self.heads.classes_and_masks(content)
        return Predictions(classes, boxes, masks, content), pixel_embedding

    def _encode(self, images: Tensor) -> tuple[Memory, Tensor | None]:
        features = self.backbone(images)
        memory = self.encoder(features)
        return memory, None if self.pixel_embedding is None else self.pixel_embedding(
            features, memory
        )

    def _predict(self, states: Sequence[DecoderState]) -> Predictions:
        """Predictions (O, B, Q, ...) of several states in one go."""
        classes, masks = self.heads.classes_and_masks(
            torch.stack([state.content for state in states])
        )
        return Predictions(classes, torch.stack([state.boxes for state in states]), masks)

    def predict_precisely(self, images: Tensor) -> tuple[Predictions, Tensor | None]:
        """`predict` in the precision of TEST.PRECISION, on a GPU as a CUDA graph of its shape.

        It is a prepared network that computes (`maskdino.modeling.prepared`).
        """
        with network_precision(self.inference.precision, self.device):
            network = self._prepared.of(self, self.heads.in_full, self.device)
            network.inference = self.inference
            if self.inference.cuda_graphs and images.is_cuda:
                key = self.inference, network
                return self._graphs(network, network.predict, images, key)
            return network.predict(images)

    @torch.no_grad()
    def _infer(self, batched_inputs: list[dict], images: ImageList) -> list[dict]:
        predictions, pixel_embedding = self.predict_precisely(images.tensor)
        height, width = images.tensor.shape[-2:]
        names = {"instance": "instances", "panoptic": "panoptic_seg", "semantic": "sem_seg"}
        results = []
        for i, (inputs, size) in enumerate(zip(batched_inputs, images.image_sizes, strict=True)):
            output = (int(inputs.get("height", size[0])), int(inputs.get("width", size[1])))
            found = postprocess(
                predictions.of_image(i),
                None if pixel_embedding is None else pixel_embedding[i],
                Frame((height, width), (size[0], size[1]), output),
                self.inference,
                self.is_thing,
            )
            results.append({names[task]: result for task, result in found.items()})
        return results

"""Released weights: what their tensors are called here, and what their shapes say of the model.

Ours keep levels in one order, finest first. The released models come in two orders (FEATURE_ORDER),
which differ in the encoder and, reversed, in the decoder; level-wise tensors are put in order here,
once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from maskdino.backbones.convert import is_unused_in_swin, swin_rules
from maskdino.checkpoint.reading import CheckpointError, shapes_of
from maskdino.system.words import counted

ENCODER = "sem_seg_head.pixel_decoder."
DECODER = "sem_seg_head.predictor."
LAYER = r"layers\.(\d+)\."
DECODER_HEADS = 8  # of every released model; those of the encoder are in its configuration

# Released name -> ours; the first pattern that matches the whole name counts.
RENAMES = tuple(
    (re.compile(pattern), ours)
    for pattern, ours in (
        (re.escape(ENCODER) + r"transformer\.level_embed", r"encoder.level_embed"),
        (
            re.escape(ENCODER) + rf"transformer\.encoder\.{LAYER}(linear[12]\..*)",
            r"encoder.layers.\1.ffn.\2",
        ),
        (re.escape(ENCODER) + rf"transformer\.encoder\.{LAYER}(.*)", r"encoder.layers.\1.\2"),
        (re.escape(ENCODER) + r"mask_features\.(.*)", r"pixel_embedding.mask_features.\1"),
        (re.escape(ENCODER) + r"adapter_1\.norm\.(.*)", r"pixel_embedding.lateral_norm.\1"),
        (re.escape(ENCODER) + r"adapter_1\.weight", r"pixel_embedding.lateral.weight"),
        (re.escape(ENCODER) + r"layer_1\.norm\.(.*)", r"pixel_embedding.output_norm.\1"),
        (re.escape(ENCODER) + r"layer_1\.weight", r"pixel_embedding.output.weight"),
        (re.escape(DECODER) + r"enc_output\.(.*)", r"query_selection.output.\1"),
        (re.escape(DECODER) + r"enc_output_norm\.(.*)", r"query_selection.output_norm.\1"),
        (re.escape(DECODER) + r"query_feat\.weight", r"query_selection.content"),
        (re.escape(DECODER) + r"query_embed\.weight", r"query_selection.anchor_logits"),
        (re.escape(DECODER) + r"label_enc\.(.*)", r"denoising.label_embedding.\1"),
        (re.escape(DECODER) + r"class_embed\.(.*)", r"heads.class_head.\1"),
        (re.escape(DECODER) + r"mask_embed\.(.*)", r"heads.mask_head.\1"),
        (re.escape(DECODER) + r"_bbox_embed\.(.*)", r"heads.box_head.\1"),
        (re.escape(DECODER) + r"(?:decoder\.)?bbox_embed\.\d+\.(.*)", r"heads.box_head.\1"),
        (re.escape(DECODER) + r"(?:decoder_norm|decoder\.norm)\.(.*)", r"heads.norm.\1"),
        (re.escape(DECODER) + r"decoder\.ref_point_head\.(.*)", r"decoder.position_head.\1"),
        (re.escape(DECODER) + rf"decoder\.{LAYER}norm1\.(.*)", r"decoder.layers.\1.cross_norm.\2"),
        (re.escape(DECODER) + rf"decoder\.{LAYER}norm2\.(.*)", r"decoder.layers.\1.self_norm.\2"),
        (re.escape(DECODER) + rf"decoder\.{LAYER}norm3\.(.*)", r"decoder.layers.\1.ffn_norm.\2"),
        (re.escape(DECODER) + rf"decoder\.{LAYER}(linear[12]\..*)", r"decoder.layers.\1.ffn.\2"),
        (re.escape(DECODER) + rf"decoder\.{LAYER}(.*)", r"decoder.layers.\1.\2"),
    )
)
INPUT_PROJECTION = re.compile(re.escape(ENCODER) + r"input_proj\.(\d+)\.(.*)")
NO_WEIGHTS = re.compile(r"criterion\.empty_weight|pixel_(mean|std)")
LEVEL_WISE = re.compile(
    r"(encoder|decoder)\.layers\.\d+\.\w+_attn\.(sampling_offsets|attention_weights)\..*"
)


# What a released file decides and no tensor of it says: keys of the configuration.
EMPTY_MASKS = "MODEL.MASK_DINO.QUERY_SELECTION.EMPTY_MASKS"
LARGEST_PROPOSALS = "MODEL.MASK_DINO.QUERY_SELECTION.LARGEST_PROPOSALS"
# Other models by a tensor that each has and Mask DINO lacks. The first that matches counts: those
# above are built on those below.
FOREIGN = tuple(
    (model, re.compile(rf"(?:module\.|model\.|detr\.)*(?:{pattern})"))
    for model, pattern in (
        ("OneFormer", r"sem_seg_head\.predictor\.class_transformer\..*|task_mlp\..*"),
        ("OpenSeeD", r"sem_seg_head\.predictor\.(?:lang_encoder\..*|lang_proj)"),
        ("Mask2Former", rf"{DECODER}transformer_(?:self|cross)_attention_layers\..*"),
        ("MaskFormer", rf"{DECODER}transformer\.(?:en|de)coder\..*"),
        (
            "Deformable DETR or DINO",
            r"transformer\.(?:en|de)coder\.layers\.\d+\.(?:\w+_attn|attentions\.\d+)\."
            r"sampling_offsets\..*",
        ),
        ("DETR", r"transformer\.(?:en|de)coder\.layers\.\d+\.self_attn\.in_proj_weight"),
        ("an R-CNN or RetinaNet", r"(?:roi_heads|proposal_generator|head\.cls_subnet)\..*"),
    )
)


def refuse_foreign(names: Iterable[str], path: str) -> None:
    """Checks that the tensors of a file are not of another known model."""
    model = foreign_model(names)
    if model is not None:
        raise CheckpointError(
            f"{path} holds the weights of {model}, which no Mask DINO can take; give weights of "
            "Mask DINO, or of a backbone alone"
        )


def foreign_model(names: Iterable[str]) -> str | None:
    """The other known model whose tensors have such names, if there is one."""
    names = list(names)
    return next((model for model, pattern in FOREIGN if any(map(pattern.fullmatch, names))), None)


def is_released(names: Iterable[str]) -> bool:
    """Whether a checkpoint's tensors have released names."""
    return any(name.startswith(DECODER) for name in names)


@dataclass(frozen=True)
class ReleasedStructure:
    """What the shapes in a released file say of its model."""

    num_levels: int
    num_features: int
    coarsest_first: bool  # "high2low": the encoder's levels are in the file coarsest first

    @staticmethod
    def from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> ReleasedStructure:
        """Reads the structure; KeyError if a tensor that every released model has is missing."""
        level_embed = f"{ENCODER}transformer.level_embed"
        if level_embed not in shapes:
            raise KeyError(f"the file has released names, but no {level_embed}")
        projections = [
            shapes[f"{ENCODER}input_proj.{i}.0.weight"] for i in range(shapes[level_embed][0])
        ]
        # Further levels are 3 x 3 convolutions.
        features = [shape for shape in projections if shape[2] == 1]
        coarsest_first = len(features) > 1 and features[0][1] > features[-1][1]
        return ReleasedStructure(len(projections), len(features), coarsest_first)

    @property
    def decided(self) -> dict[str, str]:
        """Values of our configuration keys that the file decides, though no tensor of it does."""
        return decided_by(self.coarsest_first)

    def config_values(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, object]:
        """Values of our configuration keys that the shapes determine."""
        node = "MODEL.MASK_DINO."
        encoder, decoder = f"{ENCODER}transformer.encoder.layers.", f"{DECODER}decoder.layers."
        num_classes = shapes[f"{DECODER}label_enc.weight"][0]
        values: dict[str, object] = {
            f"{node}HIDDEN_DIM": shapes[f"{ENCODER}transformer.level_embed"][1],
            f"{node}NUM_CLASSES": num_classes,
            f"{node}ENCODER.NUM_LEVELS": self.num_levels,
            f"{node}ENCODER.NUM_LAYERS": _count(shapes, encoder),
            f"{node}ENCODER.FEEDFORWARD_DIM": shapes[f"{encoder}0.linear1.weight"][0],
            f"{node}DECODER.NUM_LAYERS": _count(shapes, decoder),
            f"{node}DECODER.FEEDFORWARD_DIM": shapes[f"{decoder}0.linear1.weight"][0],
            f"{node}QUERY_SELECTION.ENABLED": f"{DECODER}enc_output.weight" in shapes,
            **self.decided,
            f"{node}LOSS.CLASSIFICATION": (
                "cross_entropy"
                if shapes[f"{DECODER}class_embed.weight"][0] > num_classes
                else "focal"
            ),
        }
        learned = f"{DECODER}query_feat.weight"
        if learned in shapes:
            values[f"{node}QUERY_SELECTION.NUM_QUERIES"] = shapes[learned][0]
        return values


def decided_by(coarsest_first: bool) -> dict[str, str]:
    """What a released model does in either order of levels, as values of our configuration keys.

    All of them put the anchor of an empty mask into the corner of the image, and give the level
    that the encoder has first the largest proposals.
    """
    return {EMPTY_MASKS: "corner", LARGEST_PROPOSALS: "coarsest" if coarsest_first else "finest"}


def _count(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> int:
    return len({name[len(prefix) :].split(".")[0] for name in shapes if name.startswith(prefix)})


def our_names(names: Mapping[str, object], structure: ReleasedStructure) -> dict[str, str]:
    """Our name of each released tensor that is a weight; several may share one name."""
    backbone = [name.removeprefix("backbone.") for name in names if name.startswith("backbone.")]
    swin = any(name.startswith("patch_embed.") for name in backbone)
    backbone_names = swin_rules(backbone) if swin else {}
    ours, unknown = {}, []
    for name in names:
        if NO_WEIGHTS.fullmatch(name):
            continue
        if name.startswith("backbone."):
            inner = name.removeprefix("backbone.")
            if not (swin and is_unused_in_swin(inner)):
                ours[name] = f"backbone.{backbone_names.get(inner, inner)}"
        elif (found := INPUT_PROJECTION.fullmatch(name)) is not None:
            ours[name] = f"encoder.input_proj.{_projection(int(found[1]), structure)}.{found[2]}"
        elif (renamed := _renamed(name)) is not None:
            ours[name] = renamed
        else:
            unknown.append(name)
    if unknown:
        raise KeyError(
            f"no place in Mask DINO for {counted(len(unknown), 'tensor')}: "
            f"{', '.join(sorted(unknown)[:8])} ..."
        )
    return ours


def _renamed(name: str) -> str | None:
    for pattern, ours in RENAMES:
        if pattern.fullmatch(name):
            return pattern.sub(ours, name)
    return None


def _projection(index: int, structure: ReleasedStructure) -> int:
    """`input_proj` begins with the coarsest feature or the finest; extra levels come last."""
    if structure.coarsest_first and index < structure.num_features:
        return structure.num_features - 1 - index
    return index


def convert_weights(state: Mapping[str, Tensor], num_heads: int) -> dict[str, Tensor]:
    """Tensors of a released checkpoint under our names, levels finest first.

    Args:
        state: tensors by released name.
        num_heads: attention heads of the encoder, which no shape tells; another number than the
            file's would put levels in a wrong order without notice.

    Raises:
        KeyError: a tensor has no place.
        ValueError: tensors that are one module in this project differ from each other.
    """
    structure = ReleasedStructure.from_shapes(shapes_of(state))
    converted: dict[str, Tensor] = {}
    for name, ours in our_names(state, structure).items():
        tensor = _finest_first(ours, state[name], structure, num_heads)
        if ours in converted and not torch.equal(converted[ours], tensor):
            raise ValueError(
                f"{name} differs from the other copies of {ours}, which all layers must share"
            )
        converted[ours] = tensor
    return converted


def _finest_first(
    ours: str, tensor: Tensor, structure: ReleasedStructure, encoder_heads: int
) -> Tensor:
    """Reverses levels: in the encoder of coarsest-first models, in the decoder of the others."""
    if ours == "encoder.level_embed":
        return tensor.flip(0) if structure.coarsest_first else tensor
    found = LEVEL_WISE.fullmatch(ours)
    if found is None or structure.coarsest_first != (found[1] == "encoder"):
        return tensor
    heads = encoder_heads if found[1] == "encoder" else DECODER_HEADS
    by_level = tensor.reshape(heads, structure.num_levels, -1)
    return by_level.flip(1).reshape(tensor.shape)

"""The model agrees with a slow second writing of itself, over options that no worked case has.

The slow model (`tests/slow`) is first held to the worked cases of the released models; then it says
what variants of them must compute, and `tools/check_parity.py` compares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.conftest import load_module
from tests.slow.variants import SlowCase, Variant, make_case, read_config, weights_of

# Without noise the initial prediction of a denoising query is its box: the loss is rounding alone.
ONLY_ROUNDING = {"loss/loss_bbox_dn_0", "loss/loss_giou_dn_0"}
ROUNDING = 1e-6

PANOPTIC = {
    "SEM_SEG_HEAD.NUM_CLASSES": 133,
    "MaskDINO.TEST.PANOPTIC_ON": True,
    "MaskDINO.TEST.SEMANTIC_ON": True,
    "MaskDINO.TEST.OBJECT_MASK_THRESHOLD": 0.25,
    "MaskDINO.PANO_BOX_LOSS": True,
}
HIGH2LOW = {"SEM_SEG_HEAD.FEATURE_ORDER": "high2low"}
LOW2HIGH = {"SEM_SEG_HEAD.FEATURE_ORDER": "low2high"}
LEARNED = {"MaskDINO.TWO_STAGE": False, "MaskDINO.INITIALIZE_BOX_TYPE": "no"}
LEVELS = "SEM_SEG_HEAD.TOTAL_NUM_FEATURE_LEVELS"
ANCHORS = "MaskDINO.INITIALIZE_BOX_TYPE"

COCO_PANOPTIC = Variant(
    "coco_panoptic",
    "instance",
    PANOPTIC | {ANCHORS: "no"},
    labels=((5, 100, 3), (120, 0, 7, 120, 90)),
    things=tuple(range(80)),
    dataset="coco_2017_train_panoptic",
)
MIXED_PANOPTIC = Variant(
    "stuff_only_image_standard_denoising_3_levels_bitmask",
    "instance",
    PANOPTIC
    | HIGH2LOW
    | {
        LEVELS: 3,
        ANCHORS: "bitmask",
        "MaskDINO.DN": "standard",
        "MaskDINO.TEST.OVERLAP_THRESHOLD": 0.3,
    },
    labels=((4, 100, 32), (121, 2, 8, 121, 91)),
    things=tuple(label for label in range(133) if label % 4),
    dataset="slow_model_every_fourth_class_is_stuff",
)
NO_THING = Variant(
    "no_thing_found_no_denoising_last_layer_alone",
    "instance",
    PANOPTIC | {"MaskDINO.DN": "no", "MaskDINO.DEEP_SUPERVISION": False},
    labels=((100, 101, 102), (132, 131, 130, 129, 128)),
    things=(0,),
    dataset="slow_model_class_0_is_thing",
)
VARIANTS = (
    COCO_PANOPTIC,
    MIXED_PANOPTIC,
    NO_THING,
    Variant(
        "high2low_4_levels_score_of_the_box_alone_one_image_without_objects",
        "instance",
        HIGH2LOW | {"MaskDINO.TEST.TEST_FOUCUS_ON_BOX": True},
        labels=((), (1, 17, 3)),
    ),
    Variant(
        "learned_queries_focal_semantic_no_initial_prediction_size_no_multiple_of_32",
        "instance",
        LEARNED
        | {
            "MaskDINO.INITIAL_PRED": False,
            "MaskDINO.TEST.SEMANTIC_ON": True,
            "MaskDINO.TEST.INSTANCE_ON": False,
        },
        size=(90, 150),
    ),
    Variant(
        "swin_5_levels_anchors_of_boxes_one_object_no_initial_prediction",
        "swin",
        {ANCHORS: "no", "MaskDINO.INITIAL_PRED": False},
        labels=((7,), ()),
        size=(90, 120),
    ),
    Variant(
        "encoder_of_4_heads_no_mask_loss_one_group_of_denoising",
        "instance",
        {"MaskDINO.NHEADS": 4, "MaskDINO.MASK_WEIGHT": 0.0, "MaskDINO.DN_NUM": 4},
    ),
    Variant(
        "cross_entropy_resize_before_sum_one_object_no_denoising",
        "semantic_ce",
        {"MaskDINO.TEST.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE": True, "MaskDINO.DN": "no"},
        labels=((42,), ()),
        size=(100, 130),
    ),
)
EXOTIC = (
    Variant("no_objects_at_all", "instance", labels=((), ())),
    Variant(
        "high2low_encoder_of_4_heads_standard_denoising",
        "instance",
        HIGH2LOW | {"MaskDINO.NHEADS": 4, "MaskDINO.DN": "standard"},
    ),
    Variant(
        "more_queries_than_tokens_some_at_the_border",
        "instance",
        HIGH2LOW | {LEVELS: 3, ANCHORS: "no", "MaskDINO.NUM_OBJECT_QUERIES": 300},
        size=(32, 416),
    ),
    Variant(
        "swin_5_levels_high2low_every_token_a_query",
        "swin",
        HIGH2LOW | {"MaskDINO.NUM_OBJECT_QUERIES": 599},
        size=(32, 224),
    ),
    Variant(
        "cross_entropy_with_query_selection_low2high_4_levels",
        "semantic_ce",
        LOW2HIGH | {LEVELS: 4, "MaskDINO.TWO_STAGE": True, "MaskDINO.DEEP_SUPERVISION": False},
    ),
)


@pytest.fixture(scope="module")
def tool(repository: Path) -> ModuleType:
    path = repository / "tools" / "check_parity.py"
    return load_module(path)


@pytest.fixture(scope="module")
def made(parity: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Variant], Path]:
    """Folder of a variant's case, made once."""
    folders: dict[str, Path] = {}

    def folder_of(variant: Variant) -> Path:
        if variant.name not in folders:
            folder = tmp_path_factory.mktemp("case")
            make_case(variant, parity, folder)
            folders[variant.name] = folder
        return folders[variant.name]

    return folder_of


@pytest.fixture(scope="module")
def opened(tool: ModuleType, made: Callable[[Variant], Path]) -> Callable[[Variant], object]:
    """Opens a variant's case; pixels that hang on rounding are not compared."""

    class DecidedCase(tool.Case):
        def __init__(self, folder: Path) -> None:
            super().__init__(folder, "variant")
            self.undecided = dict(np.load(folder / "variant_undecided.npz"))

        def results(self) -> Iterator[tuple[str, Tensor]]:
            for name, value in super().results():
                if name in self.undecided:
                    undecided = torch.from_numpy(self.undecided[name])
                    assert undecided.float().mean() < 1e-3, name
                    expected = torch.from_numpy(self.expected[name])
                    value = torch.where(undecided, expected, value)
                yield name, value

    return lambda variant: DecidedCase(made(variant))


def beyond(tool: ModuleType, case: object) -> dict[str, float]:
    """Quantities that differ by more than their bound, and their errors."""
    found = {}
    for name, error, bound in tool.compare(case):
        if name in ONLY_ROUNDING and abs(case.expected[name]) < 1e-3:
            error, bound = error * max(abs(case.expected[name]), 1e-6), ROUNDING
        if not error <= bound:
            found[name] = error
    return found


@pytest.mark.parametrize("name", ["instance", "semantic_ce", "swin"])
def test_slow_model_agrees_with_the_released_one(name: str, tool: ModuleType, parity: Path) -> None:
    config = read_config(parity / f"{name}_config.yaml")
    inputs = dict(np.load(parity / f"{name}_inputs.npz"))
    is_thing = [True] * config["MODEL"]["SEM_SEG_HEAD"]["NUM_CLASSES"]
    slow = SlowCase(config, weights_of(parity, name), inputs, is_thing).expected()
    released = dict(np.load(parity / f"{name}_expected.npz"))
    for image in range(2):
        tool.align_instances(slow, released, image)
    assert {name for name in released if not name.endswith("argmax_hist")} <= slow.keys()
    for quantity, value in slow.items():
        expected = released[quantity]
        error = tool.relative_error(tool.pooled(value, expected), expected)
        bound = 1e-3 if quantity.startswith("grad_norm/") else 1e-4
        rounding = quantity in ONLY_ROUNDING and abs(value - expected) <= ROUNDING
        assert error <= bound or rounding, quantity


@pytest.mark.parametrize(
    "variant",
    [
        *(pytest.param(variant, id=variant.name) for variant in VARIANTS),
        *(pytest.param(variant, id=variant.name, marks=pytest.mark.slow) for variant in EXOTIC),
    ],
)
def test_variant_agrees(
    variant: Variant, tool: ModuleType, opened: Callable[[Variant], object]
) -> None:
    case = opened(variant)
    assert not beyond(tool, case)
    groups = {name.split("/")[0] for name in case.expected}
    assert groups == {"eval", "result", "loss", "grad_norm"}


def test_panoptic_variants_hold_what_they_are_for(made: Callable[[Variant], Path]) -> None:
    """Found things, found stuff, and images where no thing is found."""

    def found(variant: Variant) -> tuple[set[bool], list[int]]:
        expected = np.load(made(variant) / "variant_expected.npz")
        labels = set(expected["eval/pred_logits"].argmax(-1).flatten().tolist())
        instances = [len(expected[f"result/{i}/instances/scores"]) for i in range(2)]
        return {label in variant.things for label in labels}, instances

    assert found(MIXED_PANOPTIC)[0] == {True, False}
    assert found(NO_THING) == ({False}, [0, 0])
    assert min(found(COCO_PANOPTIC)[1]) > 0


def test_other_weights_are_noticed(tool: ModuleType, opened: Callable[[Variant], object]) -> None:
    case = opened(COCO_PANOPTIC)
    with torch.no_grad():
        case.model.decoder.layers[1].ffn.linear1.weight[0] += 0.1
    found = beyond(tool, case)
    assert {"eval/pred_masks", "loss/loss_dice_2", "loss/loss_dice_dn"} <= found.keys()
    assert not {"eval/interm_logits", "loss/loss_ce_interm", "loss/loss_ce_1"} & found.keys()


def test_reversed_anchor_sizes_are_noticed(
    tool: ModuleType, opened: Callable[[Variant], object]
) -> None:
    case = opened(COCO_PANOPTIC)
    selection = case.model.query_selection
    selection.coarsest_largest = not selection.coarsest_largest
    found = beyond(tool, case)
    assert {"eval/interm_boxes", "eval/pred_boxes", "loss/loss_bbox_interm"} <= found.keys()
    assert "eval/interm_logits" not in found


def test_other_things_are_noticed(tool: ModuleType, opened: Callable[[Variant], object]) -> None:
    case = opened(MIXED_PANOPTIC)
    case.model.is_thing = ~case.model.is_thing
    found = beyond(tool, case)
    assert {"loss/loss_bbox", "loss/loss_giou_dn_1"} <= found.keys()
    assert "loss/loss_ce" not in found


def test_unknown_options_are_refused(parity: Path, tmp_path: Path) -> None:
    variant = replace(COCO_PANOPTIC, options={"MaskDINO.SOMETHING": 1})
    with pytest.raises(KeyError, match="no option MODEL.MaskDINO.SOMETHING"):
        make_case(variant, parity, tmp_path)

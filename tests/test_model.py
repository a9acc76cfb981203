"""The whole model, narrow: ablations train and infer; batches, sizes, precision, bad input."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import Tensor

from maskdino.model import MaskDINO
from tests.helpers import NUM_CLASSES, drawn_batch, drawn_instances, tiny_model

SIZE = (64, 96)


def train_once(model: MaskDINO, batch: list[dict]) -> dict[str, Tensor]:
    """One forward and backward pass, checked to be finite."""
    losses = model.train()(batch)
    assert losses and all(loss.ndim == 0 and loss.isfinite() for loss in losses.values()), losses
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.isfinite().all(), name
    return losses


def infer(model: MaskDINO, batch: list[dict]) -> list[dict]:
    with torch.inference_mode():
        return model.eval()(batch)


def terms(losses: dict[str, Tensor]) -> set[str]:
    """Names of losses of the last layer."""
    outputs = ("_layer", "_initial", "_proposal", "_denoising")
    return {name for name in losses if not any(part in name for part in outputs)}


ABLATIONS = [
    {},
    {"MASK_ON": False},
    {"ENCODER__IN_FEATURES": ["res5"], "ENCODER__NUM_LEVELS": 1},
    {"ENCODER__NUM_LEVELS": 3},
    {"ENCODER__IN_FEATURES": ["res2", "res3", "res4", "res5"], "ENCODER__NUM_LEVELS": 5},
    {"RECOMPUTE": "cheap"},
    {"RECOMPUTE": "all"},
    {"ENCODER__NUM_POINTS": 2, "ENCODER__NUM_HEADS": 4},
    {"DECODER__NUM_POINTS": 2, "DECODER__NUM_HEADS": 4},
    {"DECODER__NUM_LAYERS": 1},
    {"PIXEL_EMBEDDING__IN_FEATURE": "res3"},
    {"SIZE_DIVISIBILITY": 64},
    {"QUERY_SELECTION__ENABLED": False},
    {"QUERY_SELECTION__MASK_ENHANCED_ANCHORS": "bitmask"},
    {"QUERY_SELECTION__MASK_ENHANCED_ANCHORS": "none"},
    {"QUERY_SELECTION__LARGEST_PROPOSALS": "finest"},
    {"QUERY_SELECTION__NUM_QUERIES": 500},  # more than tokens
    {"DENOISING__MODE": "boxes"},
    {"DENOISING__MODE": "off"},
    {"DENOISING__NUM_QUERIES": 1},  # fewer than objects
    {"DENOISING__LABEL_NOISE": 0.0, "DENOISING__BOX_NOISE": 1.0},
    {"MATCHER__CLASS_WEIGHT": 0.0},
    {"MATCHER__L1_WEIGHT": 0.0, "MATCHER__GIOU_WEIGHT": 0.0},
    {"MATCHER__MASK_BCE_WEIGHT": 0.0, "MATCHER__MASK_DICE_WEIGHT": 0.0},
    {"MATCHER__DECOUPLE_STUFF_BOXES": False, "LOSS__DECOUPLE_STUFF_BOXES": False},
    {"LOSS__L1_WEIGHT": 0.0, "LOSS__GIOU_WEIGHT": 0.0},
    {"LOSS__MASK_BCE_WEIGHT": 0.0, "LOSS__MASK_DICE_WEIGHT": 0.0},
    {"LOSS__CLASSIFICATION": "cross_entropy", "LOSS__NO_OBJECT_WEIGHT": 0.2},
    {"LOSS__CLASSIFICATION": "cross_entropy", "QUERY_SELECTION__ENABLED": False},
    {"LOSS__DEEP_SUPERVISION": False},
    {"LOSS__SUPERVISE_INITIAL": False},
    {"LOSS__SUPERVISE_INITIAL": False, "LOSS__DEEP_SUPERVISION": False, "MASK_ON": False},
    {"LOSS__OVERSAMPLE_RATIO": 1.0, "LOSS__IMPORTANCE_RATIO": 0.0},
    {"TEST__DECODER_LAYER": 0},
    {"TEST__DECODER_LAYER": 1},
    {"TEST__SCORE_THRESHOLD": 1.1},
    {"TEST__MASK_SCORING": False},
    {"TEST__PANOPTIC_ON": True, "TEST__PANOPTIC_SCORE_THRESHOLD": 0.0},
    {"TEST__PANOPTIC_ON": True, "TEST__PANOPTIC_SCORE_THRESHOLD": 1.0},
    {"TEST__SEMANTIC_ON": True, "TEST__TEMPERATURE": 1.0},
    {"TEST__SEMANTIC_ON": True, "TEST__INSTANCE_ON": False},
]


@pytest.mark.parametrize("overrides", ABLATIONS, ids=lambda x: ",".join(f"{k}={x[k]}" for k in x))
def test_every_ablation_trains_and_infers(overrides: dict[str, object]) -> None:
    model = tiny_model(**overrides)
    batch = drawn_batch([SIZE, (50, 40)], [3, 1])
    train_once(model, batch)
    batch[1] |= {"height": 25, "width": 33}
    for result, size in zip(infer(model, batch), [SIZE, (25, 33)], strict=True):
        asked = model.inference
        assert set(result) == {
            name
            for name, on in (
                ("instances", asked.instance_on),
                ("panoptic_seg", asked.panoptic_on),
                ("sem_seg", asked.semantic_on),
            )
            if on
        }
        if asked.instance_on:
            found = result["instances"]
            assert found.image_size == size and found.scores.isfinite().all()
            assert found.has("pred_masks") == (model.pixel_embedding is not None)
            assert len(found) == 0 if asked.score_threshold > 1 else len(found) > 0
        if asked.panoptic_on:
            assert result["panoptic_seg"][0].shape == size
        if asked.semantic_on:
            assert result["sem_seg"].shape == (NUM_CLASSES, *size)


def test_names_of_losses() -> None:
    batch = drawn_batch([SIZE], [2])
    boxes, masks = {"loss_class", "loss_l1", "loss_giou"}, {"loss_mask_bce", "loss_mask_dice"}
    losses = train_once(tiny_model(), batch)
    suffixes = ["", "_layer1", "_initial", "_proposal"]
    noised = ["_denoising", "_denoising_layer1", "_denoising_initial"]
    assert set(losses) == {f"{t}{s}" for t in boxes | masks for s in (*suffixes, *noised)}
    losses = train_once(tiny_model(QUERY_SELECTION__ENABLED=False), batch)
    suffixes, noised = ["", "_layer1", "_initial"], ["_denoising", "_denoising_layer1"]
    assert set(losses) == {f"{t}{s}" for t in boxes | masks for s in (*suffixes, *noised)}
    losses = train_once(tiny_model(DENOISING__MODE="boxes"), batch)
    assert {n for n in losses if n.endswith("_denoising")} == {f"{t}_denoising" for t in boxes}
    assert terms(losses) == boxes | masks
    assert terms(train_once(tiny_model(MASK_ON=False), batch)) == boxes


NO_CLASS_LOSS = {"LOSS__CLASS_WEIGHT": 0.0}
NO_BOX_LOSS = {"LOSS__L1_WEIGHT": 0.0, "LOSS__GIOU_WEIGHT": 0.0}
NO_MASK_LOSS = {"LOSS__MASK_BCE_WEIGHT": 0.0, "LOSS__MASK_DICE_WEIGHT": 0.0}


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"QUERY_SELECTION__ENABLED": False},
        {"MASK_ON": False},
        NO_CLASS_LOSS,
        NO_BOX_LOSS,
        NO_BOX_LOSS | {"QUERY_SELECTION__ENABLED": False, "DENOISING__MODE": "off"},
        NO_MASK_LOSS,
        NO_CLASS_LOSS | NO_MASK_LOSS,
    ],
    ids=lambda x: ",".join(f"{k}={x[k]}" for k in x) or "all",
)
@pytest.mark.parametrize("counts", [(2, 3), (0, 0)])
def test_every_parameter_gets_a_gradient(
    overrides: dict[str, object], counts: tuple[int, int]
) -> None:
    """Also in a batch without objects, so that several processes never wait for each other."""
    model = tiny_model(**overrides)
    train_once(model, drawn_batch([SIZE, SIZE], counts))
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without


@pytest.mark.parametrize(
    ("overrides", "frozen", "message"),
    [
        ({}, (), ""),
        ({"LOSS__L1_WEIGHT": 0.0, "LOSS__MASK_DICE_WEIGHT": 0.0}, (), ""),
        (NO_CLASS_LOSS, ("heads.class_head.",), "the class head"),
        (NO_BOX_LOSS, ("heads.box_head.",), "the box head"),
        (NO_BOX_LOSS | {"MASK_ON": False}, ("heads.box_head.",), "the box head"),
        (NO_MASK_LOSS, ("heads.mask_head.", "pixel_embedding."), "the mask head and pixel emb"),
    ],
)
def test_heads_without_a_loss_are_frozen(
    overrides: dict[str, object],
    frozen: tuple[str, ...],
    message: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, "maskdino"):
        model = tiny_model(**overrides)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != name.startswith(frozen), name
    said = [text for text in caplog.messages if text.startswith("Frozen")]
    assert len(said) == bool(frozen) and message in "".join(said)


@pytest.mark.parametrize("masks", [False, True])
def test_images_with_and_without_masks_mix(masks: bool) -> None:
    model = tiny_model()
    batch = drawn_batch([SIZE, SIZE], [2, 2])
    batch[0]["instances"] = drawn_instances(SIZE, 2, masks=False)
    if not masks:
        batch = batch[:1]
        batch[0]["instances"].gt_has_mask = torch.zeros(2, dtype=torch.bool)
    losses = train_once(model, batch)
    assert (losses["loss_mask_bce"] > 0) == masks


def test_masks_that_were_not_read_end_the_training_instead_of_losses_of_zero() -> None:
    batch = drawn_batch([SIZE, SIZE], [2, 0], masks=False)
    message = r"drawn_0\.png, drawn_1\.png have no gt_masks.* MODEL\.MASK_ON"
    with pytest.raises(ValueError, match=message):
        tiny_model()(batch)
    for overrides in ({"MASK_ON": False}, NO_MASK_LOSS):
        train_once(tiny_model(**overrides), batch)
    train_once(tiny_model(), drawn_batch([SIZE], [0], masks=False))


def test_images_without_instances_are_named() -> None:
    batch = drawn_batch([SIZE, SIZE], [2, 0])
    del batch[1]["instances"]
    with pytest.raises(ValueError, match=r"^images drawn_1\.png have no 'instances' to learn: det"):
        tiny_model()(batch)


def test_a_thousand_objects_of_one_pixel() -> None:
    batch = drawn_batch([SIZE], [1000])
    boxes = batch[0]["instances"].gt_boxes.tensor
    boxes[:, 2:] = boxes[:, :2] + 1
    train_once(tiny_model(), batch)


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (31, 200), (20, 20)])
def test_images_smaller_than_the_stride(size: tuple[int, int]) -> None:
    model = tiny_model()
    batch = drawn_batch([size], [1])
    train_once(model, batch)
    assert infer(model, batch)[0]["instances"].pred_masks.shape[1:] == size


@pytest.mark.parametrize(
    "overrides", [{"TEST__PANOPTIC_ON": True, "TEST__SEMANTIC_ON": True}, {"MASK_ON": False}]
)
def test_batches_give_what_single_images_give(overrides: dict[str, object]) -> None:
    model = tiny_model(TEST__PANOPTIC_SCORE_THRESHOLD=0.0, **overrides)
    batch = drawn_batch([SIZE] * 3, [0, 0, 0])
    for i, together in enumerate(infer(model, batch)):
        alone = infer(model, batch[i : i + 1])[0]
        a, b = together["instances"], alone["instances"]
        torch.testing.assert_close(a.scores, b.scores, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            a.pred_boxes.tensor.sum(0), b.pred_boxes.tensor.sum(0), atol=0.5, rtol=1e-3
        )
        if "sem_seg" in together:
            torch.testing.assert_close(together["sem_seg"], alone["sem_seg"], atol=1e-3, rtol=1e-3)
            differ = together["panoptic_seg"][0] != alone["panoptic_seg"][0]
            assert differ.float().mean() < 0.01


def test_results_follow_the_size_that_is_asked_for() -> None:
    model = tiny_model()
    image = drawn_batch([(40, 50)], [0])
    plain = infer(model, image)[0]["instances"]
    larger = infer(model, [image[0] | {"height": 80, "width": 100}])[0]["instances"]
    torch.testing.assert_close(plain.pred_boxes.tensor * 2, larger.pred_boxes.tensor)


def test_the_decoder_layer_of_the_test() -> None:
    """Layer 0 is the initial prediction; the last layer is number NUM_LAYERS, or -1."""
    models = {layer: tiny_model(TEST__DECODER_LAYER=layer) for layer in (-1, 0, 1, 2)}
    torch.nn.init.normal_(models[-1].heads.box_head.layers[-1].weight, std=0.3)
    state = models[-1].state_dict()
    images = torch.randn(1, 3, 64, 64)
    boxes = {}
    with torch.no_grad():
        for layer, model in models.items():
            model.load_state_dict(state)
            boxes[layer] = model.eval().predict(images)[0].boxes
    assert torch.equal(boxes[-1], boxes[2])
    assert not torch.allclose(boxes[0], boxes[1]) and not torch.allclose(boxes[1], boxes[2])
    with pytest.raises(ValueError, match="DECODER_LAYER is 3; it must be -1 to 2"):
        tiny_model(TEST__DECODER_LAYER=3)


def test_training_after_inference_mode() -> None:
    """What inference mode cached may take part in gradients."""
    model = tiny_model()
    batch = drawn_batch([(96, 160)], [2])
    infer(model, batch)
    train_once(model, batch)


def test_one_step_in_bfloat16() -> None:
    model = tiny_model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model.train()(drawn_batch([SIZE, SIZE], [2, 0]))
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} is not trained in mixed precision"
        assert parameter.grad.isfinite().all(), name
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = infer(model, drawn_batch([SIZE], [0]))[0]["instances"]
    assert found.scores.isfinite().all() and found.pred_boxes.tensor.dtype == torch.float32


def test_losses_fall() -> None:
    """A few steps on one image: the whole chain learns something."""
    model = tiny_model(DENOISING__MODE="off")
    batch = drawn_batch([SIZE], [2])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    totals = []
    for _ in range(12):
        losses = train_once(model, batch)
        totals.append(sum(losses.values()).item())
        optimizer.step()
        optimizer.zero_grad()
    assert min(totals[-3:]) < 0.8 * totals[0]


def test_inputs_are_not_modified() -> None:
    model, batch = tiny_model(), drawn_batch([SIZE], [2])
    before = copy.deepcopy(batch)
    train_once(model, batch)
    infer(model, batch)
    assert torch.equal(batch[0]["image"], before[0]["image"])
    for field in ("gt_boxes", "gt_masks"):
        a, b = (getattr(x[0]["instances"], field) for x in (batch, before))
        kind = "tensor" if field == "gt_boxes" else "bits"
        assert torch.equal(getattr(a, kind), getattr(b, kind))


def test_labels_outside_the_classes_name_the_image() -> None:
    batch = drawn_batch([SIZE, SIZE], [2, 2])
    batch[1]["instances"].gt_classes[0] = NUM_CLASSES
    with pytest.raises(ValueError, match=r"drawn_1\.png has an object of class 5;.*NUM_CLASSES"):
        tiny_model().train()(batch)


def test_not_a_number_names_the_image_and_does_not_crash(
    caplog: pytest.LogCaptureFixture,
) -> None:
    batch = drawn_batch([SIZE, SIZE], [2, 2])
    batch[1]["image"][0, 3, 4] = float("nan")
    with caplog.at_level(logging.WARNING):
        losses = tiny_model().train()(batch)
    assert "drawn_1.png are not finite" in caplog.text and "drawn_0.png" not in caplog.text
    assert not all(loss.isfinite() for loss in losses.values())  # for the trainer to refuse


def test_state_dict_has_one_name_for_each_parameter() -> None:
    model = tiny_model()
    state = model.state_dict(keep_vars=True)
    parameters = [x for x in state.values() if isinstance(x, torch.nn.Parameter)]
    assert len({id(x) for x in parameters}) == len(parameters)
    assert not any(name.startswith(("pixel_mean", "is_thing", "criterion")) for name in state)


def test_masks_can_be_resized_before_class_maps_are_summed_up() -> None:
    image = drawn_batch([SIZE], [1])[0] | {"height": 2 * SIZE[0], "width": 3 * SIZE[1]}
    maps = []
    for instance_on, before in ((False, False), (False, True), (True, False)):
        torch.manual_seed(0)
        tests = {"TEST__SEMANTIC_ON": True, "TEST__INSTANCE_ON": instance_on}
        model = tiny_model(**tests, TEST__RESIZE_BEFORE_SUM=before).eval()
        maps.append(model([image])[0]["sem_seg"])
    assert (maps[1] - maps[0]).abs().amax() > 1e-4
    torch.testing.assert_close(maps[1], maps[2])

"""The adapter from timm to detectron2: outputs, options, errors."""

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_model
from torch import Tensor, nn

from maskdino.backbones import TimmBackbone, build_backbone
from maskdino.config import add_maskdino_config, load_config

TINY_SWIN = {"embed_dim": 12, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 3, 4]}
SWIN = "swin_tiny_patch4_window7_224"


def configuration(name: str, **options: Any) -> CfgNode:
    """A configuration of this backbone, nothing frozen, with `options` of MODEL.TIMM."""
    cfg = get_cfg()
    add_maskdino_config(cfg)
    cfg.MODEL.BACKBONE.NAME = name
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    for key, value in options.items():
        cfg.MODEL.TIMM[key] = CfgNode(value) if isinstance(value, dict) else value
    return cfg


def pyramid(backbone: Backbone, images: Tensor) -> dict[str, Tensor]:
    """Outputs for images (B, 3, H, W), multiples of 32, checked against `output_shape`."""
    outputs = backbone(images)
    shapes = backbone.output_shape()
    assert list(outputs) == list(shapes)
    for name, output in outputs.items():
        stride = shapes[name].stride
        size = (images.shape[2] // stride, images.shape[3] // stride)
        assert output.shape == (len(images), shapes[name].channels, *size), name
    return outputs


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "convnext_atto",
        "efficientnet_b0",
        "regnety_002",
        "dla34",
        SWIN,
        "swinv2_tiny_window8_256",
    ],
)
def test_pyramid_of_many_families(name: str) -> None:
    arguments = TINY_SWIN if name.startswith("swin") else {}
    backbone = build_backbone(configuration(name, ARGS=arguments)).eval()
    with torch.no_grad():
        outputs = pyramid(backbone, torch.randn(1, 3, 64, 96))
    assert [backbone.output_shape()[f].stride for f in outputs] == [4, 8, 16, 32]
    assert list(outputs) == ["res2", "res3", "res4", "res5"]
    assert backbone.size_divisibility == 32


def test_detectron2_resnet_is_left_to_detectron2() -> None:
    cfg = configuration("build_resnet_backbone")
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res5"]
    backbone = build_backbone(cfg)
    assert not isinstance(backbone, TimmBackbone)
    assert list(backbone.output_shape()) == ["res2", "res5"]


def test_registered_for_plain_detectron2_models() -> None:
    class Detector(nn.Module):
        def __init__(self, cfg: CfgNode) -> None:
            super().__init__()
            from detectron2.modeling import build_backbone as detectron2_build_backbone

            self.backbone = detectron2_build_backbone(cfg)

    META_ARCH_REGISTRY._do_register("BackboneTestDetector", Detector)
    cfg = configuration("build_timm_backbone", NAME="resnet18")
    cfg.MODEL.META_ARCHITECTURE = "BackboneTestDetector"
    cfg.MODEL.DEVICE = "cpu"
    try:
        model = build_model(cfg)
    finally:
        META_ARCH_REGISTRY._obj_map.pop("BackboneTestDetector")
    assert model.backbone.output_shape()["res5"].channels == 512


def test_outputs_can_be_chosen_in_any_order_and_channels_follow_the_images() -> None:
    cfg = configuration("resnet18", OUT_FEATURES=["res5", "res3"])
    cfg.MODEL.PIXEL_MEAN = [0.0]
    backbone = build_backbone(cfg).eval()
    outputs = pyramid(backbone, torch.randn(2, 1, 64, 64))
    assert {f: o.shape[1] for f, o in outputs.items()} == {"res3": 128, "res5": 512}


@pytest.mark.parametrize("name", [SWIN, "convnext_atto"])
def test_output_norm_normalises_every_pixel(name: str) -> None:
    arguments = TINY_SWIN if name == SWIN else {}
    plain = build_backbone(configuration(name, ARGS=arguments)).eval()
    normed = build_backbone(configuration(name, ARGS=arguments, OUTPUT_NORM=True)).eval()
    normed.body.load_state_dict(plain.body.state_dict())
    images = torch.randn(2, 3, 64, 96)
    expected = pyramid(plain, images)
    for feature, output in pyramid(normed, images).items():
        mean = expected[feature].mean(dim=1, keepdim=True)
        std = expected[feature].var(dim=1, keepdim=True, unbiased=False).add(1e-5).sqrt()
        torch.testing.assert_close(output, (expected[feature] - mean) / std, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto", SWIN, "mobilenetv2_035"])
def test_checkpointing_changes_no_gradient(name: str) -> None:
    arguments = TINY_SWIN if name == SWIN else {}
    plain = build_backbone(configuration(name, ARGS=arguments)).train()
    recomputing = build_backbone(configuration(name, ARGS=arguments, ACTIVATION_CHECKPOINT=True))
    recomputing.load_state_dict(plain.state_dict())
    recomputing.train()
    images = torch.randn(2, 3, 64, 64)
    with torch.autograd.graph.saved_tensors_hooks(_counter := _Counter(), _identity):
        for backbone in (plain, recomputing):
            _counter.start()
            outputs = backbone(images)
            sum(output.square().mean() for output in outputs.values()).backward()
    assert _counter.counts[1] < _counter.counts[0]
    for (key, ours), theirs in zip(recomputing.named_parameters(), plain.parameters(), strict=True):
        if theirs.grad is None:
            assert ours.grad is None, key
        else:
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4)


class _Counter:
    """Counts the tensors that autograd keeps for the backward pass, run by run."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def start(self) -> None:
        self.counts.append(0)

    def __call__(self, tensor: Tensor) -> Tensor:
        self.counts[-1] += 1
        return tensor


def _identity(tensor: Tensor) -> Tensor:
    return tensor


@pytest.mark.parametrize(
    ("name", "freeze_at", "first_trained"),
    [
        ("resnet10t", 0, "body.conv1."),
        ("resnet10t", 1, "body.layer1."),
        ("resnet10t", 2, "body.layer2."),
        ("resnet10t", 5, None),
        ("convnext_atto", 1, "body.stages_0."),
        ("convnext_atto", 3, "body.stages_2."),
        (SWIN, 1, "body.layers_0."),
        (SWIN, 2, "body.layers_1."),
        ("mobilenetv2_035", 1, "body.blocks.1."),  # blocks.0 has stride 2
        ("mobilenetv2_035", 2, "body.blocks.2."),
    ],
)
def test_freezing_counts_stages_like_detectron2(
    name: str, freeze_at: int, first_trained: str | None
) -> None:
    cfg = configuration(name, BATCH_NORM="BN", ARGS=TINY_SWIN if name == SWIN else {})
    cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
    backbone = build_backbone(cfg).train()
    names = [key for key, _ in backbone.named_parameters()]
    trained = [key for key, p in backbone.named_parameters() if p.requires_grad]
    if first_trained is None:
        assert trained == []
        return
    assert trained[0].startswith(first_trained)
    assert trained == names[names.index(trained[0]) :]  # all that follows is trained

    before = copy.deepcopy(backbone.state_dict())
    sum(output.mean() for output in backbone(torch.randn(2, 3, 32, 32)).values()).backward()
    after = backbone.state_dict()
    moved = [key for key in before if "running_" in key and not after[key].equal(before[key])]
    assert all(key.rpartition(".")[0] + ".weight" in trained for key in moved)
    assert bool(moved) == any("running_" in key for key in before)


@pytest.mark.parametrize("batch_norm", ["FrozenBN", "BN"])
def test_batch_norm_statistics(batch_norm: str) -> None:
    backbone = build_backbone(configuration("mobilenetv2_035", BATCH_NORM=batch_norm)).train()
    before = copy.deepcopy(backbone.state_dict())
    backbone(torch.randn(2, 3, 64, 64))
    moved = any(
        not value.equal(before[key])
        for key, value in backbone.state_dict().items()
        if key.endswith("running_mean")
    )
    assert moved == (batch_norm == "BN")


def test_synchronised_batch_norm() -> None:
    backbone = build_backbone(configuration("resnet18", BATCH_NORM="SyncBN"))
    kinds = {type(module) for module in backbone.modules()}
    assert nn.SyncBatchNorm in kinds
    assert nn.BatchNorm2d not in kinds


def test_drop_path_rises_to_its_rate_and_acts_in_training_only() -> None:
    backbone = build_backbone(configuration(SWIN, ARGS=TINY_SWIN, DROP_PATH_RATE=0.35))
    rates = [m.drop_prob for m in backbone.modules() if type(m).__name__ == "DropPath"][::2]
    assert rates == pytest.approx([0.35 * i / 7 for i in range(1, 8)])  # the first block has none
    images = torch.randn(2, 3, 64, 64)
    assert not backbone(images)["res5"].equal(backbone(images)["res5"])
    backbone.eval()
    assert backbone(images)["res5"].equal(backbone(images)["res5"])
    without = build_backbone(configuration(SWIN, ARGS=TINY_SWIN)).train()
    assert without(images)["res5"].equal(without(images)["res5"])


def test_unknown_name_suggests_close_ones() -> None:
    with pytest.raises(ValueError, match=r"'convnext_tinny'.*convnext_tiny"):
        build_backbone(configuration("convnext_tinny"))
    with pytest.raises(ValueError, match=r"'swin_large'.*swin_large_patch4_window12_384"):
        build_backbone(configuration("swin_large"))


def test_model_without_pyramid_names_the_missing_strides() -> None:
    with pytest.raises(
        ValueError,
        match=r"'beit_base_patch16_224' .* strides \[16\] .*res2 \(stride 4\), .*res5 \(stride",
    ):
        build_backbone(configuration("beit_base_patch16_224"))


def test_bad_options_name_the_value() -> None:
    with pytest.raises(ValueError, match="BATCH_NORM.*'GN'"):
        build_backbone(configuration("resnet18", BATCH_NORM="GN"))
    with pytest.raises(ValueError, match="res6"):
        build_backbone(configuration("resnet18", OUT_FEATURES=["res2", "res6"]))
    with pytest.raises(ValueError, match=r"resnet18.*no_such_argument"):
        build_backbone(configuration("resnet18", ARGS={"no_such_argument": 1}))
    cfg = configuration("resnet18")
    cfg.MODEL.BACKBONE.FREEZE_AT = 6
    with pytest.raises(ValueError, match="FREEZE_AT.*6"):
        build_backbone(cfg)


def test_pretrained_weights_are_asked_for_unless_a_file_is_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    create_model = timm.create_model

    def without_network(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
        if pretrained:
            raise OSError("no network here")
        return create_model(name, **options)

    monkeypatch.setattr(timm, "create_model", without_network)
    cfg = configuration("resnet18", PRETRAINED=True)
    with pytest.raises(ConnectionError, match=r"resnet18.*no network here.*MODEL.TIMM.WEIGHTS"):
        build_backbone(cfg)
    cfg.MODEL.WEIGHTS = "model_final.pth"
    build_backbone(cfg)


def test_arguments_of_another_backbone_can_be_taken_back(tmp_path: Path) -> None:
    base = "MODEL: {BACKBONE: {NAME: %s}, TIMM: {ARGS: {embed_dim: 12, depths: [2, 2, 2, 2]}}}"
    (tmp_path / "base.yaml").write_text(base % SWIN)
    own = "_BASE_: base.yaml\nMODEL: {BACKBONE: {NAME: resnet10t}, TIMM: {ARGS: {%s}}}"
    (tmp_path / "own.yaml").write_text(own % "embed_dim: null, depths: null")
    cfg = load_config(str(tmp_path / "own.yaml"), ["MODEL.TIMM.ARGS.output_stride", "32"])
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    assert build_backbone(cfg).output_shape()["res5"].channels == 512
    assert load_config(str(tmp_path / "own.yaml")).MODEL.TIMM.ARGS.embed_dim is None

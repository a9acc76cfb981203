"""Programs for any size: short ones; and what the command says while it makes them."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from detectron2.layers import ShapeSpec
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.nn import functional as F

from maskdino.backbones.timm_backbone import TimmBackbone
from maskdino.cli import export
from maskdino.export.trace import (
    ExportableNetwork,
    ExportOptions,
    smallest_size,
    to_onnx,
    trace,
    traces_any_size,
)
from maskdino.structures import Predictions

TOKENS: list[str] = []  # how many, as symbols while a program is traced


class Strided(nn.Module):
    """What the tracer asks of a model: maps that are padded as timm's Swin and EfficientNet do."""

    size_divisibility = 0
    pixel_embedding = inference = is_thing = None
    backbone = SimpleNamespace(output_shape=lambda: {"fine": ShapeSpec(stride=4)})
    encoder = SimpleNamespace(in_features=["fine"])
    query_selection = SimpleNamespace(num_queries=4)
    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.stem = Conv2dSame(3, 3, 3, stride=2)
        self.fine = Conv2dSame(3, 4, 5, stride=2)
        self.coarse = nn.Conv2d(4, 4, 3, stride=2, padding=1)
        self.linear = nn.Linear(4, 4)
        self.pixel_mean, self.pixel_std = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)

    def predict(self, images: Tensor) -> tuple[Predictions, None]:
        fine = self.fine(self.stem(images))
        fine = F.pad(fine, (0, fine.shape[3] % 2, 0, fine.shape[2] % 2))
        tokens = torch.cat([fine.flatten(2), self.coarse(fine).flatten(2)], dim=2)
        TOKENS.append(str(tokens.shape[2]))
        logits = self.linear(tokens.transpose(1, 2))
        return Predictions(logits, logits.sigmoid(), None), None


@pytest.mark.skipif(not traces_any_size(), reason="this PyTorch traces programs of one size alone")
@torch.no_grad()
def test_sizes_of_maps_are_products_of_units() -> None:
    """Remainders of parts are simplified again at each layer: a Swin took the tracer too long."""
    model = Strided().eval()
    program = trace(ExportableNetwork(model, ExportOptions()))  # type: ignore[arg-type]
    size = re.sub(r"s\d+//32", "unit", TOKENS[-1])
    assert not set(re.findall(r"[a-zA-Z]+|//", size)) - {"unit"}
    for shape in ((1, 3, 96, 320), (2, 3, 160, 128)):
        images = torch.rand(shape)
        expected, _ = model.predict(images)
        torch.testing.assert_close(program.module()(images)["boxes"], expected.boxes)


class Windowed(Strided):
    """The coarsest map alone, of a Swin with blocks there alone."""

    def __init__(self) -> None:
        super().__init__()
        self.swin = TimmBackbone(
            name="swin_tiny_patch4_window7_224",
            in_channels=3,
            out_features=["res5"],
            pretrained=False,
            output_norm=False,
            batch_norm="BN",
            drop_path_rate=0.0,
            activation_checkpoint=False,
            freeze_at=0,
            arguments={"embed_dim": 4, "depths": (0, 0, 0, 2), "num_heads": (1, 1, 1, 1)},
        )

    def predict(self, images: Tensor) -> tuple[Predictions, None]:
        tokens = self.swin(images)["res5"].flatten(2).transpose(1, 2)
        return Predictions(tokens, tokens.sigmoid(), None), None


@pytest.mark.skipif(not traces_any_size(), reason="this PyTorch traces programs of one size alone")
@torch.no_grad()
def test_program_of_a_swin_has_any_number_of_windows() -> None:
    """Traced where the coarsest map was one window, it had never more, and onnxruntime failed."""
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package, reason=f"{package} is optional, see requirements.txt")
    torch.manual_seed(0)
    model, options = Windowed().eval(), ExportOptions()
    assert smallest_size(model) == 256  # type: ignore[arg-type]
    program = trace(ExportableNetwork(model, options))  # type: ignore[arg-type]
    content = to_onnx(program, options, opset=18, metadata={}).SerializeToString()
    module, engine = program.module(), export.program_of_onnx(content, options)
    for shape in ((1, 3, 256, 256), (2, 3, 256, 480), (2, 3, 448, 320)):
        images = torch.rand(shape)
        expected = model.predict(images)[0].class_logits
        for run in (lambda values: module(*values), engine):
            found = run([images])["class_logits"]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_stages_and_images_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def network(*_: object, **__: object) -> object:
        return lambda images: {"class_maps": images}

    monkeypatch.setattr(export, "ExportableNetwork", network)
    monkeypatch.setattr(export, "trace", lambda traced: traced)
    options = ExportOptions("semantic", size=(64, 96))
    program, content = export.export(None, options, "torch", 18, "")  # type: ignore[arg-type]
    assert content is None
    assert capsys.readouterr().out == "tracing for (64, 96) ... 0 s\n"
    batches = [[torch.rand(1, 2, 3, 3)], [torch.rand(1, 2, 3, 3)]]
    export.check(None, options, lambda arguments: program(*arguments), batches)  # type: ignore
    assert "program against model" in (said := capsys.readouterr().err) and "2/2" in said

"""What weights mean stands in the configuration before a model is built from it."""

from __future__ import annotations

import pickle
import urllib.error
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager

from maskdino import model_zoo
from maskdino.checkpoint.loading import load_trained, settle_weights
from maskdino.cli import train
from maskdino.config import load_config
from maskdino.custom.request import Request
from maskdino.custom.run import read_start
from maskdino.engine import evaluating
from maskdino.inference import predictor
from maskdino.model import MaskDINO
from maskdino.model_zoo import RELEASED, read_config
from tests.checkpoint.test_released_weights import released_case_cfg, released_case_weights
from tests.helpers import tiny_cfg, tiny_model

NODE = "MODEL.MASK_DINO.QUERY_SELECTION."
R50 = "coco/instance/maskdino_R50"


@pytest.fixture
def released(parity: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A released file, finest level first, and a configuration of ours that disagrees with it."""
    weights = tmp_path / "released.pth"
    torch.save({"model": released_case_weights(parity, "instance")}, weights)
    cfg = released_case_cfg(parity, "instance")
    cfg.merge_from_list([f"{NODE}LARGEST_PROPOSALS", "coarsest", f"{NODE}EMPTY_MASKS", "box"])
    cfg.merge_from_list(["DATASETS.TRAIN", (), "DATASETS.TEST", (), "MODEL.WEIGHTS", str(weights)])
    config = tmp_path / "config.yaml"
    config.write_text(cfg.dump())
    return config, weights


def decided(cfg: CfgNode) -> tuple[str, str]:
    selection = cfg.MODEL.MASK_DINO.QUERY_SELECTION
    return selection.LARGEST_PROPOSALS, selection.EMPTY_MASKS


def test_released_files_decide_unless_the_user_does(released: tuple[Path, Path]) -> None:
    assert decided(load_config(str(released[0]))) == ("coarsest", "box")
    assert decided(read_config(released[0])) == ("finest", "corner")
    assert decided(read_config(released[0], released[1])) == ("finest", "corner")
    words = [f"{NODE}LARGEST_PROPOSALS", "coarsest"]
    assert decided(read_config(released[0], overrides=words)) == ("coarsest", "corner")
    assert decided(read_config(released[0], "")) == ("coarsest", "box")


@pytest.mark.parametrize("way", ["train", "train_custom", "predictor"])
def test_a_name_and_a_file_are_the_same(
    way: str, released: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All commands read configurations through one function, by whatever name weights come."""
    config, weights = released
    monkeypatch.setattr(PathManager, "get_local_path", lambda _: str(weights))
    monkeypatch.setattr(predictor, "build_model", lambda cfg: read.append(cfg) or MaskDINO(cfg))
    read: list[CfgNode] = []
    for given in (str(weights), RELEASED[1].file, RELEASED[1].config, RELEASED[1].url):
        if way == "train":
            words = ["--config-file", str(config), "--eval-only", "MODEL.WEIGHTS", given]
            read.append(train.read_config(train.parse_arguments(words)))
        elif way == "train_custom":
            data = {"train_json": tmp_path, "train_images": tmp_path, "output": tmp_path}
            read.append(read_start(str(config), Request(**data, weights=given)))
        else:
            predictor.MaskDINOPredictor.from_config(config, given, device="cpu")
    for cfg in read:
        cfg.defrost()
        assert cfg.MODEL.WEIGHTS in (str(weights), RELEASED[1].url)
        cfg.MODEL.WEIGHTS = ""
        assert decided(cfg) == ("finest", "corner")
    assert len(read) == 4 and all(cfg == read[0] for cfg in read)


def test_released_is_what_was_released_for_the_configuration(
    monkeypatch: pytest.MonkeyPatch, released: tuple[Path, Path]
) -> None:
    asked = []
    monkeypatch.setattr(
        PathManager, "get_local_path", lambda url: asked.append(url) or str(released[1])
    )
    by_path = read_config(model_zoo.get_config_file(R50), "released")
    assert read_config(R50, "released") == by_path
    assert asked == [model_zoo.get_checkpoint_url(R50)] * 2
    offline = model_zoo.get_config(R50, trained=True)
    offline.MODEL.WEIGHTS = by_path.MODEL.WEIGHTS
    assert offline == by_path


def test_the_written_configuration_is_the_evaluated_model(
    released: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From OUTPUT_DIR/config.yaml alone comes the model that `--eval-only` has measured."""
    evaluated = []
    monkeypatch.setattr(
        evaluating, "evaluate_model", lambda _, model, *__: evaluated.append(model) or {}
    )
    out = tmp_path / "out"
    words = ["--config-file", str(released[0]), "--eval-only", "OUTPUT_DIR", str(out)]
    args = train.parse_arguments(words)
    train.run(args, train.read_config(args))
    written = load_config(str(out / "config.yaml"))
    assert decided(written) == ("finest", "corner")
    model = MaskDINO(written)
    load_trained(model, written)
    torch.manual_seed(0)
    image = {"image": torch.randint(0, 256, (3, 64, 96)), "height": 64, "width": 96}
    with torch.no_grad():
        ours, theirs = (m.eval()([image])[0]["instances"] for m in (model, evaluated[0]))
    assert torch.equal(ours.scores, theirs.scores)
    assert torch.equal(ours.pred_boxes.tensor, theirs.pred_boxes.tensor)
    # The configuration as it was given is another model.
    other = MaskDINO(load_config(str(released[0])))
    load_trained(other, written)
    with torch.no_grad():
        wrong = other.eval()([image])[0]["instances"]
    assert not torch.equal(wrong.scores, theirs.scores)


def test_a_run_that_goes_on_keeps_its_configuration(
    released: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    words = ["OUTPUT_DIR", str(out)]
    assert decided(read_config(released[0], overrides=words, resume=True)) == ("finest", "corner")
    (out / "config.yaml").write_text(
        yaml.safe_dump({"MODEL": {"MASK_DINO": {"QUERY_SELECTION": {
            "LARGEST_PROPOSALS": "finest", "EMPTY_MASKS": "box"}}}})
    )  # fmt: skip
    checkpoint = {"model": {"a": torch.ones(9)}, "trainer": {}, "iteration": 9}
    torch.save(checkpoint, out / "model_0000009.pth")
    released[1].unlink()  # what the run began with is not needed any more
    for name in (None, "model_0000009.pth", "model_0000019.pth"):  # missing, right, broken
        if name is not None:
            (out / "last_checkpoint").write_text(name)
        assert decided(read_config(released[0], overrides=words, resume=True)) == ("finest", "box")
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint .*released\.pth"):
        read_config(released[0], overrides=words)


FOREIGN = {
    "OneFormer": ("sem_seg_head.predictor.class_transformer.decoder.layers.0.norm1.weight",),
    "OpenSeeD": ("model.sem_seg_head.predictor.lang_encoder.logit_scale",),
    "Mask2Former": (
        "sem_seg_head.predictor.transformer_cross_attention_layers.0.norm.weight",
        "sem_seg_head.predictor.query_feat.weight",
    ),
    "MaskFormer": ("sem_seg_head.predictor.transformer.decoder.layers.0.norm1.weight",),
    "Deformable DETR or DINO": ("transformer.encoder.layers.0.self_attn.sampling_offsets.bias",),
    "DETR": ("detr.transformer.encoder.layers.0.self_attn.in_proj_weight",),
    "an R-CNN or RetinaNet": ("roi_heads.box_predictor.cls_score.weight",),
}


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
@pytest.mark.parametrize("model", FOREIGN)
def test_weights_of_other_models_are_named(model: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    state = {name: torch.zeros(2) for name in ("backbone.stem.conv1.weight", *FOREIGN[model])}
    if suffix == ".pth":
        torch.save({"model": state}, path)
    else:
        arrays = {name: value.numpy() for name, value in state.items()}
        path.write_bytes(pickle.dumps({"model": arrays, "__author__": "third_party"}))
    cfg = tiny_cfg()
    cfg.MODEL.WEIGHTS = str(path)
    message = rf"weights\{suffix} holds the weights of {model}, which no Mask DINO can take"
    with pytest.raises(ValueError, match=message):
        settle_weights(cfg)
    with pytest.raises(ValueError, match=message):
        load_trained(tiny_model(), cfg)


def test_own_weights_are_of_no_other_model(tmp_path: Path) -> None:
    cfg = tiny_cfg()
    cfg.MODEL.WEIGHTS = str(tmp_path / "own.pth")
    torch.save({"model": tiny_model().state_dict()}, cfg.MODEL.WEIGHTS)
    before = cfg.clone()
    settle_weights(cfg, whole=True)
    assert cfg == before


def test_to_predict_takes_more_than_a_backbone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(url: str) -> str:
        raise urllib.error.URLError(f"no route to {url}")

    monkeypatch.setattr(PathManager, "get_local_path", unreachable)
    line = r'R-50\.pkl starts a training.*weights=FILE, or weights="released".*trained=True'
    with pytest.raises(ValueError, match=line):
        predictor.MaskDINOPredictor.from_config(R50, device="cpu")
    cfg = tiny_cfg()
    cfg.MODEL.WEIGHTS = str(tmp_path / "backbone.pth")
    torch.save({"model": {"backbone.stem.conv1.weight": torch.zeros(1)}}, cfg.MODEL.WEIGHTS)
    settle_weights(cfg)
    with pytest.raises(ValueError, match="backbone.pth starts a training"):
        settle_weights(cfg, whole=True)


@pytest.mark.parametrize("weights", ["released", None, "https://nowhere.org/weights.pth"])
def test_no_network_is_one_line(weights: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(url: str) -> str:
        raise urllib.error.URLError(f"no route to {url}")

    monkeypatch.setattr(PathManager, "get_local_path", unreachable)
    with pytest.raises(
        ConnectionError, match=r"cannot download \S+://\S+ .*no route.*--weights"
    ) as error:
        read_config(R50, weights)
    assert "\n" not in str(error.value)

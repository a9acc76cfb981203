"""A released configuration and checkpoint become ours, and the tool says what they contradict."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
import yaml

from maskdino.checkpoint.released_weights import convert_weights
from maskdino.cli import convert_released
from maskdino.config import load_config
from maskdino.model import MaskDINO
from tests.checkpoint.test_released_weights import shapes_of

CHECKOUT = "MASKDINO_RELEASED_CODE"  # environment variable: a checkout of the released code
# Configurations of a checkout -> the list of tensors of weights that were trained with them.
LISTS = {
    "ade20k/semantic-segmentation/maskdino_R50_bs16_160k_steplr": (
        "r50_100q_celoss_hid1024_3s_semantic_ade20k"
    ),
    "cityscapes/semantic-segmentation/maskdino_R50_bs16_90k_steplr": (
        "r50_100q_celoss_hid1024_3s_semantic_cityscapes"
    ),
    "coco/instance-segmentation/maskdino_R50_bs16_50ep_3s": (
        "r50_300q_hid1024_instance_maskenhanced"
    ),
    "coco/instance-segmentation/maskdino_R50_bs16_50ep_3s_dowsample1_2048": (
        "r50_300q_hid2048_3sd1_instance_maskenhanced"
    ),
    "coco/panoptic-segmentation/maskdino_R50_bs16_50ep_3s_dowsample1_2048": (
        "r50_300q_hid2048_3sd1_panoptic"
    ),
    "coco/instance-segmentation/swin/maskdino_R50_bs16_50ep_4s_dowsample1_2048": (
        "swinl_300q_hid2048_instance"
    ),
}
# A fork's configuration: released keys, keys of its own, sizes that are computed.
FORK = """
_BASE_: base.yaml
MODEL:
  SEM_SEG_HEAD: {NUM_CLASSES: 7, TRANSFORMER_ENC_LAYERS: 2, FEATURE_ORDER: low2high}
  MaskDINO: {DROPOUT: 0.0, DEC_LAYERS: 3, NUM_OBJECT_QUERIES: 50, TAG_HEADS: 14, EVAL_FLAG: 1}
INPUT:
  DATASET_MAPPER_NAME: dental_instance_lsj
"""
BASE = """
MODEL:
  META_ARCHITECTURE: MaskDINO
  WEIGHTS: teeth.pkl
  RESNETS: {STEM_TYPE: basic, OUT_FEATURES: [res2, res3, res4, res5]}
DATASETS: {TRAIN: "('teeth_train',)"}
SOLVER: {STEPS: "(3, 4)"}
INPUT: {MIN_SIZE_TRAIN: !!python/object/apply:eval ["[int(x * 0.5 * 64) for x in range(5, 8)]"]}
WANDB: True
"""


@pytest.fixture(scope="module")
def released(
    parity: Path, tmp_path_factory: pytest.TempPathFactory, warm_python: str
) -> tuple[Path, Path]:
    """The files of the worked case `instance`."""
    weights = tmp_path_factory.mktemp("released") / "released.pth"
    command = [warm_python, parity / "make_weights.py"]
    subprocess.run([*command, parity / "instance_parameters.tsv", weights], check=True)
    return parity / "instance_config.yaml", weights


def test_output_is_a_config_and_a_checkpoint_of_ours(
    released: tuple[Path, Path], tmp_path: Path
) -> None:
    remarks = convert_released.convert(*released, tmp_path / "ours")
    cfg = load_config(str(tmp_path / "ours" / "config.yaml"))
    assert cfg.MODEL.MASK_DINO.QUERY_SELECTION.LARGEST_PROPOSALS == "finest"
    assert cfg.MODEL.MASK_DINO.DENOISING.BOX_NOISE == 0.0
    cfg.MODEL.DEVICE = "cpu"
    saved = torch.load(cfg.MODEL.WEIGHTS, weights_only=True)["model"]
    assert set(MaskDINO(cfg).state_dict()) == set(saved)
    expected = convert_weights(torch.load(released[1], weights_only=True)["model"], 8)
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())
    assert not any("disagrees" in remark for remark in remarks)


def test_the_checkpoint_decides_where_the_config_disagrees(
    released: tuple[Path, Path], tmp_path: Path
) -> None:
    values = yaml.safe_load(released[0].read_text())
    values["MODEL"]["MaskDINO"]["DEC_LAYERS"] = 9
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(yaml.safe_dump(values))
    remarks = convert_released.convert(wrong, released[1], tmp_path / "ours")
    assert [r for r in remarks if "disagrees" in r and "DECODER.NUM_LAYERS is 9, set to 3" in r]


def test_nothing_is_overwritten(released: tuple[Path, Path], tmp_path: Path) -> None:
    convert_released.convert(*released, tmp_path / "ours")
    with pytest.raises(FileExistsError, match="choose another folder"):
        convert_released.convert(*released, tmp_path / "ours")


def test_other_checkpoints_are_refused(released: tuple[Path, Path], tmp_path: Path) -> None:
    other = tmp_path / "other.pth"
    torch.save({"model": {"weight": torch.zeros(1)}}, other)
    with pytest.raises(ValueError, match="no released Mask DINO names"):
        convert_released.convert(released[0], other, tmp_path / "ours")


@pytest.fixture
def fork(tmp_path: Path) -> Path:
    """A fork's configuration, which names a base."""
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "fork.yaml").write_text(FORK)
    return tmp_path / "fork.yaml"


def test_forks_are_converted_without_weights(fork: Path, tmp_path: Path) -> None:
    remarks = convert_released.convert(fork, None, tmp_path / "ours")
    cfg = load_config(str(tmp_path / "ours" / "config.yaml"))
    assert cfg.INPUT.MIN_SIZE_TRAIN == (160, 192, 224)
    assert cfg.SOLVER.STEPS == (3, 4) and cfg.DATASETS.TRAIN == ("teeth_train",)
    node = cfg.MODEL.MASK_DINO
    assert (node.NUM_CLASSES, node.DECODER.NUM_LAYERS, node.ENCODER.NUM_LAYERS) == (7, 3, 2)
    assert node.QUERY_SELECTION.LARGEST_PROPOSALS == "finest"
    assert cfg.INPUT.DATASET_MAPPER_NAME == "instance" and cfg.INPUT.LSJ.ENABLED
    assert not (tmp_path / "ours" / "model.pth").exists()
    for remark in (
        "left out, a key of neither code: MODEL.MaskDINO.TAG_HEADS",
        "left out, a key of neither code: WANDB",
        "left out, without meaning here: MODEL.MaskDINO.EVAL_FLAG, MODEL.RESNETS.STEM_TYPE",
    ):
        assert remark in remarks
    assert any("DATASET_MAPPER_NAME is 'dental_instance_lsj', a mapper" in r for r in remarks)
    assert any("MODEL.WEIGHTS is teeth.pkl, a file of a backbone" in r for r in remarks)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("MODEL: {MASK_FORMER: {NHEADS: 8}}", "is a configuration of Mask2Former or MaskFormer"),
        ("MODEL: {MASK_DINO: {NUM_CLASSES: 8}}", "is a configuration of this project"),
        ("MODEL: {MaskDINO: {PRE_NORM: True}}", "PRE_NORM is True: only False is supported"),
        ("MODEL: {MaskDINO: {DN: most}}", "MODEL.MaskDINO.DN is 'most'"),
        ("MODEL: {SEM_SEG_HEAD: {COMMON_STRIDE: 2}}", "COMMON_STRIDE is 2: only 4"),
        ("MODEL: {SEM_SEG_HEAD: {MASK_DIM: 128}}", "MASK_DIM is 128: only MODEL.MaskDINO.HIDDEN"),
        ("SOLVER: {MAX_ITER: many}", "SOLVER.MAX_ITER is 'many': Type mismatch"),
        ("A: !!python/object/apply:os.getcwd []", "line 1: cannot be read as YAML: could not"),
    ],
)
def test_other_configurations_end_with_one_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "other.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit) as error:
        convert_released.main(["--config", str(path), "--output", str(tmp_path / "ours")])
    assert str(error.value).startswith("error: ") and message in str(error.value)
    assert "\n" not in str(error.value) and not (tmp_path / "ours").exists()


def test_a_released_configuration_as_it_is_is_sent_here(fork: Path) -> None:
    """`train_net.py`, and all else that reads a configuration."""
    line = r"fork\.yaml has MODEL\.MaskDINO: `maskdino convert released.*tools/convert_released\.py"
    (fork.parent / "base.yaml").write_text("{}")
    with pytest.raises(ValueError, match=line):
        load_config(str(fork))
    (fork.parent / "base.yaml").write_text(BASE)
    line = r"base\.yaml, line 8: .*could not determine.*apply:eval.*tools/convert_released\.py"
    with pytest.raises(ValueError, match=line):
        load_config(str(fork))
    fork.write_text("MODEL: {MASK_FORMER: {NHEADS: 8}}")
    with pytest.raises(ValueError, match="fork.yaml is a configuration of Mask2Former"):
        load_config(str(fork))
    fork.write_text("MODEL: [1\nA: 2\n")
    with pytest.raises(ValueError, match=r"fork\.yaml, line 2: "):
        load_config(str(fork))


@pytest.mark.slow
@pytest.mark.skipif(CHECKOUT not in os.environ, reason=f"set {CHECKOUT} to a checkout")
@pytest.mark.parametrize("with_weights", [False, True])
def test_every_released_configuration_is_converted(
    with_weights: bool, parity: Path, tmp_path: Path
) -> None:
    folder = Path(os.environ[CHECKOUT]) / "configs"
    paths = sorted(folder.rglob("*.yaml"))
    assert len(paths) >= 18
    for number, path in enumerate(paths):
        weights = None
        if with_weights:
            name = LISTS.get(path.relative_to(folder).with_suffix("").as_posix())
            if name is None:
                continue
            weights = tmp_path / "weights.pth"
            shapes = shapes_of(parity / "released" / f"{name}.tsv")
            torch.save({key: torch.zeros(shape) for key, shape in shapes.items()}, weights)
        output = tmp_path / str(number)
        remarks = convert_released.convert(path, weights, output)
        assert not [remark for remark in remarks if "neither code" in remark]
        cfg = load_config(str(output / "config.yaml"))
        assert ("swin" in path.parts) == (cfg.MODEL.BACKBONE.NAME == "D2SwinTransformer")
        (output / "model.pth").unlink(missing_ok=True)

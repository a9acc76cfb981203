"""Values that make no sense are refused in one line, before anything is built."""

from __future__ import annotations

from pathlib import Path

import pytest

from maskdino import model_zoo
from maskdino.config import load_config
from maskdino.config.checks import RULES, ConfigError, check_training, check_values
from maskdino.engine.before_training import check_settings

NODE = "MODEL.MASK_DINO."
WRONG = [
    ("SOLVER.GAMMA", -1.0, "at least 0"),
    ("SOLVER.WARMUP_FACTOR", -1.0, "at least 0"),
    ("SOLVER.WARMUP_ITERS", -5, "at least 0"),
    ("SOLVER.BACKBONE_MULTIPLIER", -1.0, "at least 0"),
    ("SOLVER.WEIGHT_DECAY", -1.0, "at least 0"),
    ("SOLVER.BASE_LR", "nan", "at least 0"),
    ("SOLVER.BASE_LR", -0.1, "at least 0"),
    ("SOLVER.OPTIMIZER", "ADAM", "one of 'ADAMW', 'SGD'"),
    ("SOLVER.IMS_PER_BATCH", 0, "at least 1"),
    ("SOLVER.ACCUMULATION_STEPS", 0, "at least 1"),
    ("SOLVER.CHECKPOINT_PERIOD", 0, "at least 1"),
    ("SOLVER.MAX_ITER", 0, "at least 1"),
    ("SOLVER.EMA.DECAY", 1.0, "at least 0 and below 1"),
    ("SOLVER.LAYER_DECAY", 0.0, "above 0 and at most 1"),
    (f"{NODE}QUERY_SELECTION.NUM_QUERIES", 0, "at least 1"),
    (f"{NODE}QUERY_SELECTION.NUM_QUERIES", -3, "at least 1"),
    (f"{NODE}ENCODER.NUM_LAYERS", 0, "at least 1"),
    (f"{NODE}DECODER.NUM_LAYERS", 0, "at least 1"),
    (f"{NODE}DECODER.NUM_HEADS", 0, "at least 1"),
    (f"{NODE}HIDDEN_DIM", 100, "a multiple of 32"),
    (f"{NODE}ENCODER.NUM_HEADS", 7, "HIDDEN_DIM is 256; .*NUM_HEADS, 7"),
    (f"{NODE}SIZE_DIVISIBILITY", -32, "at least 0"),
    (f"{NODE}LOSS.CLASS_WEIGHT", -1.0, "at least 0"),
    (f"{NODE}MATCHER.L1_WEIGHT", -1.0, "at least 0"),
    (f"{NODE}LOSS.IMPORTANCE_RATIO", 2.0, "from 0 to 1"),
    (f"{NODE}DENOISING.NUM_QUERIES", -5, "at least 0"),
    (f"{NODE}DENOISING.BOX_NOISE", -1.0, "at least 0"),
    (f"{NODE}DENOISING.LABEL_NOISE", 2.0, "from 0 to 1"),
    (f"{NODE}DENOISING.MODE", "box", "one of 'boxes_and_masks'"),
    (f"{NODE}TEST.DECODER_LAYER", 10, "from -1 to .*NUM_LAYERS, 9"),
    ("TEST.DETECTIONS_PER_IMAGE", -1, "at least 1"),
    ("INPUT.LSJ.MIN_SCALE", 3.0, "at most INPUT.LSJ.MAX_SCALE, 2.0"),
    ("SEED", -2, "from -1 to 2"),
    ("SEED", 1 << 63, "from -1 to 2"),
    ("DATASETS.TRAIN", "()", "at least one dataset"),
]


@pytest.mark.parametrize(("key", "value", "message"), WRONG)
def test_senseless_values(key: str, value: object, message: str) -> None:
    cfg = load_config()
    node = cfg
    *nodes, last = key.split(".")
    for name in nodes:
        node = node[name]
    node[last] = {"nan": float("nan"), "()": ()}.get(value, value)
    with pytest.raises(ConfigError, match=f"(?=.*{last}).*{message}") as error:
        check_settings(cfg)
    assert "\n" not in str(error.value)


def test_batches_are_split_evenly() -> None:
    cfg = load_config(None, ["SOLVER.IMS_PER_BATCH", "3", "SOLVER.ACCUMULATION_STEPS", "2"])
    cfg.DATASETS.TRAIN = ("nuclei_train",)
    with pytest.raises(ConfigError, match="3; it must be a multiple of .*STEPS, 2"):
        check_training(cfg)


@pytest.mark.parametrize("steps", ["(5, 3)", "(5, 5)", "(0, 5)", "(5, 10)"])
def test_steps_increase_and_come_before_the_end(steps: str) -> None:
    cfg = load_config(None, ["SOLVER.STEPS", steps, "SOLVER.MAX_ITER", "10"])
    cfg.DATASETS.TRAIN = ("some",)
    with pytest.raises(ConfigError, match=r"SOLVER.STEPS is \[.*increase, .*MAX_ITER, 10 \(those"):
        check_training(cfg)
    cfg.SOLVER.LR_SCHEDULER_NAME = "WarmupCosineLR"  # which reads none
    check_training(cfg)
    cfg.merge_from_list(
        ["SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", "SOLVER.STEPS", "(3, 11)"]
    )
    check_training(cfg)


def test_compiled_layers_and_graphs_exclude_each_other() -> None:
    cfg = load_config(None, ["SOLVER.COMPILE", "True", "SOLVER.CUDA_GRAPHS", "True"])
    cfg.DATASETS.TRAIN = ("some",)
    with pytest.raises(ConfigError, match="COMPILE and SOLVER.CUDA_GRAPHS are both True; set one"):
        check_training(cfg)


@pytest.mark.parametrize("name", model_zoo.list())
def test_shipped_configurations_are_allowed(name: str) -> None:
    check_values(model_zoo.get_config(name))


def test_every_rule_is_of_a_key() -> None:
    cfg = load_config()
    for key in RULES:
        load_config(None, [key, str(_value(cfg, key))])


def _value(cfg: object, key: str) -> object:
    for name in key.split("."):
        cfg = cfg[name]
    return cfg


def test_whole_numbers_are_numbers(tmp_path: Path) -> None:
    key = f"{NODE}LOSS.CLASS_WEIGHT"
    for value in ("2", 2, "+2", "2.0"):
        assert load_config(None, [key, value]).MODEL.MASK_DINO.LOSS.CLASS_WEIGHT == 2.0
    path = tmp_path / "mine.yaml"
    path.write_text("VERSION: 2\nMODEL: {MASK_DINO: {LOSS: {CLASS_WEIGHT: 3}}}\n")
    weight = load_config(str(path)).MODEL.MASK_DINO.LOSS.CLASS_WEIGHT
    assert weight == 3 and isinstance(weight, float)
    with pytest.raises(ValueError, match="SOLVER.MAX_ITER"):
        load_config(None, ["SOLVER.MAX_ITER", "2.5"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds nothing"),
        ("- 1\n- 2\n", "holds a single list"),
        ("hello\n", "holds a single str"),
        ("MODEL: {", "line "),
        ("MODEL:\n\t- x", "line 2"),
        ("_BASE_: mine.yaml\n", "is its own _BASE_"),
        ("_BASE_: ../{folder}/mine.yaml\n", "is its own _BASE_"),
        ("_BASE_: 3\n", "_BASE_ is 3"),
        ("_BASE_: [3]\n", "_BASE_ is 3"),
        ("_BASE_: lost.yaml\n", "names it as _BASE_, but there is no configuration"),
        ("_BASE_: base.yaml\nSEED: {A: 3}\n", "SEED has keys, but is 7 in its _BASE_"),
        ("MODEL: 3\n", "MODEL"),
        ("3: 4\n", "Unknown configuration key 3"),
        ("OUTPUT_DIR: \x01\n", "cannot be read as YAML"),
        ("[" * 5000, "nested too deeply|line "),
        ("VERSION: 2\nSOLVER: {MAX_ITER: many}\n", "mine.yaml.*MAX_ITER"),
    ],
)
def test_files_that_are_no_configurations(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(content.replace("{folder}", tmp_path.name))
    (tmp_path / "base.yaml").write_text("SEED: 7\n")
    with pytest.raises((ValueError, KeyError, FileNotFoundError), match=message) as error:
        load_config(str(path))
    assert "mine.yaml" in str(error.value)


def test_binary_files(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xff\xfe\x00\x01\x80")
    with pytest.raises(ValueError, match=r"mine\.yaml cannot be read as YAML"):
        load_config(str(path))

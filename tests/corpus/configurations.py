"""Configuration files and overrides, as training, evaluation, own data and prediction read them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from maskdino.config.checks import RULES
from tests.corpus.case import TRAP, Case, Either, Outcome, Refused, Works
from tests.corpus.scene import (
    custom_words,
    evaluation_words,
    training_words,
    write_scene,
)
from tests.corpus.small_model import prediction_words

KIND = "configurations"
LISTS = frozenset(
    ("SOLVER.STEPS", "INPUT.LSJ.SIZE", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD", "OUTPUT_DIR")
    + ("DATASETS.TRAIN", "DATASETS.TEST", "INPUT.AUGMENTATIONS", "LOG.WRITERS")
    + ("TEST.EVALUATORS", "MODEL.MASK_DINO.CLASS_NAMES", "INPUT.FORMAT")
    + ("MODEL.MASK_DINO.STUFF_CLASSES",)
)
FILE_WAYS = ("train", "predict", "train-custom", "convert-released")
NODE = "MODEL.MASK_DINO."


@dataclass(frozen=True)
class Text:
    """A YAML file.

    Attributes:
        name: of what is wrong with it.
        content: of the file; "{base}" is a good one.
        words: that its error holds.
    """

    name: str
    content: str | bytes
    words: tuple[str, ...]


def files() -> Iterator[Text]:
    """Files that are no configurations; all errors name the file."""
    deep = "{a: " * 4000
    for name, content, *words in (
        ("empty", "", "nothing|no keys"),
        ("comment", "# nothing\n", "nothing|no keys"),
        ("list", "- 1\n- 2\n", "list|no keys"),
        ("text", "hello\n", "str|no keys"),
        ("number", "3\n", "int|no keys"),
        ("open brace", "MODEL: {\n", "line"),
        ("open quote", 'OUTPUT_DIR: "out\n', "line"),
        ("tab", "MODEL:\n\tMASK_ON: 3\n", "line 2"),
        ("two colons", "MODEL: a: b\n", "line 1"),
        ("indentation", "MODEL:\n  A: 1\n B: 2\n", "line 3"),
        ("two documents", "A: 1\n---\nB: 2\n", "document"),
        ("unknown anchor", "MODEL: *mine\n", "mine"),
        ("control character", "OUTPUT_DIR: \x01\n", "YAML"),
        ("bytes", b"\xff\xfe\x00\x01\x80", "YAML"),
        ("latin-1", "OUTPUT_DIR: \xfcber\n".encode("latin-1"), "YAML"),
        ("zeros", bytes(50), "YAML"),
        ("html", "<!DOCTYPE html><html></html>\n", ""),
        ("depth", "[" * 5000, "deep|line|YAML"),
        ("depth of objects", deep, "deep|line|YAML"),
        ("own base", "_BASE_: bad.yaml\n", "its own _BASE_"),
        ("own base, other name", "_BASE_: ./././bad.yaml\n", "its own _BASE_"),
        ("lost base", "_BASE_: lost.yaml\n", r"lost\.yaml"),
        ("base a number", "_BASE_: 3\n", "_BASE_"),
        ("base null", "_BASE_:\n", "_BASE_"),
        ("base a list of numbers", "_BASE_: [3]\n", "_BASE_"),
        ("base an object", "_BASE_: {a: b}\n", "_BASE_"),
        ("base a folder", "_BASE_: .\n", ""),
        ("base empty", '_BASE_: ""\n', ""),
        ("key a list", "? [1, 2]\n: 3\n", ""),
        ("key null", "null: 3\n", ""),
        ("key true", "true: 3\n", ""),
        ("key a number", "3: 4\n", "3"),
        ("key empty", '"": 4\n', ""),
        ("merge of a text", "MODEL:\n  <<: hello\n", "line"),
        ("date", "MODEL: 2026-02-31\n", ""),
        ("huge number", f"VERSION: {'9' * 5000}\n", ""),
        ("wide characters", "МОДЕЛЬ: 3\n", "МОДЕЛЬ"),
    ):
        yield Text(name, content, tuple(words))
    for name, tag in (
        ("apply", f"!!python/object/apply:os.mkdir [{TRAP}]"),
        ("new", f"!!python/object/new:os.mkdir [{TRAP}]"),
        ("name", "!!python/name:os.mkdir"),
        ("module", "!!python/module:os"),
        ("tuple", "!!python/tuple [1, 2]"),
        ("eval", f'!!python/object/apply:eval [\'__import__("os").mkdir("{TRAP}")\']'),
        ("unknown", "!mine 3"),
    ):
        yield Text(f"tag {name}", f"OUTPUT_DIR: {tag}\n", ())


def keys() -> Iterator[Text]:
    """Good YAML with keys and values that are none; all errors name the file and the key."""
    for name, content, *words in (
        ("unknown key", "MODEL: {MASK_DINO: {NUM_CLASS: 3}}", "NUM_CLASS ", "NUM_CLASSES"),
        ("unknown node", "MODELS: {A: 3}", "MODELS"),
        ("node a number", "MODEL: 3", "MODEL"),
        ("node null", "MODEL:", "MODEL"),
        ("node a list", "MODEL: [1]", "MODEL"),
        ("node empty text", 'SOLVER: ""', "SOLVER"),
        ("value a node", "OUTPUT_DIR: {A: 3}", "OUTPUT_DIR"),
        ("text for a number", "SOLVER: {MAX_ITER: many}", "MAX_ITER"),
        ("fraction for a number", "SOLVER: {MAX_ITER: 2.5}", "MAX_ITER"),
        ("list for a number", "SOLVER: {MAX_ITER: [3]}", "MAX_ITER"),
        ("null for a number", "SOLVER: {MAX_ITER: null}", "MAX_ITER"),
        ("number for a list", "DATASETS: {TRAIN: 3}", "TRAIN"),
        ("text for a switch", "MODEL: {MASK_DINO: {MASK_ON: maybe}}", "MASK_ON"),
        ("number for a text", "MODEL: {WEIGHTS: 3}", "WEIGHTS"),
        ("huge number for a float", f"SOLVER: {{BASE_LR: {'9' * 400}}}", "BASE_LR"),
        ("date for a text", "OUTPUT_DIR: 2026-11-27", "OUTPUT_DIR"),
        ("text for a version", "VERSION: two", "VERSION"),
        ("version of the future", "VERSION: 99", "VERSION"),
        ("version null", "VERSION: null", "VERSION"),
        ("mask2former", "MODEL: {MASK_FORMER: {A: 3}}", "Mask2Former"),
        ("released", "MODEL: {MaskDINO: {A: 3}}", "convert released"),
    ):
        yield Text(
            name, f"VERSION: 2\n{content}\n".replace("VERSION: 2\nVERSION", "VERSION"), tuple(words)
        )


def overrides() -> Iterator[tuple[str, list[str], tuple[str, ...]]]:
    """Words behind a command, and what the error holds."""
    yield "a key alone", ["SOLVER.MAX_ITER"], ("KEY VALUE pairs", "SOLVER.MAX_ITER")
    yield "an unknown key", ["SOLVER.BASE_LRR", "1"], ("SOLVER.BASE_LRR", "SOLVER.BASE_LR")
    yield "a node", ["SOLVER", "1"], ("SOLVER",)
    yield "a key below a value", ["SOLVER.MAX_ITER.X", "1"], ("SOLVER.MAX_ITER.X",)
    yield "an empty key", ["", "1"], ("key",)
    yield "dots", ["..", "1"], (r"\.\.",)
    yield "an equal sign", ["SOLVER.MAX_ITER=3", "1"], ("SOLVER.MAX_ITER=3",)
    yield "a key of another case", ["solver.max_iter", "1"], ("solver.max_iter",)
    yield "a key with zero", ["SOLVER.\0", "1"], ("SOLVER",)
    yield "a device that is none", ["MODEL.DEVICE", "gpu"], ("MODEL.DEVICE", "'gpu'")
    yield "a model that is none", ["MODEL.META_ARCHITECTURE", "Mine"], ("Mine",)
    for key, values in {
        "SOLVER.MAX_ITER": (
            "many",
            "2.5",
            "[3]",
            "None",
            "",
            "3 4",
            "1e3",
            "'3'",
            "0x",
            "{",
            "(",
            "\0",
        ),
        "SOLVER.BASE_LR": ("fast", "[0.1]", "nan", "inf", "-inf", "9" * 400, "1e999", "1j", "--1"),
        f"{NODE}MASK_ON": ("maybe", "2", "yes"),
        "SOLVER.STEPS": ("3", "many", "('a',)", "{3: 4}", "[[1]]", "(-3,)", "(None,)"),
        "INPUT.LSJ.SIZE": (
            "64",
            "[64]",
            "[64, 64, 64]",
            "[0, 64]",
            "[-64, 64]",
            "['a', 'b']",
            "[6.5, 64]",
            "[None, 64]",
        ),
        "MODEL.PIXEL_MEAN": ("[1]", "['a', 'b', 'c']", "3", "[nan, 1, 2]"),
        "MODEL.PIXEL_STD": ("[0, 1, 1]", "[1, 1]", "[-1, 1, 1]"),
        "INPUT.FORMAT": ("HSVX", ""),
        "INPUT.RANDOM_FLIP": ("sideways",),
        "INPUT.DATASET_MAPPER_NAME": ("mine", ""),
        "INPUT.AUGMENTATIONS": ("['mine']", "[3]", "3"),
        "DATASETS.TRAIN": ("()", "('nowhere',)", "3", "(3,)"),
        "DATALOADER.SAMPLER_TRAIN": ("mine",),
        "LOG.WRITERS": ("['mine']", "[3]"),
        f"{NODE}STUFF_CLASSES": ("-1", "many", "nan", "[3]"),
        "SOLVER.LR_SCHEDULER_NAME": ("mine",),
        "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("mine",),
        "SOLVER.BEST.METRIC": ("segm/mine", "AP"),
        "OUTPUT_DIR": ("", "\0", "a" * 300, "/dev/null/x"),
        "MODEL.WEIGHTS": ("lost.pth", ".", "\0", "foo://lost.pth", "a" * 300, "3"),
    }.items():
        for value in values:
            # Some messages name the value, and what it should have been.
            says = {"nowhere": "nowhere", "MODEL.WEIGHTS": "checkpoint|too long|no weights|WEIGHTS"}
            says["SOLVER.LR_SCHEDULER_NAME"] = "LR scheduler: mine"
            word = says.get("nowhere" if "nowhere" in value else key, key.rpartition(".")[2])
            yield f"{key} {_short(value)}", [key, value], (word,)
    for key in RULES:  # of single values
        kept = {f"{NODE}TEST.DECODER_LAYER", "SEED"}
        values = ("-7", "many") if key in kept else ("-1", "-0.5", "many", "nan", "[]")
        for value in () if key in LISTS else values:
            yield f"{key} {value}", [key, value], (key.rpartition(".")[2],)


def harmless() -> Iterator[tuple[str, list[str]]]:
    """Overrides that are understood."""
    for key, values in {
        "SOLVER.BASE_LR": ("0", "1", "1e-4", ".5"),
        "SOLVER.MAX_ITER": ("1", "0x1"),
        f"{NODE}LOSS.CLASS_WEIGHT": ("2", "2.0", "0"),
        "SOLVER.STEPS": ("()", "[]", "(5,)", "[5, 7]"),
        "SEED": ("-1", "0", "12345678901234567890"),
    }.items():
        for value in values:
            yield f"{key} {value}", [key, value]


def _short(value: str) -> str:
    return ascii(value) if len(value) < 40 else f"{value[:5]} and {len(value) - 5} more"


def _file_words(content: str | bytes, way: str, folder: Path) -> list[str]:
    path = folder / "bad.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    scene = write_scene(folder)
    if way == "train":
        words = training_words(folder, scene)
        words[words.index("--config-file") + 1] = str(path)
        return words
    if way == "predict":
        words = ["--input", folder / "images" / "a.png", "--output", folder / "out"]
        return prediction_words(*words, config=path)
    if way == "train-custom":
        return custom_words(folder, scene, "--config-file", path)
    return ["--config", str(path), "--output", str(folder / "out")]


def _override_words(words: list[str], way: str, folder: Path) -> list[str]:
    scene = write_scene(folder)
    if way == "train":
        return [*training_words(folder, scene), *words]
    if way == "evaluate":
        return [*evaluation_words(folder, scene), *words]
    if way == "predict":
        begin = ["--input", folder / "images" / "a.png", "--output", folder / "out"]
        return [*prediction_words(*begin), *words]
    return custom_words(folder, scene, *words)


def _file_outcome(text: Text, way: str) -> Outcome:
    if way == "convert-released":  # takes keys of forks, and numbers that are computed
        name = (r"bad\.yaml",)
        return (
            Either((Refused(name, lines=3), Works()))
            if text.words
            else Either((Refused((), lines=3), Works()))
        )
    return Refused((r"bad\.yaml", *text.words))


def cases() -> list[Case]:
    """Files on all ways; overrides on those that train, predict, and read own data."""
    found = [
        Case(
            KIND,
            way,
            f"file {text.name}",
            partial(_file_words, text.content, way),
            _file_outcome(text, way),
        )
        for group in (files, keys)
        for text in group()
        for way in FILE_WAYS
    ]
    for name, words, expected in overrides():
        own = Refused(expected)
        found.append(Case(KIND, "train", name, partial(_override_words, words, "train"), own))
        for way in ("predict", "train-custom"):
            # What a command does not use, or decides by itself, it need not refuse.
            outcome = Either((own, Works()))
            found.append(Case(KIND, way, name, partial(_override_words, words, way), outcome))
    for name, words in harmless():
        for way in ("train", "predict", "train-custom"):
            write = partial(_override_words, words, way)
            found.append(Case(KIND, way, f"fine {name}", write, Works()))
    return found

"""Videos, exported models, folders of runs, and other files that commands are given."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import torch

from tests.corpus.case import Case, Either, Refused, Works
from tests.corpus.scene import (
    custom_words,
    evaluation_words,
    training_words,
    write_images,
    write_scene,
)
from tests.corpus.small_model import model_folder, prediction_words
from tests.inference.media import damage_middle, save_noise, save_video

Write = Callable[[Path], list[str]]


def _to_predict(path: object, folder: Path, *more: object) -> list[str]:
    return prediction_words("--input", path, "--output", folder / "out", *more)


@cache
def _video() -> bytes:
    return save_video(model_folder() / "good.mp4", frames=12).read_bytes()


@cache
def _noise(suffix: str, codec: str) -> bytes:
    return bytes(save_noise(model_folder() / f"noise{suffix}", codec))


def _video_words(make: Callable[[Path], object], suffix: str, folder: Path) -> list[str]:
    path = folder / f"bad{suffix}"
    make(path)
    return _to_predict(path, folder)


def videos() -> Iterator[Case]:
    """Videos to draw."""

    def case(name: str, make: Callable[[Path], object], outcome, suffix: str = ".mp4") -> Case:
        return Case("videos", "predict", name, partial(_video_words, make, suffix), outcome)

    refused = Refused((r"bad\.",))
    for name, data in {
        "empty": b"",
        "text": b"no video\n",
        "zeros": bytes(2000),
        "html": b"<!DOCTYPE html><html></html>",
        "random": bytes((i * 7919) % 251 for i in range(3000)),
        "zip": b"PK\x03\x04" + bytes(100),
        "first box alone": b"\x00\x00\x00\x18ftypmp42\x00\x00\x00\x00mp42isom",
        "lfs pointer": b"version https://git-lfs.github.com/spec/v1\n",
    }.items():
        for suffix in (".mp4", ".avi", ".webm"):
            yield case(f"{name} {suffix}", lambda p, d=data: p.write_bytes(d), refused, suffix)
    yield case("missing", lambda _: None, refused)
    yield case("a link to itself", lambda path: path.symlink_to(path), refused)
    yield case("whole", lambda path: path.write_bytes(_video()), Works())
    for percent in (5, 30, 60, 90):
        cut = partial(_write_cut, percent=percent)
        yield case(f"cut at {percent} %", cut, Either((refused, Works())))
    for suffix, codec in ((".avi", "mjpeg"), (".mp4", "h264"), (".mkv", "h264")):
        for how in ("zeros", "noise", "bits", "cut"):
            damaged = partial(_write_damaged, suffix=suffix, codec=codec, how=how)
            outcome = Either((refused, Works()))
            yield case(f"{codec} {suffix}, {how}", damaged, outcome, suffix)


def _write_cut(path: Path, percent: int) -> None:
    path.write_bytes(_video()[: len(_video()) * percent // 100])


def _write_damaged(path: Path, suffix: str, codec: str, how: str) -> None:
    content = bytearray(_noise(suffix, codec))
    damage_middle(content, how)
    path.write_bytes(bytes(content))


def exported() -> Iterator[Case]:
    """Files in the place of an exported network."""

    def write(make: Callable[[Path], object], folder: Path) -> list[str]:
        path = folder / "bad.onnx"
        make(path)
        image = write_images(folder) / "a.png"
        words = ["--backend", "onnx", "--model", path, "--input", image, "--output", folder / "out"]
        return [*map(str, words)]

    def case(name: str, make: Callable[[Path], object], *words: str) -> Case:
        outcome = Refused((r"bad\.onnx", *words), lines=4)
        return Case("exported", "predict", name, partial(write, make), outcome)

    for name, data in {
        "empty": b"",
        "text": b"no network\n",
        "zeros": bytes(300),
        "random": bytes((i * 7919) % 251 for i in range(3000)),
        "zip": b"PK\x03\x04" + bytes(100),
        "html": b"<!DOCTYPE html><html></html>",
    }.items():
        yield case(name, lambda path, data=data: path.write_bytes(data))
    yield case("missing", lambda _: None)
    yield case("a folder", lambda path: path.mkdir())
    good = {"config": "VERSION: 2\n", "outputs": "predictions", "mask_size": "full"}
    good |= {"unit": 32, "smallest": 64}
    for name, metadata in {
        "of another program": None,
        "metadata no json": "hello",
        "metadata a list": "[]",
        "metadata a number": "3",
        "metadata nested deeply": 9999 * "[",
        "metadata empty": "{}",
        "metadata of more": json.dumps({**good, "mine": 3}),
        "configuration a number": json.dumps({**good, "config": 3}),
        "configuration no yaml": json.dumps({**good, "config": "{"}),
        "configuration a list": json.dumps({**good, "config": "- 1"}),
        "configuration with tags": json.dumps({**good, "config": "A: !!python/name:os.mkdir"}),
        "configuration of unknown keys": json.dumps({**good, "config": "VERSION: 2\nMINE: 3"}),
        "results of a task": json.dumps({**good, "outputs": "instance"}),
        "inputs of another network": json.dumps(good),
    }.items():
        yield case(name, partial(_write_network, metadata=metadata))


def _write_network(path: Path, metadata: str | None) -> None:
    import onnx
    from onnx import TensorProto, helper

    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in ("x", "y")]
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])], "g", [value[0]], [value[1]]
    )
    opset = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=9)
    if metadata is not None:
        entry = model.metadata_props.add()
        entry.key, entry.value = "maskdino", metadata
    onnx.save(model, str(path))


def paths() -> Iterator[Case]:
    """Names of files that are none, or that cannot be used."""

    def case(way: str, name: str, write: Write, *words: str) -> Case:
        return Case("paths", way, name, write, Refused(words))

    odd = {"with zero": "a\0b", "of 300 letters": "a" * 300, "lost": "lost", "lone half": "\udcff"}
    for name, value in odd.items():
        word = {"with zero": "", "lone half": ""}.get(name, value)
        yield case("predict", f"input {name}", lambda f, v=value: _to_predict(v, f), word)
        yield case(
            "predict",
            f"configuration {name}",
            lambda f, v=value: prediction_words("--input", "a", "--output", f, config=v),
            word,
        )
        yield case(
            "predict",
            f"weights {name}",
            lambda f, v=value: prediction_words(
                "--input", write_images(f) / "a.png", "--output", f / "o", weights=v
            ),
            word,
        )
        for option in ("--train-json", "--train-images"):
            yield case("train-custom", f"{option} {name}", partial(_own, option, value), word)
        yield case("train-custom", f"--data {name}", partial(_data, value), word)
        yield case("train-custom", f"--weights {name}", partial(_own, "--weights", value), word)
        yield case(
            "convert-released",
            f"--config {name}",
            lambda f, v=value: ["--config", v, "--output", str(f / "out")],
            word,
        )
        yield case(
            "convert-backbone",
            f"source {name}",
            partial(_backbone_words, value),
            word,
        )
        yield case(
            "train",
            f"OUTPUT_DIR {name}",
            lambda f, v=value: training_words(f, write_scene(f), "OUTPUT_DIR", f"/dev/null/{v}"),
            "OUTPUT_DIR",
        )

    def taken(folder: Path) -> list[str]:
        (folder / "out").write_text("a file")
        return _to_predict(write_images(folder) / "a.png", folder)

    yield case("predict", "output a file", taken, "out")
    yield case("predict", "folder empty", lambda f: _to_predict(_made(f / "none"), f), "none")
    yield case("predict", "pattern of nothing", lambda f: _to_predict("none*.png", f), r"none\*")
    yield case("train-custom", "images a file", partial(_own, "--train-images", "bad.json"), "bad")
    yield case("train-custom", "json a folder", partial(_own, "--train-json", "images"), "images")
    yield case("train-custom", "empty folder", lambda f: _data(str(_made(f / "none")), f), "none")


BACKBONE = "nuclei/instance/maskdino_tiny"


def _backbone_words(source: str, folder: Path) -> list[str]:
    return [source, str(folder / "converted.pth"), "--config-file", BACKBONE]


def backbones() -> Iterator[Case]:
    """Weights of a backbone."""
    for suffix in (".pth", ".bin", ".safetensors"):
        for name, data in {
            "empty": b"",
            "text": b"hello",
            "zeros": bytes(200),
            "zip": b"PK\x03\x04" + bytes(60),
            "code": b"\x80\x02cos\nmkdir\nX\x04\x00\x00\x00trap\x85R.",
            "length of a terabyte": b"\x00\x00\x00\x00\x00\x01\x00\x00{}",
            "empty header": b"\x02\x00\x00\x00\x00\x00\x00\x00{}",
        }.items():
            write = partial(_backbone_file, suffix, data)
            outcome = Refused((rf"bad\{suffix}",))
            yield Case("backbones", "convert-backbone", f"{name} {suffix}", write, outcome)
    for name, content in {
        "a list": [torch.ones(1)],
        "nothing": {},
        "a number": 3,
        "none": None,
        "model none": {"model": None},
        "texts": {"model": {"a": "b"}},
        "another network": {"surprise": torch.ones(3)},
    }.items():
        write = partial(_backbone_content, content)
        outcome = Refused((r"bad\.pth",), lines=4)
        yield Case("backbones", "convert-backbone", f"holds {name}", write, outcome)


def _backbone_file(suffix: str, data: bytes, folder: Path) -> list[str]:
    path = folder / f"bad{suffix}"
    path.write_bytes(data)
    return _backbone_words(str(path), folder)


def _backbone_content(content: object, folder: Path) -> list[str]:
    torch.save(content, folder / "bad.pth")
    return _backbone_words(str(folder / "bad.pth"), folder)


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _own(option: str, value: str, folder: Path) -> list[str]:
    words = custom_words(folder, write_scene(folder))
    words[words.index(option) + 1] = value
    return words


def _data(value: str, folder: Path) -> list[str]:
    return ["--data", value, "--weights", "none", "--output", str(folder / "out")]


def runs() -> Iterator[Case]:
    """Folders of a run that somebody spoilt, to go on from."""
    files = {
        "empty": b"",
        "zeros": bytes(30),
        "text": b"hello",
        "list": b"[]",
        "null": b"null",
        "number": b"3",
        "open": b"{",
        "bytes": b"\xff\xfe\x80",
        "object": b'{"a": 3}',
    }
    for name, data in files.items():
        for file in ("last_checkpoint", "config.yaml", "metrics.json", "run.lock"):
            write = partial(_spoilt_run, file, data)
            outcome = Either((Refused((file,)), Works()))
            yield Case("runs", "resume", f"{file} {name}", write, outcome)
        for file in ("config.yaml", "data/datasets.json", "data/custom_train.json"):
            write = partial(_spoilt_custom_run, file, data)
            outcome = Refused((Path(file).name,))
            yield Case("runs", "train-custom-resume", f"{file} {name}", write, outcome)


def _spoilt_run(file: str, data: bytes, folder: Path) -> list[str]:
    from tests.corpus.checkpoints import finished_folder

    shutil.copytree(finished_folder(), folder / "out")
    (folder / "out" / file).write_bytes(data)
    return ["--resume", *training_words(folder, write_scene(folder), "SOLVER.MAX_ITER", 3)]


@cache
def _planned() -> Path:
    from tests.corpus.ways import plan

    folder = model_folder() / "planned"
    folder.mkdir()
    plan(custom_words(folder, write_scene(folder)))
    return folder / "out"


def _spoilt_custom_run(file: str, data: bytes, folder: Path) -> list[str]:
    shutil.copytree(_planned(), folder / "out")
    (folder / "out" / file).write_bytes(data)
    return ["--resume", "--output", str(folder / "out")]


def evaluations() -> Iterator[Case]:
    """What an evaluation is given besides."""

    def case(name: str, *words: str, expected: str) -> Case:
        write = lambda f: [*evaluation_words(f, write_scene(f)), *words]  # noqa: E731
        return Case("options", "evaluate", name, write, Refused((expected,)))

    yield case("no weights", "MODEL.WEIGHTS", "", expected="MODEL.WEIGHTS")
    yield case("no dataset", "DATASETS.TEST", "()", expected="DATASETS.TEST")
    yield case("unknown dataset", "DATASETS.TEST", "('mine',)", expected="'mine'")
    yield case("three classes", "MODEL.MASK_DINO.NUM_CLASSES", "3", expected="NUM_CLASSES is 3")


def cases() -> list[Case]:
    """All of them."""
    groups = (videos, exported, paths, runs, evaluations, backbones)
    return [case for group in groups for case in group()]

"""Checkpoints of any content: to predict with, to start from, to evaluate, to go on from."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from torch import Tensor

from maskdino.cli import train
from tests.corpus.case import TRAP, Case, Either, Outcome, Refused, Works, by_way
from tests.corpus.scene import NAME, custom_words, evaluation_words, training_words, write_scene
from tests.corpus.small_model import model_folder, prediction_words

KIND = "checkpoints"
WAYS = ("predict", "train", "evaluate", "resume", "train-custom")
State = dict[str, Tensor]
Content = Callable[[State, str], object]


@dataclass(frozen=True)
class File:
    """A file in the place of a checkpoint.

    Attributes:
        name: of what is wrong with it.
        content: what is saved in it, made of the right weights and the name of one of them; or a
            function that writes bytes, given the bytes of a right one.
        outcome: of all ways.
        others: of single ways.
        suffix: of the file.
    """

    name: str
    content: Content | Callable[[bytes], bytes]
    outcome: Outcome
    others: dict[str, Outcome]
    suffix: str = ".pth"
    is_bytes: bool = False


class Trap:
    """Its pickle makes a folder where it is read."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (TRAP,)


def refused(name: str, content: Content, *words: str, **others: Outcome) -> File:
    """Nothing can be done with it; what differs may be listed."""
    return File(name, content, Refused((r"bad\.", *words), lines=25), by_way(others))


def works(name: str, content: Content, **others: Outcome) -> File:
    """It is read."""
    return File(name, content, Works(), by_way(others))


def of_bytes(name: str, change: Callable[[bytes], bytes], suffix: str = ".pth") -> File:
    """Refused, whatever the way."""
    return File(name, change, Refused((rf"bad\{suffix}",)), {}, suffix, is_bytes=True)


def of_pickle(name: str, content: object) -> File:
    """A `.pkl` file that is refused."""
    data = pickle.dumps(content)
    return of_bytes(name, lambda _: data, ".pkl")


def contents() -> Iterator[File]:
    """What is in no checkpoint."""
    bare = {"resume": Refused(("state of a training|no checkpoint|bad",), lines=25)}
    for name, value, word in (
        ("a list", [torch.ones(1)], "a list of 1"),
        ("a number", 3, "a int"),
        ("a text", "weights", "a str"),
        ("none", None, "None"),
        ("a tensor", torch.ones(2), "a Tensor"),
        ("an empty dict", {}, "no weights at all"),
        ("model none", {"model": None}, "its weights are None"),
        ("model a list", {"model": [torch.ones(1)]}, "a list of 1"),
        ("model a tensor", {"model": torch.ones(1)}, "a Tensor"),
        ("model a number", {"model": 3}, "a int"),
        ("model empty", {"model": {}}, "no weights at all"),
        ("optimizer alone", {"optimizer": {"state": {}}, "iteration": 3}, "optimizer"),
        ("numbered weights", {"model": {1: torch.ones(1)}}, "'1'"),
        ("texts as weights", {"model": {"a": "b"}}, "'a': a str"),
        ("lists as weights", {"model": {"a": [1.0]}}, "'a': a list"),
        ("nested weights", {"model": {"a": {"b": torch.ones(1)}}}, "'a': a dict"),
        ("none as weight", {"model": {"a": None}}, "'a': None"),
        ("state dict none", {"state_dict": None}, "its weights are None"),
    ):
        yield refused(name, lambda _, __, v=value: v, word)
    for name, thing in (("code", Trap()), ("code among weights", {"model": {"a": Trap()}})):
        yield refused(name, lambda _, __, t=thing: t, "could run code|no checkpoint")
    yield works("model_state", lambda state, _: {"model_state": state}, **bare)
    yield works("state_dict", lambda state, _: {"state_dict": state}, **bare)
    yield works("bare weights", lambda state, _: dict(state), **bare)
    yield works("module prefix", lambda s, _: {"model": {f"module.{k}": v for k, v in s.items()}})
    yield works("half", lambda state, _: {"model": {k: _half(v) for k, v in state.items()}})
    yield works("double", lambda s, _: {"model": {k: v.double() for k, v in s.items()}})
    yield works("more keys", lambda s, _: {"model": s, "epoch": 3, "mine": [1, "a"]}, **bare)
    yield works(
        "parameters",
        lambda s, _: {"model": {k: _parameter(v) for k, v in s.items()}},
    )
    arrays = {"resume": Refused(("bad",), lines=25)}
    yield refused(
        "numpy arrays", lambda s, _: {"model": {k: v.numpy() for k, v in s.items()}}, **arrays
    )


def _half(x: Tensor) -> Tensor:
    return x.half() if x.is_floating_point() else x


def _parameter(x: Tensor) -> Tensor:
    return torch.nn.Parameter(x, requires_grad=False)


def spoilt_weights() -> Iterator[File]:
    """One tensor is another."""
    changes: dict[str, tuple[Callable[[Tensor], object], str]] = {
        "not a number": (lambda x: x * float("nan"), "not finite"),
        "one not a number": (
            lambda x: x.flatten().index_fill(0, torch.tensor([0]), float("nan")).reshape(x.shape),
            "not finite",
        ),
        "infinite": (lambda x: x / 0, "not finite"),
        "complex": (lambda x: x.to(torch.complex64), "complex64"),
        "integers": (lambda x: x.long(), "int64"),
        "bytes": (lambda x: x.byte(), "uint8"),
        "bools": (lambda x: x > 0, "bool"),
        "of another shape": (lambda x: x[..., :1].repeat_interleave(3, -1), ""),
        "flat": (lambda x: x.flatten(), ""),
        "a number": (lambda x: x.sum(), ""),
        "empty": (lambda x: x[:0], ""),
        "sparse": (lambda x: x.to_sparse(), ""),
        "quantized": (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), ""),
        "of shape alone": (lambda x: x.to("meta"), "no values|meta"),
        "float8": (lambda x: x.to(torch.float8_e4m3fn), ""),
    }
    for name, (change, word) in changes.items():

        def content(state: State, key: str, change: Callable = change) -> object:
            return {"model": {**state, key: change(state[key])}}

        outcome = Refused((r"bad\.pth", word), lines=25)
        if name == "float8":
            outcome = Either((outcome, Works()))
        # A plan looks at shapes alone; what follows is that of "train".
        yield File(
            f"a weight {name}", content, outcome, {"train-custom": Either((outcome, Works()))}
        )

    def without(state: State, key: str) -> object:
        return {"model": {k: v for k, v in state.items() if k != key}}

    lacks = refused("a weight missing", without, "not in the file|lacks|differ")
    yield replace(lacks, others={"train-custom": Either((lacks.outcome, Works()))})


def damaged() -> Iterator[File]:
    """Bytes that are none of a checkpoint, or not all of them."""
    for name, data in {
        "empty file": b"",
        "text": b"hello, this is no checkpoint\n",
        "zeros": bytes(1000),
        "html": b"<!DOCTYPE html><html></html>",
        "zip": b"PK\x03\x04" + bytes(100),
        "random": bytes((i * 7919) % 251 for i in range(3000)),
        "lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n",
        "json": b'{"model": {}}',
        "pickle of protocol 0": b"cos\nmkdir\n(S'trap'\ntR.",
        "pickle of protocol 2": b"\x80\x02cos\nmkdir\nX\x04\x00\x00\x00trap\x85R.",
        "pickle that never ends": b"\x80\x02" + b"(" * 100_000,
        "pickle of a huge number": b"\x80\x02\x8b\xff\xff\xff\x7f",
    }.items():
        yield of_bytes(name, lambda _, data=data: data)
        if name not in ("zip", "json"):
            yield of_bytes(f"{name} called pkl", lambda _, data=data: data, ".pkl")
    for percent in (1, 10, 50, 90, 99):
        yield of_bytes(f"cut at {percent} %", lambda x, p=percent: x[: len(x) * p // 100])
    yield of_bytes("without its end", lambda x: x[:-10])
    for seed in range(12):
        outcome = Either((Refused(("bad|state of a training",), lines=25), Works()))
        yield File(f"damaged, {seed}", partial(_flipped, seed=seed), outcome, {}, is_bytes=True)
    yield of_pickle("list in pkl", [np.ones(2)])
    yield of_pickle("number in pkl", 3)
    yield of_pickle("nothing in pkl", {})
    yield of_pickle("texts in pkl", {"model": {"a": "b"}, "__author__": "me"})
    yield of_pickle("blobs none in pkl", {"blobs": None})
    yield of_pickle("code in pkl", Trap())
    yield of_pickle("code among arrays in pkl", {"model": {"a": Trap()}})
    foreign = of_pickle("arrays of no model in pkl", {"surprise": np.ones((3, 3), np.float32)})
    yield replace(foreign, others={"train-custom": Works()})  # a training tells
    yield of_pickle("arrays of texts in pkl", {"surprise": np.array(["a"])})
    yield of_pickle("arrays of objects in pkl", {"surprise": np.array([None, {}])})


def _flipped(data: bytes, seed: int) -> bytes:
    generator = np.random.default_rng(seed)
    changed = bytearray(data)
    for place in generator.integers(0, len(data), 1 + 20 * seed):
        changed[place] ^= int(generator.integers(1, 256))
    return bytes(changed)


@cache
def finished_folder() -> Path:
    """The output of a run of two iterations."""
    folder = model_folder() / "run"
    folder.mkdir()
    train.main(training_words(folder, write_scene(folder), "SOLVER.MAX_ITER", 2))
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)
    return folder / "out"


def _finished_run() -> dict[str, Any]:
    """Its last checkpoint."""
    return torch.load(finished_folder() / "model_final.pth", weights_only=True)


def right_state(way: str) -> tuple[State, str]:
    """The weights of the model of a way, and the name of one of its matrices."""
    if way in ("predict", "train-custom"):
        return torch.load(model_folder() / "weights.pth")["model"], "heads.class_head.weight"
    return _finished_run()["model"], "head.weight"


def words_of(way: str, folder: Path, path: Path) -> list[str]:
    """The words of a command that reads a checkpoint."""
    scene = write_scene(folder)
    if way == "predict":
        words = ["--input", folder / "images" / "a.png", "--output", folder / "out"]
        return prediction_words(*words, weights=path)
    if way == "train":
        return training_words(folder, scene, "MODEL.WEIGHTS", path)
    if way == "evaluate":
        return [*evaluation_words(folder, scene), "MODEL.WEIGHTS", str(path)]
    if way == "train-custom":
        words = custom_words(folder, scene, "--config-file", model_folder() / "config.yaml")
        words[words.index("none")] = str(path)
        return words
    out = folder / "out"
    out.mkdir()
    if path.exists():
        shutil.move(path, out / path.name)
    (out / "last_checkpoint").write_text(path.name)
    return ["--resume", *training_words(folder, scene, "SOLVER.MAX_ITER", 3)]


def _write(file: File, way: str, folder: Path) -> list[str]:
    state, key = right_state(way)
    path = folder / f"bad{file.suffix}"
    if file.is_bytes:
        good = folder / "good.pth"
        torch.save(_finished_run() if way == "resume" else {"model": state}, good)
        path.write_bytes(file.content(good.read_bytes()))  # type: ignore[call-arg, arg-type]
    else:
        content = file.content(state, key)  # type: ignore[call-arg]
        if way == "resume" and isinstance(content, dict) and "model" in content:
            content = {**_finished_run(), **content} if len(content) == 1 else content
        torch.save(content, path)
    return words_of(way, folder, path)


def cases() -> list[Case]:
    """Every file on every way."""
    found = []
    for group in (contents, spoilt_weights, damaged):
        for file in group():
            for way in WAYS:
                outcome = file.others.get(way, file.outcome)
                write = partial(_write, file, way)
                found.append(Case(KIND, way, file.name, write, outcome))
    return found

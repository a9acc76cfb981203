"""Drawing images, videos and what a camera sees: which files come out, and what is said."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from maskdino.cli import predict
from maskdino.custom.annotations import read_annotations
from maskdino.custom.checks import check
from maskdino.inference import large_result, sliced, streams, video
from maskdino.inference.predictor import MaskDINOPredictor
from maskdino.model import MaskDINO
from tests.helpers import tiny_cfg
from tests.inference.media import (
    FakeCapture,
    damage_middle,
    frames_of,
    save_image,
    save_noise,
    save_video,
)
from tests.inference.test_streams import Server

Run = Callable[..., int]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Command line of a narrow model with random weights."""
    torch.manual_seed(0)  # of which weights it is, it depends whether anything is found
    folder = tmp_path_factory.mktemp("model")
    cfg = tiny_cfg()
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, cfg.INPUT.FORMAT = 64, 96, "RGB"
    (folder / "config.yaml").write_text(cfg.dump())
    torch.save({"model": MaskDINO(cfg).state_dict()}, folder / "weights.pth")
    words = ["--config-file", str(folder / "config.yaml"), "--confidence-threshold", "0"]
    return [*words, "--max-detections", "2", "--opts", "MODEL.WEIGHTS", str(folder / "weights.pth")]


@pytest.fixture
def run(tmp_path: Path, model: list[str]) -> Run:
    """Runs the command with its output in `out`; returns its exit status."""

    def run(*words: str | Path) -> int:
        out = [] if "--output" in words else ["--output", str(tmp_path / "out")]
        try:
            return predict.main([*map(str, words), *out, *model])
        except SystemExit as end:  # as Python does at the end of a program
            if isinstance(end.code, str):
                sys.stderr.write(f"{end.code}\n")
                return 1
            return int(end.code or 0)

    return run


def test_broken_images_are_named_and_the_others_drawn(
    tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    save_image(folder / "a.png")
    save_image(folder / "b.jpg")
    (folder / "broken.png").write_text("no image")
    (folder / "notes.txt").write_text("not asked for")
    assert run("--input", folder, tmp_path / "gone.png", "--json") == 1
    printed = capsys.readouterr()
    assert "2 of 4 files drawn" in printed.out
    assert "broken.png: cannot identify its format\n" in printed.err
    assert "gone.png does not exist" in printed.err
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["a.png", "a.png.json", "b.jpg", "b.jpg.json"]
    drawn = np.array(Image.open(tmp_path / "out" / "a.png"))
    assert drawn.shape == (48, 64, 3)
    assert (drawn != 90).any()


@pytest.mark.skipif(os.name != "posix", reason="no named pipes on Windows")
@pytest.mark.parametrize("words", [[], ["--slice", "64"]])
def test_pipes_are_no_images(
    tmp_path: Path, run: Run, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "a.png")  # as `--input <(curl ...)` gives; nobody writes to this one
    assert run("--input", tmp_path / "a.png", *words) == 1
    assert f"error: image {tmp_path / 'a.png'} is no file" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_where_nothing_is_found_a_lower_threshold_is_named(
    tmp_path: Path, model: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    save_image(tmp_path / "a.png")
    words = ["--input", str(tmp_path / "a.png"), "--output", str(tmp_path / "out")]
    for threshold, is_said in (("1", True), ("0", False)):
        of_model = [threshold if word == "0" else word for word in model]
        assert predict.main([*words, "--task", "instance", *of_model]) == 0
        hint = (
            "no object has a score of 1 or more: --confidence-threshold 0.5 shows less certain ones"
        )
        assert (hint in capsys.readouterr().out) == is_said


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("gpu", "the device asked for is 'gpu', which is no device"),
        ("cuda:7", "the device asked for is cuda:7, but "),
    ],
)
def test_devices_that_do_not_exist(
    tmp_path: Path, run: Run, device: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--input", save_image(tmp_path / "a.png"), "--device", device) == 1
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {message}") and printed.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--input", "a.png", "--webcam"], "give either --input or --webcam"),
        (["--webcam", "-1"], "--webcam -1: cameras are numbered from 0"),
        (["--webcam", "--backend", "onnx"], "--backend onnx needs --model"),
        (["--webcam", "--model", "m.onnx"], "takes no --model"),
    ],
)
def test_arguments_that_do_not_fit(
    run: Run, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*words) == 2
    assert message in capsys.readouterr().err


def test_no_objects_at_all_are_not_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--config-file F --input a.png --output out --max-detections 0"
    with pytest.raises(SystemExit):
        predict.parse_arguments(words.split())
    assert "--max-detections 0: it must be 1 or more" in capsys.readouterr().err


def test_weights_go_before_the_configuration(
    tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--input", save_image(tmp_path / "a.png"), "--weights", tmp_path / "w.pth") == 1
    assert f"there is no checkpoint {tmp_path / 'w.pth'}" in capsys.readouterr().err


def test_help_fits_a_screen(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit, match="0"):
        predict.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 100


def test_commands_of_the_page_are_understood(repository: Path) -> None:
    lines = (repository / "demo" / "README.md").read_text().splitlines()
    commands = [shlex.split(line) for line in lines if line.startswith("maskdino predict ")]
    assert len(commands) == 11
    for words in commands:
        arguments = predict.parse_arguments(words[2:])
        assert arguments.output == Path("drawn") or arguments.coco.stem == "labels"


def test_order_is_kept_and_errors_are_handed_on() -> None:
    written: list[int] = []
    predict.run_overlapped(range(10), lambda batch: [sum(batch)], written.append, 3)
    assert written == [3, 12, 21, 9]

    def failing() -> Iterator[int]:
        yield 1
        raise OSError("the disk is gone")

    written.clear()
    with pytest.raises(OSError, match="the disk is gone"):
        predict.run_overlapped(failing(), list, written.append, 1)
    assert written == [1]

    def refuse(_: int) -> None:
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        predict.run_overlapped(range(1000), list, refuse, 1)


def test_reading_working_and_writing_overlap() -> None:
    """Each of the three waits for another one to be ahead or behind: in turn they would hang."""
    read_second, working_on_second = threading.Event(), threading.Event()

    def read() -> Iterator[int]:
        for i in range(4):
            if i == 1:
                read_second.set()
            yield i

    def work(batch: list[int]) -> list[int]:
        assert read_second.wait(timeout=30), "nothing was read while the first item was worked on"
        if batch == [1]:
            working_on_second.set()
        return batch

    def write(item: int) -> None:
        ahead = item > 0 or working_on_second.wait(timeout=30)
        assert ahead, "nothing was worked on while the first item was written"

    predict.run_overlapped(read(), work, write, 1)


class TestVideos:
    """What needs PyAV."""

    @pytest.fixture(autouse=True)
    def _pyav(self) -> None:
        pytest.importorskip("av")

    def test_rate_size_and_number_of_frames_are_kept(self, tmp_path: Path, run: Run) -> None:
        clip = save_video(tmp_path / "clip.mp4")
        assert run("--input", clip, "--batch-size", "4") == 0
        rate, frames = frames_of(tmp_path / "out" / "clip.mp4")
        assert (rate, len(frames), frames[0].shape) == (10, 6, (48, 64, 3))
        changed = [
            np.abs(a.astype(int) - b) for a, b in zip(frames, frames_of(clip)[1], strict=True)
        ]
        assert min(change.max() for change in changed) > 50

    def test_damage_is_told_in_one_line(
        self, tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The others keep their times, and other files go on."""
        clips = [tmp_path / "clip.mp4", tmp_path / "film.avi", tmp_path / "cut.mp4"]
        for path, how in zip(clips, ("zeros", "cut", "cut"), strict=True):
            content = save_noise(path, "mjpeg" if path.suffix == ".avi" else "libx264")
            damage_middle(content, how)
            path.write_bytes(content)
        assert run("--input", *clips) == 1
        printed = capsys.readouterr()
        assert "2 of 3 files drawn" in printed.out
        told = [line for line in printed.err.splitlines() if line.startswith("error: ")]
        for path, line in zip(clips[:2], told, strict=False):
            left = len(frames_of(tmp_path / "out" / f"{path.stem}.mp4")[1])
            assert line == (
                f"error: video {path}: skipped {30 - left} of 30 frames, damaged or missing"
            )
        assert told[2] == f"error: cannot read video {clips[2]}: it is none, or is damaged"

    def test_nothing_of_it_can_be_decoded(
        self, tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
    ) -> None:
        content = save_noise(tmp_path / "clip.mp4", "libx264")
        begin = content.index(b"mdat") + 4
        content[begin : content.index(b"moov") - 4] = bytes(content.index(b"moov") - 4 - begin)
        (tmp_path / "clip.mp4").write_bytes(content)
        assert run("--input", tmp_path / "clip.mp4") == 1
        assert "clip.mp4: none of its frames can be decoded" in capsys.readouterr().err
        assert list((tmp_path / "out").iterdir()) == []

    def test_output_that_cannot_be_written(
        self, tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
    ) -> None:
        clip = save_video(tmp_path / "clip.mp4", 2)
        (tmp_path / "out" / "clip.mp4").mkdir(parents=True)
        assert run("--input", clip) == 1
        assert f"cannot write {tmp_path / 'out' / 'clip.mp4'}: it is a folder" in (
            capsys.readouterr().err
        )
        assert run("--input", clip, "--output", clip) == 1
        assert capsys.readouterr().err == f"error: --output {clip} is a file: give a folder\n"

    def test_interrupted_video_can_be_played(
        self, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        interrupt_after(3, monkeypatch)
        assert run("--input", save_video(tmp_path / "clip.mp4", 8)) == 130
        assert len(frames_of(tmp_path / "out" / "clip.mp4")[1]) == 3

    def test_camera_until_interrupted(
        self,
        tmp_path: Path,
        run: Run,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        for name in ("camera_2.mp4", "camera_2_2.mp4"):  # the second keeps the first
            use_camera([0, 50, None, *range(100, 120)], monkeypatch)
            interrupt_after(4, monkeypatch)
            assert run("--webcam", "2") == 130
            path = tmp_path / "out" / name
            assert f"leaves {path}" in capsys.readouterr().err
            assert len(frames_of(path)[1]) == 4
            monkeypatch.undo()

    def test_camera_that_goes_away(
        self,
        tmp_path: Path,
        run: Run,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        capture = use_camera([0, 1, 2], monkeypatch)
        assert run("--webcam") == 1
        path = tmp_path / "out" / "camera_0.mp4"
        message = f"error: camera 0 gave no image for 5 s; what it saw before is in {path}"
        assert message in capsys.readouterr().err
        assert len(frames_of(path)[1]) == 3
        assert capture.released

    def test_identities_and_frames_that_are_left_out(
        self, tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """A video and a stream of it, in one dataset; what is in it is in the files beside them."""
        clip = save_video(tmp_path / "clip.mp4", 7)
        with Server(clip.read_bytes()) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            words = ["--input", clip, server.address, "--track", "--every", "3"]
            assert run(*words, "--coco", tmp_path / "vis.json", "--batch-size", "2") == 0
            server.shutdown()
        printed = capsys.readouterr()
        assert "2 of 2 files drawn" in printed.out and "secret" not in printed.out + printed.err
        assert "clip.mp4: objects seen in 3 frames or more: " in printed.out
        assert "3/3 frames" in printed.err and "frames/s" in printed.err
        data = json.loads((tmp_path / "vis.json").read_text())
        names = [video["file_names"][2] for video in data["videos"]]
        assert names[0] == "clip/00006.jpg" and names[1].startswith("127_0_0_1_")
        out = sorted(path.name for path in (tmp_path / "out").iterdir())
        assert len(out) == 4 and out[2:] == ["clip.mp4", "clip.mp4.json"]
        for name in out[::2]:
            rate, frames = frames_of(tmp_path / "out" / name)
            assert (rate, len(frames)) == (pytest.approx(10 / 3, abs=0.01), 3)
            file = json.loads((tmp_path / "out" / f"{name}.json").read_text())
            assert [frame["frame"] for frame in file["frames"]] == [0, 3, 6]
            assert len(file["frames"][0]["objects"]) == 2 == len(file["frames"][2]["objects"])
        assert {x["video_id"] for x in data["annotations"]} == {1, 2}

    def test_stream_that_breaks_off(
        self,
        tmp_path: Path,
        run: Run,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        """What was seen can be played; files beside it go on."""
        monkeypatch.setattr(streams, "WAIT", 0.01)
        content = bytes(save_noise(tmp_path / "noise.mkv", "libx264", cluster_time_limit="300"))
        with Server(content) as server:
            server.ranges, server.rest = False, len(content) // 2
            threading.Thread(target=server.serve_forever, daemon=True).start()
            other = save_image(tmp_path / "a.png")
            assert run("--input", server.address, other, "rtsp://127.0.0.1:9/x") == 1
            server.shutdown()
        printed = capsys.readouterr()
        assert "1 of 3 files drawn" in printed.out and "secret" not in printed.err
        told = [line for line in printed.err.splitlines() if line.startswith("error: ")]
        (path,) = (tmp_path / "out").glob("127*.mp4")
        assert len(told) == 2 and "broke off" in told[0]
        assert told[0].endswith(f"; what it saw before is in {path}")
        assert told[1].startswith("error: cannot open rtsp://127.0.0.1:9/x: ")
        assert 8 <= len(frames_of(path)[1]) <= 20

    def test_camera_that_does_not_exist(self, run: Run, capfd: pytest.CaptureFixture[str]) -> None:
        assert run("--webcam", "97") == 1
        # Above it may stand what logging says of streams that earlier tests closed.
        last = capfd.readouterr().err.splitlines()[-1]
        assert last.startswith("error: cannot open camera 97: there is none")


def interrupt_after(calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Presses Ctrl-C while the model works on the batch after so many."""
    stream = MaskDINOPredictor.stream
    done: list[int] = []

    def interrupted(self: MaskDINOPredictor, images: Iterator) -> Iterator:
        if len(done) == calls:
            raise KeyboardInterrupt
        done.append(1)
        return stream(self, images)

    monkeypatch.setattr(MaskDINOPredictor, "stream", interrupted)


def use_camera(values: list[int | None], monkeypatch: pytest.MonkeyPatch) -> FakeCapture:
    """Puts a stand-in in the place of all cameras."""
    capture, opened = FakeCapture(values), cv2.VideoCapture
    monkeypatch.setattr(
        video.cv2, "VideoCapture", lambda x: capture if isinstance(x, int) else opened(x)
    )
    monkeypatch.setattr(video, "time", capture.clock)
    return capture


def test_without_pyav_only_videos_are_refused(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    assert run("--input", save_image(tmp_path / "a.png")) == 0
    capsys.readouterr()
    (tmp_path / "clip.mp4").touch()
    assert run("--input", tmp_path / "a.png", tmp_path / "clip.mp4") == 1
    assert capsys.readouterr().err == "error: videos need PyAV: pip install av\n"


def test_one_dataset_of_all_images(
    tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """It can be trained on as it is; broken images are named, and not in it."""
    folder = tmp_path / "in"
    for name in ("a.png", "b.png"):
        save_image(folder / name)
    (folder / "broken.png").write_text("no image")
    target = tmp_path / "labels.json"
    words = ["--coco", target, "--polygons", "1", "--class-thresholds", "class 0=0.9"]
    assert run("--input", folder, *words, "--output", tmp_path / "out") == 1
    printed = capsys.readouterr()
    assert "broken.png" in printed.err
    data = read_annotations(target, folder)
    assert not [finding for finding in check(data) if finding.fatal]
    assert [image["file_name"] for image in data.images] == ["a.png", "b.png"]
    assert f"{len(data.annotations)} objects of 2 images in {target}" in printed.out
    assert len(data.annotations) > 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "b.png"]


@pytest.mark.parametrize("task", ["panoptic", "semantic"])
def test_one_dataset_of_segments_or_classes(
    task: str, tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.png", "b.png"):
        save_image(tmp_path / "in" / name)
    target = tmp_path / ("labels.json" if task == "panoptic" else "labels")
    words = ["--task", task, "--coco", target]
    assert run("--input", tmp_path / "in", *words) == 0
    assert f"2 {'images' if task == 'panoptic' else 'label images'} in {target}" in (
        capsys.readouterr().out
    )
    images = sorted(path.name for path in (tmp_path / "labels").glob("*.png"))
    assert images == ["a.png", "b.png"]
    beside = target if task == "panoptic" else target / "classes.txt"
    assert "class 0" in beside.read_text()
    # Ways that do not fit: a folder for a file, and the other way round.
    if task == "panoptic":
        target, message = tmp_path / "in", "is a folder: give a file"
    else:
        target, message = beside, "is a file: label images need a folder"
    assert run("--input", tmp_path / "in", "--task", task, "--coco", target) == 1
    assert message in capsys.readouterr().err
    # Drawings would replace label images, and these the inputs.
    assert run("--input", tmp_path / "in", *words, "--output", tmp_path / "labels") == 1
    assert "labels is the folder of the label images" in capsys.readouterr().err
    target = tmp_path / ("in.json" if task == "panoptic" else "in")
    assert run("--input", tmp_path / "in", "--task", task, "--coco", target) == 1
    assert "a.png is an input: choose another folder for --coco" in capsys.readouterr().err


def test_what_is_said_stands_on_a_line_of_its_own(
    tmp_path: Path, run: Run, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sliced._say_that_it_fits.cache_clear()
    # As in a new process: trainings in this one have opened logs.
    for name in ("maskdino", None):
        monkeypatch.setattr(logging.getLogger(name), "handlers", [])
    monkeypatch.setattr(logging.getLogger("maskdino"), "propagate", True)
    assert run("--input", save_image(tmp_path / "a.png"), "--slice", "4000") == 0
    printed = capfd.readouterr().err.replace("\r", "\n").splitlines()
    assert "images that fit into one slice of 4000 pixels are predicted as they are" in printed


def test_large_images_in_slices(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What Pillow holds for an attack is predicted, and drawn scaled down."""
    save_image(tmp_path / "in" / "small.png")
    Image.new("RGB", (300, 200)).save(tmp_path / "in" / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    monkeypatch.setattr(large_result, "LONGEST_DRAWN", 101)
    words = ["--slice", "96", "--overlap", "0.3", "--json"]
    assert run("--input", tmp_path / "in", *words) == 0
    assert "2 of 2 files drawn" in capsys.readouterr().out
    with Image.open(tmp_path / "out" / "large.png") as drawn:
        assert drawn.size == (100, 67)
    saved = json.loads((tmp_path / "out" / "large.png.json").read_text())
    assert (saved["height"], saved["width"]) == (200, 300) and saved["instance"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--polygons", "1"], "--polygons is of --coco"),
        (["--coco", "o.json", "--task", "semantic"], "label images need a folder"),
        (["--coco", "labels", "--task", "panoptic"], "give it a suffix, as labels.json"),
        (
            ["--coco", "o.json", "--polygons", "1", "--task", "semantic"],
            "are of objects, not of --task semantic",
        ),
        (["--slice", "9"], "slices of 9 pixels are too small: at least 48"),
        (["--slice", "99", "--overlap", "1"], "slices that overlap by 1.0"),
        (["--coco", "."], "--coco . is a folder: give a file"),
        (["--coco", "o.json", "--polygons", "-1"], "polygons within -1.0 pixels"),
        (["--class-thresholds", "cat"], "thresholds 'cat': they must be name=score"),
        (["--class-thresholds", "cat=0.5"], "there is no class cat; the classes are class 0,"),
        (["--slice", "99", "--input", "clip.mp4"], "--slice are of images: clip.mp4"),
        (["--coco", "o.json", "--input", "clip.mp4"], "--coco of videos needs --track"),
        (
            ["--coco", "o.json", "--track", "--input", "a.mp4", "b.png"],
            "no images beside them: a.mp4",
        ),
        (["--track"], "--track and --every are of videos, streams and cameras"),
        (["--track", "--task", "semantic"], "--track is of objects, not of --task semantic"),
        (["--every", "0"], "--every 0: it must be 1 or more"),
        (["--size", "-1"], "edges of -1 to -1 pixels (size, INPUT.MIN_SIZE_TEST"),
        (["--batch-size", "0"], "the batch size is 0; it must be at least 1"),
        (
            ["--batch-size", str(10**21)],
            f"the batch size is {10**21}; it must be at least 1, and at",
        ),
        (["--device", "meta"], "asked for is meta, which computes no values"),
    ],
)
def test_labels_and_slices_that_do_not_fit(
    tmp_path: Path, run: Run, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--input", save_image(tmp_path / "a.png"), *words) > 0
    (line,) = (x for x in capsys.readouterr().err.splitlines() if "error: " in x)
    assert message in line
    assert not (tmp_path / "out").exists()

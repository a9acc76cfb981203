"""Objects of whole videos: one identity through an occlusion, in drawings and both files."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as mask_utils

from maskdino.cli.predict_videos import WantedOfVideos, draw_frames, draw_video
from maskdino.inference.tracking import Tracker
from maskdino.inference.video import VideoReader, VideoWriter
from maskdino.inference.video_results import VideoLabels, follow
from maskdino.visualization import results
from tests.inference.media import frames_of
from tests.inference.moving import CATEGORIES, RATE, SIZE, Mover, Oracle, Scene, line

pytest.importorskip("av")
RED, BLUE = (230, 40, 40), (40, 40, 230)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Scene]:
    """A ball and a box pass behind a pillar, one after the other."""
    movers = [
        Mover(RED, line((20, 40), (3, 0), 60), disk=True, size=(30, 30)),
        Mover(BLUE, line((215, 85), (-3, 0), 60)),
    ]
    scene = Scene(movers, pillar=(90, 150))
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    with closing(VideoWriter(path, RATE)) as writer:
        for i, image in enumerate(scene.images()):
            writer.write(image, i / RATE)
    return path, scene


@pytest.mark.parametrize("panoptic", [False, True])
@pytest.mark.parametrize("every", [1, 3])
def test_identities_in_all_files(
    panoptic: bool,
    every: int,
    clip: tuple[Path, Scene],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, scene = clip
    labels = VideoLabels(CATEGORIES)
    wanted = WantedOfVideos(track=True, threshold=0.5, every=every, labels=labels)
    assert draw_video(Oracle(panoptic=panoptic), path, tmp_path / "out.mp4", wanted) == ""
    assert "objects seen in 3 frames or more: 1 ball, 1 box\n" in capsys.readouterr().out
    rate, drawn = frames_of(tmp_path / "out.mp4")
    assert (rate, len(drawn)) == (pytest.approx(RATE / every), -(-60 // every))

    file = json.loads((tmp_path / "out.mp4.json").read_text())
    assert (file["video"], file["height"], file["width"]) == ("clip.mp4", *SIZE)
    assert file["counts"] == {"ball": 1, "box": 1}
    assert [frame["frame"] for frame in file["frames"]] == list(range(0, 60, every))
    seconds = [frame["seconds"] for frame in file["frames"]]
    assert seconds == pytest.approx([i / RATE for i in range(0, 60, every)])
    ids = {x["category_name"]: x["id"] for x in file["identities"]}
    assert sorted(ids.values()) == [1, 2]
    gaps = 0
    for frame in file["frames"]:
        truth = dict(scene.seen(frame["frame"]))
        found = {x["id"]: x for x in frame["objects"]}
        gaps += len(truth) < 2
        for mover, name in ((1, "ball"), (2, "box")):
            if mover in truth and truth[mover].sum() > 300:
                entry = found[ids[name]]
                assert entry["category_id"] == {"ball": 5, "box": 9}[name]
                mask = mask_utils.decode(entry["segmentation"]).astype(bool)
                common = (mask & truth[mover]).sum() / (mask | truth[mover]).sum()
                assert common > 0.8 and entry["score"] == 0.9
    assert gaps >= 10 // every
    seen = {x["id"]: x["frames"] for x in file["identities"]}

    labels.write(tmp_path / "vis.json")
    data = json.loads((tmp_path / "vis.json").read_text())
    (video,) = data["videos"]
    assert video["length"] == len(video["file_names"]) == len(drawn)
    assert video["file_names"][1] == f"out/{every:05d}.jpg"
    assert [x["category_id"] for x in data["annotations"]] in ([5, 9], [9, 5])
    assert data["categories"] == [{"id": 5, "name": "ball"}, {"id": 9, "name": "box"}]
    for entry in data["annotations"]:
        here = [mask is not None for mask in entry["segmentations"]]
        assert len(here) == video["length"] and sum(here) in seen.values() and not all(here)
        assert [box is not None for box in entry["bboxes"]] == here
        for mask, area in zip(entry["segmentations"], entry["areas"], strict=True):
            assert (mask is None and area is None) or mask_utils.area(mask) == area
        assert (entry["video_id"], entry["iscrowd"], entry["score"]) == (1, 0, 0.9)


def test_colors_and_names_are_those_of_identities(clip: tuple[Path, Scene]) -> None:
    """Before and after the pillar, whatever the order in which objects are found."""
    tracker, colors = Tracker(), {}
    with closing(VideoReader(clip[0])) as reader:
        for image, seconds in reader:
            (result,) = Oracle().stream([image])
            result = result.select(np.arange(len(result))[::-1])
            seen, regions = follow(result, tracker, seconds, named=True)
            for x, region in zip(seen, regions, strict=True):
                colors.setdefault(x.label, set()).add((x.number, region.color))
                assert region.label == f"#{x.number} {CATEGORIES.names[x.label]} 90"
    assert [len(found) for found in colors.values()] == [1, 1]
    assert len(set.union(*colors.values())) == 2


def test_segments_are_those_of_the_map_which_is_read_once(
    clip: tuple[Path, Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(VideoReader(clip[0])) as reader:
        image = next(iter(reader))[0]
    (result,) = Oracle(panoptic=True).stream([image])
    rles = result.segment_rles()
    things = [i for i, x in enumerate(result.segments) if CATEGORIES.is_thing[x["category_id"]]]
    calls = []

    def counted(read: Callable) -> Callable:
        return lambda labels: calls.append(read) or read(labels)

    for read in (results.encode_map, results.masks_of_map):
        monkeypatch.setattr(results, read.__name__, counted(read))
    seen, _ = follow(result, Tracker(), 0.0, named=True)
    assert len(calls) == 1
    assert [x.rle for x in seen] == [rles[i] for i in things] and seen
    for x in seen:
        left, top, width, height = mask_utils.toBbox(x.rle).tolist()
        assert x.box == (left, top, left + width, top + height)


def test_slices_of_frames_are_said(
    clip: tuple[Path, Scene], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for slices in (None, (64, 0.2)):
        wanted = WantedOfVideos(every=30)
        assert draw_video(Oracle(slices=slices), clip[0], tmp_path / "out.mp4", wanted) == ""
        said.append("clip.mp4: frames are predicted in slices of 64 pix" in capsys.readouterr().err)
    assert said == [False, True]


def test_what_breaks_off_is_kept(clip: tuple[Path, Scene], tmp_path: Path) -> None:
    """An error, or Ctrl-C, leaves files that can be read, with the frames so far."""

    class Breaking:
        name, frames = "stream", None

        def __iter__(self):
            with closing(VideoReader(clip[0])) as reader:
                for i, timed in enumerate(reader):
                    if i == 7:
                        raise OSError("gone")
                    yield timed

    labels = VideoLabels(CATEGORIES)
    wanted = WantedOfVideos(track=True, threshold=0.5, labels=labels)
    writer = VideoWriter(tmp_path / "out.mp4")
    with pytest.raises(OSError, match="gone"), closing(writer):
        draw_frames(Oracle(), Breaking(), writer, wanted)
    frames = len(frames_of(tmp_path / "out.mp4")[1])
    assert frames >= 4
    file = json.loads((tmp_path / "out.mp4.json").read_text())
    assert len(file["frames"]) == labels.videos[0]["length"] == frames
    assert sorted(x.name for x in tmp_path.iterdir()) == ["out.mp4", "out.mp4.json"]


def test_videos_without_objects_or_frames(tmp_path: Path) -> None:
    labels = VideoLabels(CATEGORIES)
    labels.end_video((0, 0))
    assert labels.videos == []
    labels.add_frame("a", 0, [])
    labels.end_video((4, 6))
    labels.write(tmp_path / "vis.json")
    data = json.loads((tmp_path / "vis.json").read_text())
    assert (len(data["videos"]), data["annotations"]) == (1, [])

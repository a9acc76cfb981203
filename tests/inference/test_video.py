"""Videos are read with their times, whole or damaged, and written so that others can play them."""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path

import cv2
import numpy as np
import pytest

from maskdino.inference import video
from maskdino.inference.video import Camera, VideoError, VideoReader, VideoWriter
from tests.inference.media import FakeCapture, damage_middle, frames_of, save_noise, save_video

av = pytest.importorskip("av")


def read(path: Path) -> tuple[VideoReader, list[np.ndarray], list[float]]:
    with closing(VideoReader(path)) as reader:
        timed = list(reader)
    return reader, [image for image, _ in timed], [seconds for _, seconds in timed]


def write(
    path: Path, times: list[float], rate: float = 10, size: tuple[int, int] = (48, 64)
) -> Path:
    """Frame i is gray of value 20 * i."""
    with closing(VideoWriter(path, rate)) as writer:
        for i, seconds in enumerate(times):
            writer.write(np.full((*size, 3), 20 * i, np.uint8), seconds)
    return path


@pytest.mark.parametrize("rate", [10, 25, 60, 24000 / 1001, 30000 / 1001])
def test_constant_rates(tmp_path: Path, rate: float) -> None:
    path = write(tmp_path / "clip.mp4", [i / rate for i in range(12)], rate)
    reader, images, times = read(path)
    assert (reader.rate, reader.frames, reader.skipped) == (rate, 12, 0)
    assert times == pytest.approx([i / rate for i in range(12)], abs=1e-9)
    others_rate, frames = frames_of(path)
    assert others_rate == pytest.approx(rate)
    for images_read in (images, frames):
        assert len(images_read) == 12
        for i, image in enumerate(images_read):
            assert image.shape == (48, 64, 3)
            assert np.abs(image.astype(int) - 20 * i).max() <= 3


def test_varying_rates(tmp_path: Path) -> None:
    times = [0.0, 0.1, 0.15, 2.15, 2.25, 60.0]
    path = write(tmp_path / "clip.mp4", times)
    assert read(path)[2] == pytest.approx(times)
    with av.open(str(path)) as container:
        assert container.duration / 1e6 == pytest.approx(60.1)
    assert len(frames_of(path)[1]) == 6


def test_colors(tmp_path: Path) -> None:
    """As they are written, in this reader and in another one."""
    colors = np.random.default_rng(0).integers(30, 226, (6, 8, 3), np.uint8)
    image = colors.repeat(16, axis=0).repeat(16, axis=1)
    with closing(VideoWriter(tmp_path / "clip.mp4")) as writer:
        writer.write(image, 0)
    other = 4 if int(cv2.__version__.partition(".")[0]) >= 5 else 10  # OpenCV 4 ignores BT.709
    for reader, bound in ((read, 4), (frames_of, other)):
        found = reader(tmp_path / "clip.mp4")[1][0]
        assert np.abs(found[8::16, 8::16].astype(int) - colors).mean() < bound


@pytest.mark.parametrize("size", [(47, 63), (49, 64), (1, 1)])
def test_odd_sizes_get_a_line_more(tmp_path: Path, size: tuple[int, int]) -> None:
    path = write(tmp_path / "clip.mp4", [0, 0.1], size=size)
    frames = frames_of(path)[1]
    assert len(frames) == 2
    for i, frame in enumerate(frames):
        assert frame.shape == (size[0] + size[0] % 2, size[1] + size[1] % 2, 3)
        assert np.abs(frame.astype(int) - 20 * i).max() <= 4


def test_another_size_is_fitted(tmp_path: Path) -> None:
    with closing(VideoWriter(tmp_path / "clip.mp4")) as writer:
        for i, size in enumerate([(48, 64), (96, 128)]):
            writer.write(np.full((*size, 3), 100, np.uint8), i)
    assert [frame.shape for frame in frames_of(tmp_path / "clip.mp4")[1]] == [(48, 64, 3)] * 2


FORMATS = {"a.mp4": "libx264", "b.mp4": "mpeg4", "c.mkv": "libx264", "d.ts": "libx264"}


@pytest.mark.parametrize(("name", "codec"), FORMATS.items())
@pytest.mark.parametrize("how", ["zeros", "noise", "bits"])
def test_damaged_frames_are_left_out(tmp_path: Path, name: str, codec: str, how: str) -> None:
    """The others are what they were, when they were; files with a count tell of all damage."""
    content = save_noise(tmp_path / name, codec)
    _, whole, whole_times = read(tmp_path / name)
    assert len(whole) == 30
    damage_middle(content, how)
    (tmp_path / name).write_bytes(content)
    reader, images, times = read(tmp_path / name)
    assert 18 <= len(images) < 30
    assert (reader.frames is not None) == name.endswith("mp4")
    assert reader.skipped <= 30 - len(images)
    if reader.frames is not None:
        assert reader.skipped == 30 - len(images)
    assert times == sorted(times)
    found = [min(range(30), key=lambda i, t=t: abs(whole_times[i] - t)) for t in times]
    assert [whole_times[i] for i in found] == pytest.approx(times)
    equal = [np.array_equal(whole[i], image) for i, image in zip(found, images, strict=True)]
    # Frames that are whole, but build on a damaged one, may pass.
    assert sum(equal) >= len(equal) - (4 if how == "bits" else 1)


def test_file_that_was_cut_off(tmp_path: Path) -> None:
    for name, codec in (("film.avi", "mjpeg"), ("clip.mp4", "libx264")):
        content = save_noise(tmp_path / name, codec)
        damage_middle(content, "cut")
        (tmp_path / name).write_bytes(content)
    reader, images, _ = read(tmp_path / "film.avi")
    assert (reader.frames, len(images) + reader.skipped) == (30, 30)
    assert 8 <= len(images) <= 15
    with pytest.raises(VideoError, match="clip.mp4: it is none, or is damaged"):
        VideoReader(str(tmp_path / "clip.mp4"))


def test_damaged_beginning(tmp_path: Path) -> None:
    """The first whole frame takes its place, so that the video keeps its length."""
    content = save_noise(tmp_path / "clip.mp4", "libx264")
    begin = content.index(b"mdat") + 4
    content[begin : begin + 4000] = bytes(4000)
    (tmp_path / "clip.mp4").write_bytes(content)
    reader, images, times = read(tmp_path / "clip.mp4")
    assert 1 <= reader.skipped == 30 - len(images)
    assert times[0] == 0
    assert times[1:] == pytest.approx([i / 10 for i in range(31 - len(times), 30)])


@pytest.mark.parametrize("wrong", [0, 65535])  # milliseconds; the file is 3 s long
def test_times_that_make_no_sense(tmp_path: Path, wrong: int) -> None:
    """Frames go on at the file's rate, and a time of their own counts again when it can."""
    path = tmp_path / "clip.mkv"
    content = save_noise(path, "libx264", cluster_time_limit="1000")
    second_cluster = content.index(b"\x1f\x43\xb6\x75", content.index(b"\x1f\x43\xb6\x75") + 1)
    place = content.index(b"\xe7\x82", second_cluster) + 2  # its time, of two bytes
    content[place : place + 2] = wrong.to_bytes(2, "big")
    path.write_bytes(content)
    times = read(path)[2]
    assert len(times) == 30
    assert times == pytest.approx([i / 10 for i in range(30)], abs=0.002)


def test_frames_that_were_cut_out_are_not_missing(tmp_path: Path) -> None:
    """Who cuts the beginning of a video on a telephone hides frames that the file still has."""
    path = save_video(tmp_path / "clip.mp4", 8)
    content = bytearray(path.read_bytes())
    edit = content.index(b"elst") + 4 + 8  # duration and begin of the first edit
    unit = int.from_bytes(content[content.index(b"mdhd") + 4 + 12 :][:4], "big")
    content[edit + 4 : edit + 8] = (unit * 3 // 10).to_bytes(4, "big")
    path.write_bytes(content)
    reader, images, times = read(path)
    assert (len(images), reader.frames, reader.skipped) == (5, 5, 0)
    assert times == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_turned_video_is_read_upright(tmp_path: Path) -> None:
    """A telephone held upright writes lying frames, and a matrix that turns them."""
    path = save_video(tmp_path / "clip.mp4", 2)
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 4 + 40
    quarter = [0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30]
    content[matrix : matrix + 36] = b"".join(x.to_bytes(4, "big", signed=True) for x in quarter)
    path.write_bytes(content)
    upright = frames_of(path)[1][0]
    if upright.shape != (64, 48, 3):
        pytest.skip("this OpenCV does not turn the clip")
    image = read(path)[1][0]
    assert image.shape == (64, 48, 3)
    assert np.abs(image.astype(int) - upright).mean() < 4


def test_names_that_are_more_than_names_to_ffmpeg(tmp_path: Path) -> None:
    """It knows protocols by their colons, and numbered images by %02d."""
    path = tmp_path / "ö ü" / "12:30 50%02d 'año' 猫.mp4"
    write(path, [0, 0.1])
    assert len(read(path)[1]) == 2
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    content = save_noise(tmp_path / "unknown.avi", "mjpeg").replace(b"MJPG", b"ZZZZ")
    (tmp_path / "unknown.avi").write_bytes(content)
    (tmp_path / "empty.avi").touch()
    (tmp_path / "fake.mp4").write_text("no video")
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
        )
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    for name, message in {
        "unknown.avi": "cannot read video .*unknown.avi: PyAV has no decoder for its codec",
        "empty.avi": "cannot read video .*empty.avi: it is empty",
        "fake.mp4": "cannot read video .*fake.mp4: it is none, or is damaged",
        "sound.mp4": "cannot read video .*sound.mp4: it has no video track",
        "gone.mp4": "gone.mp4 does not exist",
        ".": "is a folder",
    }.items():
        with pytest.raises(VideoError, match=message):
            VideoReader(tmp_path / name)


def test_files_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=f"cannot write {tmp_path}: it is a folder"):
        VideoWriter(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(VideoError, match=r"cannot write .*file/clip.mp4: File exists"):
        write(tmp_path / "file" / "clip.mp4", [0])


def test_full_disk(tmp_path: Path) -> None:
    """The old file stays, and no part of the new one."""
    resource = pytest.importorskip("resource")
    path = write(tmp_path / "clip.mp4", [0, 0.1])
    old = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    noise = np.random.default_rng(0)
    try:
        with (
            pytest.raises(VideoError, match="cannot write .*clip.mp4: File too large"),
            closing(VideoWriter(path)) as writer,
        ):
            for i in range(200):
                writer.write(noise.integers(0, 256, (96, 128, 3), np.uint8), i)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_the_name_is_given_to_whole_files_alone(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    with closing(VideoWriter(path)) as writer:
        writer.write(np.zeros((48, 64, 3), np.uint8), 0)
        assert not path.exists()
    assert path.exists()
    closing(VideoWriter(tmp_path / "none.mp4")).__exit__()
    assert list(tmp_path.iterdir()) == [path]


def test_without_pyav(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    for make in (VideoReader, VideoWriter):
        with pytest.raises(ModuleNotFoundError, match="pip install av"):
            make(tmp_path / "clip.mp4")


def test_camera(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images come with the time of the clock; after some seconds without one it has ended."""
    capture = FakeCapture([1, 2, None, 3])
    monkeypatch.setattr(video.cv2, "VideoCapture", lambda _: capture)
    monkeypatch.setattr(video, "time", capture.clock)
    seen = []
    with (
        closing(Camera(2)) as camera,
        pytest.raises(VideoError, match="camera 2 gave no image for 5 s"),
    ):
        for image, seconds in camera:
            seen.append((image[0, 0, 0], seconds))
    assert seen == [(1, 0), (2, 1 / 8), (3, 3 / 8)]
    assert capture.released

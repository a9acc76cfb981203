"""The demo in front of a camera that a stand-in plays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import pytest

from tests.demo.drawn import FakeCapture, frames_of, run_camera


def test_camera_that_fails_and_recovers_until_interrupted(
    tmp_path: Path,
    model_arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    import video

    from maskdino.inference.predictor import MaskDINOPredictor

    capture = FakeCapture([0, 1, None, 3], camera=True, rate=0)
    monkeypatch.setattr(video.cv2, "VideoCapture", stand_in_for_cameras(capture))
    predict, calls = MaskDINOPredictor.__call__, []

    def interrupted(self: MaskDINOPredictor, images: list) -> list:
        calls.append(len(images))
        if len(calls) == 8:
            raise KeyboardInterrupt
        return predict(self, images)

    monkeypatch.setattr(MaskDINOPredictor, "__call__", interrupted)
    for name in ("camera_2.mp4", "camera_2_2.mp4"):  # the second keeps the first
        calls.clear()
        assert run_camera(tmp_path, model_arguments, "2") == 130
        rate, frames = frames_of(tmp_path / name)
        assert rate == video.DEFAULT_RATE
        assert frames[0].shape == (48, 64, 3)
        assert f"leaves {tmp_path / name}" in capsys.readouterr().err


def test_camera_that_goes_away(
    tmp_path: Path,
    model_arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    import video

    capture = FakeCapture([0, 1, 2], rate=float("nan"))
    monkeypatch.setattr(video.cv2, "VideoCapture", stand_in_for_cameras(capture))
    monkeypatch.setattr(video, "CAMERA_PATIENCE", 0.5)
    assert run_camera(tmp_path, model_arguments) == 1
    target = tmp_path / "camera_0.mp4"
    message = f"error: camera 0 gave no picture for 0.5 s; what it saw before is in {target}"
    assert message in capsys.readouterr().err
    assert len(frames_of(target)[1]) >= 1
    assert capture.released


def stand_in_for_cameras(capture: FakeCapture) -> Callable[[int | str], object]:
    """In place of cv2.VideoCapture: numbers open the stand-in, names files."""
    opened = cv2.VideoCapture
    return lambda source: capture if isinstance(source, int) else opened(source)


def test_camera_that_does_not_exist(
    tmp_path: Path, model_arguments: list[str], capsys: pytest.CaptureFixture
) -> None:
    assert run_camera(tmp_path, model_arguments, "97") == 1
    assert "camera 97" in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(SystemExit):
        run_camera(tmp_path, model_arguments, "-1")
    assert "numbered from 0" in capsys.readouterr().err

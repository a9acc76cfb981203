"""Objects of videos keep their numbers."""

from __future__ import annotations

import numpy as np

from maskdino.inference.tracks import Tracks


def test_tracks_keep_their_numbers() -> None:
    tracks = Tracks(patience=2)
    left, right = np.array([0.0, 0, 10, 10]), np.array([20.0, 0, 30, 10])
    labels = np.array([1, 1])
    assert tracks.update(np.stack([left, right]), labels) == [0, 1]
    assert tracks.update(np.stack([right + 2, left + 2]), labels) == [1, 0]
    assert tracks.update(np.stack([left + 3, left + 4]), np.array([1, 2])) == [0, 2]
    assert tracks.update(np.zeros((0, 4)), np.zeros(0, int)) == []
    # The left one was seen two frames ago, the right one three: it is forgotten.
    assert tracks.update(np.stack([right + 2, left + 3]), labels) == [3, 0]

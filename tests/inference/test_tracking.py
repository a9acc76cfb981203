"""Identities last: behind others, behind a pillar, between frames that are left out."""

from __future__ import annotations

import numpy as np
import pytest

from maskdino.inference.tracking import Shape, Tracker, shifted_iou
from maskdino.ops.rle import encode_mask
from tests.inference.moving import SIZE, Mover, Scene, line, track

RED, BLUE = (230, 40, 40), (40, 40, 230)


def pillar(color: tuple[int, int, int] = BLUE) -> Scene:
    """Two walk behind a pillar, hidden as a whole for many frames."""
    movers = [
        Mover(RED, line((20, 40), (3, 0), 70)),
        Mover(color, line((210, 85), (-2.5, 0), 70), disk=True),
    ]
    return Scene(movers, pillar=(90, 150))


def crossing(color: tuple[int, int, int] = BLUE) -> Scene:
    """One walks behind the other, the other way."""
    return Scene(
        [Mover(color, line((20, 60), (3, 0.2), 60)), Mover(RED, line((210, 64), (-3, 0), 60))]
    )


def test_who_is_hidden_by_a_pillar_comes_back() -> None:
    scene = pillar()
    hidden = sum(len(scene.seen(frame)) < 2 for frame in range(70))
    assert hidden >= 15
    assert track(scene)[0] == {1: [1], 2: [2]}


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("colors", [True, False])
@pytest.mark.parametrize("color", [RED, BLUE])
def test_who_crosses_keeps_the_number(
    masks: bool, colors: bool, color: tuple[int, int, int]
) -> None:
    had, tracker = track(crossing(color), masks=masks, colors=colors)
    assert had == {1: [1], 2: [2]}
    assert tracker.counts() == {0: 2}


def test_who_turns_back_behind_the_other_is_known_by_color() -> None:
    """Their speeds tell that they crossed; only colors tell that they did not."""
    there, back = line((20, 60), (4, 0), 24), line((112, 60), (-4, 0), 24)
    others = line((220, 60), (-4, 0), 24), line((128, 60), (4, 0), 24)
    scene = Scene([Mover(BLUE, there + back), Mover(RED, others[0] + others[1])])
    scene.owners[20:28] = [np.zeros(SIZE, np.int64)] * 8  # nobody looks
    assert track(scene)[0] == {1: [1], 2: [2]}
    assert track(scene, colors=False)[0] == {1: [1, 2], 2: [2, 1]}


def test_masks_tell_apart_what_boxes_do_not() -> None:
    """Two long objects lie across each other: their boxes are the same, and swap by chance."""
    rows, columns = np.mgrid[:60, :60]
    down, up = np.abs(rows - columns) < 5, np.abs(rows + columns - 59) < 5
    boxes = np.array([[0.0, 0, 60, 60]] * 2)
    tracker = Tracker()
    labels = np.zeros(2, np.int64)
    assert tracker.update(boxes, labels, rles=[encode_mask(m) for m in (down, up)]) == [1, 2]
    assert tracker.update(boxes, labels, rles=[encode_mask(m) for m in (up, down)]) == [2, 1]


@pytest.mark.parametrize("every", [2, 5, 8])
def test_frames_that_are_left_out(every: int) -> None:
    assert track(pillar(), every=every)[0] == {1: [1], 2: [2]}


def test_uncertain_objects_go_on_but_do_not_begin() -> None:
    """Who is being hidden is uncertain; a shadow that is uncertain from the first is nobody."""
    scene = crossing()
    scores = {(frame, 1): 0.3 for frame in range(20, 45)}
    had, tracker = track(scene, scores=scores)
    assert had[2] == [2] and set(had[1]) <= {0, 1}
    assert tracker.identities[1].sightings > 40
    had, tracker = track(scene, scores={(frame, 1): 0.3 for frame in range(60)})
    assert had == {1: [0], 2: [1]}
    assert list(tracker.identities) == [1]


def test_classes_are_never_mixed_and_counted() -> None:
    tracker = Tracker()
    box = np.array([[0.0, 0, 10, 10]])
    for frame in range(3):
        both = np.concatenate([box, box])
        assert tracker.update(both, np.array([1, 2]), seconds=frame / 25) == [1, 2]
    assert tracker.update(box, np.array([3]), seconds=1) == [3]  # seen once: not counted
    assert tracker.counts() == {1: 1, 2: 1}


def test_who_was_away_for_long_or_left_is_somebody_else() -> None:
    box = np.array([[50.0, 50, 60, 60]])
    tracker, label = Tracker(patience=1), np.zeros(1, np.int64)
    assert tracker.update(box, label, seconds=0.0) == [1]
    assert tracker.update(box[:0], label[:0], seconds=0.5) == []
    assert tracker.update(box, label, seconds=0.9) == [1]
    assert tracker.update(box, label, seconds=2.0) == [2]
    tracker = Tracker()
    for frame in range(4):  # to the right, out of an image of 100 columns
        numbers = tracker.update(
            box + [12 * frame, 0] * 2, label, size=(100, 100), seconds=frame / 25
        )
        assert numbers == [1]
    for frame in range(4, 7):
        tracker.update(box[:0], label[:0], size=(100, 100), seconds=frame / 25)
    assert tracker.update(box + [36, 0] * 2, label, size=(100, 100), seconds=7 / 25) == [2]


def test_empty_frames_and_masks() -> None:
    tracker = Tracker()
    nothing = np.zeros((0, 4)), np.zeros(0, np.int64)
    assert tracker.update(*nothing) == [] == tracker.update(*nothing, rles=[], image=None)
    empty = encode_mask(np.zeros((20, 20), bool))
    image = np.zeros((20, 20, 3), np.uint8)
    box = np.array([[2.0, 2, 9, 9]])
    for _ in range(2):
        assert tracker.update(box, np.zeros(1, np.int64), rles=[empty], image=image) == [1]
    flat = np.array([[5.0, 5, 5, 5]])  # a box without area, outside of the image
    assert tracker.update(flat + 100, np.zeros(1, np.int64), image=image) == [2]


def test_overlap_against_a_slow_one() -> None:
    """Masks of two shapes, one moved, in whole images."""
    noise = np.random.default_rng(0)
    for _ in range(50):
        first, second = noise.random((2, 8, 9)) < 0.6
        a, b = noise.integers(10, 20, (2, 2)).tolist()
        way = noise.integers(-6, 7, 2)
        canvas = np.zeros((2, 50, 50), bool)
        canvas[0, a[1] + way[1] : a[1] + way[1] + 8, a[0] + way[0] : a[0] + way[0] + 9] = first
        canvas[1, b[1] : b[1] + 8, b[0] : b[0] + 9] = second
        wanted = (canvas[0] & canvas[1]).sum() / (canvas[0] | canvas[1]).sum()
        shapes = [
            Shape(np.array([*corner, corner[0] + 9, corner[1] + 8], float), mask, tuple(corner))
            for corner, mask in ((a, first), (b, second))
        ]
        assert shifted_iou(shapes[0], way + 0.2, shapes[1]) == pytest.approx(wanted)

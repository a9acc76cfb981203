"""Tests of maskdino.evaluation.files."""

import time

from maskdino.evaluation.files import unique_pngs


def test_names_are_kept_and_unique() -> None:
    paths = ["a/x.jpg", "b/x.png", "x_2.jpg", "y.z.jpg", "c/x.jpg", "x_2"]
    names = unique_pngs(paths)
    assert names == ["x.png", "x_2.png", "x_2_2.png", "y.z.png", "x_3.png", "x_2_3.png"]
    assert unique_pngs([]) == []


def test_many_equal_names_do_not_wait_for_one_another() -> None:
    start = time.perf_counter()
    names = unique_pngs(["image.png"] * 20_000)
    assert time.perf_counter() - start < 5  # asking for every number anew takes a minute
    assert len(set(names)) == 20_000

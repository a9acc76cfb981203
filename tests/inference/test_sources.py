"""Files that a user names, and where their drawings go."""

from __future__ import annotations

from pathlib import Path

import pytest

from maskdino.inference.sources import find_inputs, output_paths
from tests.inference.media import save_image


def test_files_folders_and_patterns(tmp_path: Path) -> None:
    first, second = save_image(tmp_path / "a" / "x.png"), save_image(tmp_path / "b" / "x.jpg")
    third = save_image(tmp_path / "b" / "x.tif")
    found = find_inputs([str(tmp_path / "a"), str(tmp_path / "*" / "x.*"), "nowhere.png"])
    assert found == [first, second, third, Path("nowhere.png")]
    names = [path.name for path in output_paths(found, tmp_path / "out").values()]
    assert names == ["x.png", "x.jpg", "x_2.png", "nowhere.png"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no image or video"):
        find_inputs([str(tmp_path / "empty")])
    with pytest.raises(ValueError, match="no file fits"):
        find_inputs([str(tmp_path / "*.gif")])


def test_no_input_and_no_file_beside_it_is_replaced(tmp_path: Path) -> None:
    first = save_image(tmp_path / "a" / "x.png")
    with pytest.raises(ValueError, match="is an input"):
        output_paths([first], tmp_path / "a")
    with pytest.raises(ValueError, match="x.png exists, in the folder of an input"):
        output_paths([save_image(tmp_path / "a" / "x.bmp")], tmp_path / "a")
    image = save_image(tmp_path / "b" / "x.jpeg")
    (tmp_path / "b" / "x.jpg.json").touch()
    output_paths([image], tmp_path / "b")
    with pytest.raises(ValueError, match="x.jpg.json exists"):
        output_paths([image], tmp_path / "b", with_json=True)

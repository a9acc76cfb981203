"""Tests of tools/report.py."""

import json
from pathlib import Path

import pytest

from maskdino.cli import report
from tests.engine.stand_in import CONFIG


def words(folder: Path, *options: str, datasets: str = "('nuclei_val',)") -> list[str]:
    opts = ["--opts", "OUTPUT_DIR", str(folder), "DATASETS.TEST", datasets]
    return ["--config-file", str(CONFIG), *options, *opts]


@pytest.fixture
def evaluated(tmp_path: Path) -> Path:
    """OUTPUT_DIR of an evaluation of two datasets."""
    (tmp_path / "inference").mkdir()
    results = {"nuclei_val": {"bbox": {"AP": 11.1}}, "nuclei_train": {"bbox": {"AP": 22.2}}}
    (tmp_path / "inference" / "results.json").write_text(json.dumps(results))
    return tmp_path


def test_a_page_for_each_dataset(evaluated: Path, capsys: pytest.CaptureFixture) -> None:
    report.main(words(evaluated, datasets="('nuclei_val', 'nuclei_train')"))
    pages = {path.name: path.read_text() for path in evaluated.glob("*.html")}
    assert pages.keys() == {"report_nuclei_val.html", "report_nuclei_train.html"}
    assert "22.2" in pages["report_nuclei_train.html"]
    assert capsys.readouterr().out.count("the report is ") == 2


def test_one_page_where_it_is_wanted(evaluated: Path) -> None:
    path = evaluated / "new" / "page.html"
    options = ("--dataset", "nuclei_train", "--output", str(path))
    report.main(words(evaluated, *options, datasets="('nuclei_val', 'nuclei_train')"))
    assert "22.2" in path.read_text()


@pytest.mark.parametrize(
    ("options", "datasets", "message"),
    [
        (["--dataset", "lost"], "('nuclei_val',)", "holds results of nuclei_val.*, not of lost"),
        ([], "()", "DATASETS.TEST is empty: name a dataset with --dataset"),
        (["--output", "x.html"], "('a', 'b')", "one file; name one of .*'a', 'b'.* with --dataset"),
    ],
)
def test_mistakes_end_with_one_line(
    evaluated: Path, options: list[str], datasets: str, message: str
) -> None:
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        report.main(words(evaluated, *options, datasets=datasets))


def test_nothing_was_evaluated(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"results\.json does not exist: evaluate first"):
        report.main(words(tmp_path))


@pytest.mark.parametrize(
    "option",
    [("--confidence-threshold", "nan"), ("--confidence-threshold", "7.0"), ("--num-images", "-1")],
)
def test_numbers_out_of_range(
    tmp_path: Path, option: tuple[str, str], capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        report.main(words(tmp_path, *option))
    assert f"error: {' '.join(option)} must be" in capsys.readouterr().err

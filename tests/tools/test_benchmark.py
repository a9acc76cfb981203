"""The benchmark runs, and its contenders compute the same."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.conftest import load_module


def test_operators_agree_and_every_column_of_a_page_is_filled(
    repository: Path, tmp_path: Path, warm_python: str
) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory on a CPU is read from Linux's /proc")
    page = tmp_path / "page.md"
    words = "op --threads 1 --height 256 --width 256 --repeats 1"
    mark = f"<!-- python tools/benchmark.py {words} -->"
    page.write_text(f"Before.\n{mark}\n| old |\n<!-- end -->\nBehind.\n")
    command = [warm_python, "tools/benchmark.py", "page", str(page)]
    result = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    written = page.read_text()
    assert written.startswith(f"Before.\n{mark}\n- date: ")
    assert written.endswith("|\n<!-- end -->\nBehind.\n") and "| old |" not in written
    lines = [line for line in written.splitlines() if line.startswith("|")]
    headings, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert {"PyTorch (grid_sample)", "PyTorch, all samples at once"} <= {row[0] for row in rows}
    for row in rows:
        assert len(row) == len(headings) and all(row)
        assert all(float(difference) < 1e-5 for difference in row[1].split(", ")), row
        for cell in row[2:]:
            number, unit, gain = cell.split()
            assert float(number) > 0 and unit in ("ms", "MiB") and gain.endswith("x)"), row


def test_pages_hold_commands_that_there_are(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(repository / "tools")
    tool = load_module(repository / "tools" / "benchmark.py")
    pages = [*repository.glob("*.md"), *repository.glob("docs/*.md"), *repository.glob("csrc/*.md")]
    found = [words for page in pages for _, words in tool.MEASURED.findall(page.read_text())]
    assert found
    for words in found:
        tool.build_parser().parse_args(shlex.split(words))


TINY = ("--config-file", "configs/coco/instance/maskdino_tiny.yaml")
FAMILIES = {
    "train": (*TINY, "--size", "128", "--repeats", "1", "--batch", "1", "--objects", "3"),
    "infer": (*TINY, "--height", "96", "--width", "128", "--repeats", "1"),
    "data": ("--repeats", "1", "--peer", "maskdino.data:build_train_mapper"),
    "model": (*TINY, "--height", "64", "--width", "96", "--repeats", "1", "--train"),
    "launches": (*TINY, "--size", "64", "--precision", "float32"),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_families(repository: Path, tmp_path: Path, family: str, warm_python: str) -> None:
    if family in ("train", "model") and not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory on a CPU is read from Linux's /proc")
    record = tmp_path / "record.json"
    command = [warm_python, "tools/benchmark.py", family, "--threads", "1", *FAMILIES[family]]
    command += ["--json", str(record)]
    result = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found = json.loads(record.read_text())
    assert found["command"] == family and found["machine"]
    rows = found["rows"]
    for row in rows:
        assert all(cell in result.stdout for cell in row.values())
    if family == "train":
        assert all(float(row["largest difference of a gradient"]) < 1e-4 for row in rows)
        kept = [float(row["kept for backward"].split()[0]) for row in rows]
        assert kept[0] > kept[1] > kept[2]
    elif family == "infer":
        of_networks = [
            row["largest relative difference"] for row in rows if "network" in row["stage"]
        ]
        assert all(float(x) < 1e-3 for text in of_networks for x in text.split(", "))
    elif family == "model":
        parts = ["encoder", "network", "image to results", "training step"]
        assert [row["part"] for row in rows] == parts
        assert all(float(cell.split()[0]) > 0 for row in rows for cell in [*row.values()][1:])
        differences = found["about"].partition("operator: ")[2]
        named = re.findall(r"(encoder|network): (\S+) compiled", differences)
        assert [name for name, _ in named] == ["encoder", "network"]
        assert all(float(difference) < 1e-5 for _, difference in named)
    elif family == "data":
        cells = (row["objects, difference of masks"] for row in rows)
        polygons, runs, pasted, mosaic, peer = cells
        assert int(pasted) > 10 and int(mosaic) > 10
        assert polygons == peer == "10, 0.0e+00"
        assert float(runs.split(", ")[1]) < 0.05
    else:
        step = next(row for row in rows if row["what"] == "step")
        assert 1000 < int(step["operations"].replace(",", "")) < 3500


def test_a_peer_that_is_not_there(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(repository / "tools")
    report = importlib.import_module("benchmarks.report")
    for name, reason in (
        ("nowhere:mapper", "No module named 'nowhere'"),
        ("json:mapper", "module 'json' has no attribute 'mapper'"),
    ):
        with pytest.raises(SystemExit, match=f"--peer {name}: {reason}"):
            report.load_peer(name)


def test_arguments_of_what_is_recomputed_are_kept(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(repository / "tools")
    training = importlib.import_module("benchmarks.training")
    weight = torch.ones(1 << 18, requires_grad=True)  # 1 MiB

    def step() -> None:
        (2 * weight).sin_().square().sum().backward()

    def recomputing() -> None:
        argument = 2 * weight
        checkpoint(lambda x: x.exp().sin().square().sum(), argument, use_reentrant=False).backward()

    assert training.kept_mebibytes(recomputing) == pytest.approx(1, abs=0.01)  # not exp and sin
    assert training.kept_mebibytes(step) == pytest.approx(2, abs=0.01)

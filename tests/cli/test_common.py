"""One line for what the user can mend; a traceback for what only we can."""

from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from maskdino.cli.common import READER_GONE, CommandError, errors_in_one_line
from maskdino.config import load_config
from tests.engine.stand_in import CONFIG


def refuse(kind: type[Exception] = ValueError) -> None:
    raise kind("SOLVER.MAX_ITER is -1")


def fail_with_key() -> object:
    return {"a": 1}["b"]


def fail_with_value() -> object:
    return int("many")


def fail_to_write(number: int) -> None:
    raise OSError(number, os.strerror(number), "o.png")


def fail_in_a_worker() -> None:
    with ProcessPoolExecutor(1) as pool:
        pool.submit(fail_with_key).result()


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        (refuse, "SOLVER.MAX_ITER is -1"),
        (lambda: refuse(KeyError), "SOLVER.MAX_ITER is -1"),
        (lambda: refuse(ImportError), "SOLVER.MAX_ITER is -1"),
        (lambda: refuse(CommandError), "SOLVER.MAX_ITER is -1"),
        (lambda: Path("/nowhere/at all").read_text(), "/nowhere/at all: No such file or directory"),
        (lambda: fail_to_write(errno.ENOSPC), "o.png: .*; make room, or name another folder"),
        (lambda: fail_to_write(errno.EFBIG), "o.png: .*; make room, or name another folder"),
        (lambda: fail_to_write(errno.EACCES), "o.png: Permission denied"),
        (
            lambda: os.replace("/nowhere/a", "/nowhere/b"),
            "/nowhere/a -> /nowhere/b: No such file.*",
        ),
        (lambda: __import__("no_such_package"), "No module named 'no_such_package'"),
        (lambda: load_config(str(CONFIG), ["SOLVER.MAX_ITERS", "1"]), ".*SOLVER.MAX_ITERS.*"),
    ],
)
def test_mistakes_of_users_are_one_line(action: Callable[[], object], expected: str) -> None:
    with pytest.raises(SystemExit, match=f"^error: {expected}$"), errors_in_one_line():
        action()


@pytest.mark.parametrize(
    ("action", "kind"),
    [
        (fail_with_key, KeyError),
        (fail_with_value, ValueError),
        (fail_in_a_worker, KeyError),
        (lambda: refuse(RuntimeError), RuntimeError),
        (lambda: refuse(AssertionError), AssertionError),
        (lambda: __import__("maskdino.no_such_module"), ModuleNotFoundError),
    ],
)
def test_faults_of_the_program_keep_their_traceback(
    action: Callable[[], object], kind: type[Exception]
) -> None:
    with pytest.raises(kind), errors_in_one_line():
        action()


def test_interruption_is_one_line_and_its_status(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, errors_in_one_line():
        raise KeyboardInterrupt
    assert ended.value.code == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


@pytest.mark.skipif(os.name != "posix", reason="sends a signal as Ctrl-C does")
def test_interrupted_preparation_leaves_no_traceback(tmp_path: Path, warm_python: str) -> None:
    code = (
        "import os, time\n"
        "from maskdino.cli.common import errors_in_one_line\n"
        "from maskdino.cli.prepare.common import run\n"
        "def work(item):\n"
        "    os.write(1, b'works\\n')\n"  # one write, so that two processes' lines never mix
        "    time.sleep(0.2)\n"
        "with errors_in_one_line():\n"
        "    run(work, range(1000), 2, 'work')\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    process = subprocess.Popen(
        [warm_python, "-W", "ignore", str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C reaches all processes of a terminal's group
    )
    assert process.stdout.readline() == "works\n"
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "interrupted" and "Traceback" not in errors


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no full device")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", ["--help", "convert --help"])
def test_output_that_nobody_reads_needs_no_line(
    words: str, unbuffered: str, warm_python: str
) -> None:
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    command = [warm_python, "-m", "maskdino", *words.split()]
    reader, writer = os.pipe()
    os.close(reader)  # as `| head`, when it has seen enough
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, env=environment)
    os.close(writer)
    assert (done.returncode, done.stderr) == (READER_GONE, b"")
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=environment)
    assert (done.returncode, done.stderr.count(b"\n")) == (1, 1)
    assert done.stderr.startswith(b"error: ") and b"No space left" in done.stderr


def test_characters_that_the_output_lacks_end_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="cp1252"))
    with errors_in_one_line():
        sys.stdout.write("nüsse 日本\n")
    assert written.getvalue().decode("cp1252") == f"nüsse \\u65e5\\u672c{os.linesep}"

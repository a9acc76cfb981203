"""The Python that begins with PyTorch imported goes on, and ends, as any other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it is Python itself")


def run(python: str, folder: Path, *words: str, **options: object) -> tuple[int, str, str]:
    """Status, and what was printed."""
    environment = {"PATH": os.environ["PATH"], "WORD": "given", "PYTHONPATH": str(folder / "more")}
    command = [python, *words]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, **options
    )
    return done.returncode, done.stdout, done.stderr


def test_words_environment_folder_and_files_are_those_of_the_program(
    warm_python: str, tmp_path: Path
) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "found.py").write_text("import sys\nprint(__name__, *sys.argv[1:])")
    code = "import found, os, sys; print(os.environ['WORD'], os.getcwd(), sys.stdin.read())"
    said = f"found a\ngiven {tmp_path} read\n"
    assert run(warm_python, tmp_path, "-c", code, "a", input="read") == (0, said, "")
    assert run(warm_python, tmp_path, "-m", "found", "b") == (0, "__main__ b\n", "")
    assert run(warm_python, tmp_path, "more/found.py", "c") == (0, "__main__ c\n", "")


def test_only_packages_of_others_are_there(warm_python: str, tmp_path: Path) -> None:
    names = ("torch", "detectron2", "maskdino")
    code = f"import sys; print([name in sys.modules for name in {names}])"
    assert run(warm_python, tmp_path, "-c", code) == (0, "[True, False, False]\n", "")


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("import sys; sys.exit(3)", 3, ""),
        ("raise SystemExit('error: no')", 1, "error: no"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero"),
        ("import os; os.kill(os.getpid(), 9)", -9, ""),
        ("import warnings; warnings.warn('old', DeprecationWarning)", 0, "DeprecationWarning: old"),
    ],
)
def test_it_ends_as_its_copy(
    code: str, status: int, said: str, warm_python: str, tmp_path: Path
) -> None:
    code = f"import atexit; atexit.register(print, 'end')\n{code}"
    found, out, err = run(warm_python, tmp_path, "-c", code)
    assert found == status
    assert out == ("end\n" if status >= 0 else "")
    assert said in err and bool(said) == bool(err)


# A shell's background jobs, and all that they start, ignore SIGINT: this does not. The handler ends
# the process wherever it runs: a KeyboardInterrupt could be raised before a `try`, or in a callback
# whose errors are ignored.
SLEEP = """
import os, signal, time
signal.signal(signal.SIGINT, lambda *_: os._exit(130))
os.fork()
os.write(1, b"%d\\n" % os.getpid())
time.sleep(600)
"""


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)],
)
def test_signals_reach_the_copy_and_what_it_started(
    number: signal.Signals, status: int, warm_python: str
) -> None:
    with subprocess.Popen([warm_python, "-c", SLEEP], stdout=subprocess.PIPE) as process:
        for _ in range(2):
            assert int(process.stdout.readline())
        process.send_signal(number)
        assert process.stdout.read() == b""  # it ends when both have
    assert process.returncode == status

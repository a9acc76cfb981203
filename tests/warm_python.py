"""A Python that has imported PyTorch before it begins: it starts in a second instead of five.

`warm_python` of conftest.py is a program that stands for `sys.executable`. It hands its words,
environment, folder and open files to a server, which forks, and the copy goes on as
``python WORDS`` would. Only packages of others are there before: what the import of this one does,
and what it finds in its environment, is as ever. Signals reach the copy and what it started; the
program ends as the copy ends.

What is about the start of Python itself, or about imports of others, takes `sys.executable`. So
does one test of each program that users start.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import importlib
import json
import multiprocessing.process
import multiprocessing.spawn
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
import types
import warnings
from collections.abc import Iterator
from pathlib import Path

PRELOADED = ("torch", "torchvision.ops", "torch.distributed.run", "timm", "scipy.optimize")
FILES = 200  # open files have lower numbers
# -I -S: without the paths and modules that Python looks for first, which takes the most of a start.
PROGRAM = """#!{python} -IS
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: server.send(bytes([number])))
files = []
for file in range({files}):
    try:
        os.fstat(file)
    except OSError:
        continue
    if file != server.fileno():
        files.append(file)
socket.send_fds(server, [b"f"], files)
asked = dict(program=sys.argv[0], words=sys.argv[1:], folder=os.getcwd(), files=files)
server.sendall(json.dumps(dict(asked, environment=dict(os.environ))).encode() + b"\\n")
status = int(server.recv(16) or 1)
if status < 0:
    if -status != signal.SIGKILL:
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
"""


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Starts a server; gives the path of the program."""
    address, program = folder / "socket", folder / "python"
    program.write_text(PROGRAM.format(python=sys.executable, address=str(address), files=FILES))
    program.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, __file__, str(address)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, env=environment, start_new_session=True
    ) as server:
        while not address.exists():
            assert server.poll() is None, "the server has ended"
            time.sleep(0.05)
        yield str(program)
        server.communicate()  # it ends with its input


def serve(address: str) -> None:
    """Forks for each request until the input ends; returns there, and in each copy at its end."""
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.freeze()  # or each copy would look at all of it at its end, for longer than it began
    paths = sys.path[1:]
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the first forks
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{address}.new")
        listener.listen(64)
        os.rename(f"{address}.new", address)  # it is there when it answers
        while listener in select.select([listener, 0], [], [])[0]:
            connection, _ = listener.accept()
            if os.fork() == 0:
                break
            connection.close()
        else:
            return
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    asked, files = receive(connection)
    copy = os.fork()
    if copy:
        for file in files:
            os.close(file)
        watch(connection, copy)
    connection.close()
    become(asked, files, paths)


def receive(connection: socket.socket) -> tuple[dict, list[int]]:
    """What the program sends: its words and the like, and its open files, under high numbers."""
    _, received, _, _ = socket.recv_fds(connection, 1, FILES)
    files = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, FILES) for file in received]
    for file in received:
        os.close(file)
    text = b""
    while not text.endswith(b"\n"):
        text += connection.recv(1 << 16)
    return json.loads(text), files


def watch(connection: socket.socket, copy: int) -> None:
    """Passes signals on to the copy, and tells its status; kills it if the program is gone."""
    with contextlib.suppress(OSError):
        os.setpgid(copy, copy)
    ended, status = os.waitpid(copy, os.WNOHANG)
    while not ended:
        if select.select([connection], [], [], 0.02)[0]:
            for number in connection.recv(64) or [signal.SIGKILL]:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(copy, number)
        ended, status = os.waitpid(copy, os.WNOHANG)
    with contextlib.suppress(OSError):
        connection.sendall(b"%d" % os.waitstatus_to_exitcode(status))
    os._exit(0)


def become(asked: dict, files: list[int], paths: list[str]) -> None:
    """Goes on as ``python WORDS``, in the place of the program."""
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)
    for number, file in zip(asked["files"], files, strict=True):
        os.dup2(file, number)
        os.close(file)
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    words = asked["words"]
    sys.executable, sys.orig_argv = asked["program"], [asked["program"], *words]
    multiprocessing.spawn.set_executable(sys.executable)
    multiprocessing.process.ORIGINAL_DIR = asked["folder"]  # type: ignore[attr-defined]
    while words[0].startswith("-") and words[0] not in ("-c", "-m"):
        if words.pop(0).startswith("-W"):
            warnings.simplefilter("ignore")
            del words[: words[0] == "ignore"]
    kind = words.pop(0) if words[0] in ("-c", "-m") else ""
    beside = {"-c": "", "-m": asked["folder"]}
    first = beside[kind] if kind else os.path.dirname(os.path.abspath(words[0]))
    more = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:] = [first, *more, *paths]
    importlib.invalidate_caches()
    code, sys.argv = words[0], [kind or words[0], *words[1:]]
    if kind == "-m":
        runpy.run_module(code, run_name="__main__", alter_sys=True)
    elif kind == "-c":
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(code, "<string>", "exec"), main.__dict__)
    else:
        runpy.run_path(code, run_name="__main__")


if __name__ == "__main__":
    serve(sys.argv[1])

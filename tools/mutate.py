#!/usr/bin/env python3
"""Changes the package in one place at a time, and tells which changes the tests notice.

    python tools/mutate.py [--table FILE] [--limit SECONDS] [--record FILE] [PART ...]
    python tools/mutate.py --check                      which changes no longer fit the files

The table (tools/mutations.yaml) maps each file to its `tests` (arguments of pytest) and to
`mutations`: `from`, text that the file holds once; `to`, what stands there instead; `tests` of this
mutation alone; and `equivalent`, the reason why no test can notice it, which keeps it from being
run. With PARTs, files whose path holds one of them are tried alone.

With --record, verdicts are also written there, and those that stand there are not asked for again:
what was interrupted goes on.

All is done in a copy of the repository, in processes that begin where the large packages have been
imported already (so not on Windows). What ends in a failed test, an error or the time limit is
killed; the exit status is 0 only if nothing survived, and all were judged.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
TABLE = Path(__file__).with_name("mutations.yaml")
# Imported once: it takes longer than most of the tests. Nothing of the package may be among them.
OF_DETECTRON2 = (f"detectron2.{name}" for name in ("data", "evaluation", "engine", "modeling"))
PACKAGES = ("pytest", "torch", "torchvision", "scipy.optimize", "pycocotools.mask", *OF_DETECTRON2)


@dataclass(frozen=True)
class Mutation:
    """One change of one file.

    Attributes:
        file: below the repository.
        before: text that the file holds once.
        after: what replaces it.
        tests: arguments of pytest, those that should notice it.
        equivalent: why nobody can notice it; empty: somebody should.
    """

    file: str
    before: str
    after: str
    tests: tuple[str, ...]
    equivalent: str

    def __str__(self) -> str:
        shown = " ".join(self.before.split()), " ".join(self.after.split()) or "(nothing)"
        return f"{self.file}: {shown[0]}  ->  {shown[1]}"

    def applied(self, source: str) -> str:
        """The source of the file with the change.

        Raises:
            ValueError: the text is not there, or more than once, or would stay as it is.
        """
        if source.count(self.before) != 1 or self.before == self.after:
            raise ValueError(f"{self}: must be there once, is {source.count(self.before)} times")
        return source.replace(self.before, self.after)


def read_table(path: Path, parts: Sequence[str] = ()) -> list[Mutation]:
    """The mutations of a table, of files whose path holds one of the parts (none: of all)."""
    import yaml

    return [
        Mutation(
            file,
            entry["from"],
            entry["to"],
            tuple(entry.get("tests", group["tests"])),
            entry.get("equivalent", ""),
        )
        for file, group in yaml.safe_load(path.read_text()).items()
        if not parts or any(part in file for part in parts)
        for entry in group["mutations"]
    ]


def misfits(mutations: Sequence[Mutation]) -> list[str]:
    """What is wrong with those whose text is not in its file, or not once."""
    found = []
    for mutation in mutations:
        try:
            mutation.applied((REPOSITORY / mutation.file).read_text())
        except ValueError as error:
            found.append(str(error))
    return found


class Record:
    """Verdicts of earlier runs, in a file with one line of JSON for each; no path: none."""

    def __init__(self, path: Path | None) -> None:
        """Reads the file, if it is there."""
        self.path = path
        self.verdicts: dict[tuple[str, ...], str] = {}
        if path is not None and path.exists():
            for line in path.read_text().splitlines():
                *mutation, verdict = json.loads(line)
                self.verdicts[tuple(mutation)] = verdict

    def get(self, mutation: Mutation) -> str | None:
        """An earlier verdict; None where there is none, or it was none."""
        verdict = self.verdicts.get((mutation.file, mutation.before, mutation.after))
        return None if verdict == "unjudged" else verdict

    def add(self, mutation: Mutation, verdict: str) -> None:
        """Appends a line."""
        if self.path is not None:
            with self.path.open("a") as file:
                words = (mutation.file, mutation.before, mutation.after, verdict)
                file.write(json.dumps(words) + "\n")


def copy_repository(folder: Path) -> None:
    """Copies what git tracks or does not ignore, as it is now, and the compiled operators."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    compiled = [str(path.relative_to(REPOSITORY)) for path in REPOSITORY.glob("maskdino/*.so")]
    for name in (*filter(None, listed.stdout.split("\0")), *compiled):
        if (REPOSITORY / name).is_file():  # else deleted, and not yet committed
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, folder / name)


def run_tests(folder: Path, tests: Sequence[str], limit: float, log: Path) -> int | None:
    """Runs pytest on a copy, in a process of its own: its status, or None at the time limit."""
    child = os.fork()
    if child == 0:
        status = 70
        try:
            os.setsid()
            with log.open("wb") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            os.chdir(folder)
            sys.path[0] = os.environ["PYTHONPATH"] = str(folder)
            import pytest

            status = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests]))
            sys.stdout.flush()
        finally:
            os._exit(status)
    end = time.monotonic() + limit
    found = (0, 0)
    while found[0] == 0 and time.monotonic() < end:
        time.sleep(0.05)
        found = os.waitpid(child, os.WNOHANG)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # with whatever it started
    if found[0] == 0:
        os.waitpid(child, 0)
        return None
    return os.waitstatus_to_exitcode(found[1])


def judge(mutations: Sequence[Mutation], limit: float) -> Iterator[tuple[Mutation, str, float]]:
    """Tries each mutation: with it "killed", "survived" or "equivalent", and the seconds it took.

    "unjudged" are mutations whose text has moved on, or whose tests fail or end otherwise without
    them: look at the table, and at the tests.
    """
    for name in PACKAGES:
        importlib.import_module(name)
    sound: dict[tuple[str, ...], bool] = {}
    with tempfile.TemporaryDirectory(prefix="mutations") as place:
        folder, log = Path(place, "repository"), Path(place, "log")
        copy_repository(folder)
        for mutation in mutations:
            path = folder / mutation.file
            source = path.read_text()
            try:
                changed = mutation.applied(source)
            except ValueError:
                yield mutation, "unjudged", 0.0
                continue
            if mutation.equivalent:
                yield mutation, "equivalent", 0.0
                continue
            if mutation.tests not in sound:
                sound[mutation.tests] = run_tests(folder, mutation.tests, 4 * limit, log) == 0
                if not sound[mutation.tests]:
                    print(log.read_text(errors="replace")[-3000:], file=sys.stderr)
            if not sound[mutation.tests]:
                yield mutation, "unjudged", 0.0
                continue
            begin = time.monotonic()
            path.write_text(changed)
            status = run_tests(folder, mutation.tests, limit, log)
            path.write_text(source)
            yield mutation, "survived" if status == 0 else "killed", time.monotonic() - begin


def main(argv: Sequence[str] | None = None) -> int:
    """Prints what became of each mutation, and the score."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help="of paths of files; none: all")
    parser.add_argument("--table", type=Path, default=TABLE, help="%(default)s")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for each mutation")
    parser.add_argument("--record", type=Path, help="of verdicts, to go on from")
    parser.add_argument("--check", action="store_true", help="only whether all fit their files")
    arguments = parser.parse_args(argv)
    mutations = read_table(arguments.table, arguments.parts)
    if arguments.check:
        print("\n".join(wrong := misfits(mutations)), end="\n" if wrong else "")
        return int(bool(wrong))
    record = Record(arguments.record)
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # a change of the same size in the same second
    sys.dont_write_bytecode = True
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("MASKDINO_SHARED", str(REPOSITORY.parent / "shared"))
    counts = dict.fromkeys(("killed", "survived", "equivalent", "unjudged"), 0)
    known = [verdict for mutation in mutations if (verdict := record.get(mutation))]
    for verdict in known:
        counts[verdict] += 1
    new = [mutation for mutation in mutations if not record.get(mutation)]
    for mutation, verdict, seconds in judge(new, arguments.limit):
        counts[verdict] += 1
        record.add(mutation, verdict)
        reason = f"  ({mutation.equivalent})" if mutation.equivalent else ""
        print(f"{verdict:<10} {seconds:5.1f} s  {mutation}{reason}", flush=True)
    judged = counts["killed"] + counts["survived"]
    print(", ".join(f"{number} {verdict}" for verdict, number in counts.items()))
    print(f"{100 * counts['killed'] / max(judged, 1):.1f} % of {judged} were noticed")
    return int(counts["survived"] + counts["unjudged"] > 0)


if __name__ == "__main__":
    sys.exit(main())

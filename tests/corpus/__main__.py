"""Runs the corpus and counts the outcomes; shows what is wrong."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

from tests.corpus.case import judge
from tests.corpus.cases import all_cases
from tests.corpus.ways import WAYS


def main(words: list[str]) -> int:
    """Runs the cases whose names hold all words; returns the exit status."""
    parser = argparse.ArgumentParser("python -m tests.corpus", description=__doc__)
    parser.add_argument("words", nargs="*", metavar="WORD", help="that the names of cases hold")
    words = parser.parse_args(words).words
    counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    slowest: list[tuple[float, str]] = []
    for case in all_cases():
        if not all(word in case.id for word in words):
            continue
        with tempfile.TemporaryDirectory(prefix="corpus") as folder:
            begin = time.perf_counter()
            found = judge(case, WAYS[case.way], Path(folder))
            slowest.append((time.perf_counter() - begin, case.id))
        counts[case.kind, case.way][found.partition(":")[0] or "as it must be"] += 1
        if found:
            say(f"{case.id}: {_short(found)}")
    if not counts:
        parser.error(f"no case has {words} in its name")
    for (kind, way), outcomes in sorted(counts.items()):
        say(f"{kind:16}{way:20}{outcomes.total():5}  {dict(outcomes)}")
    total = sum(counts.values(), Counter())
    say(f"{total.total()} cases: {dict(total)}; {sum(t for t, _ in slowest):.0f} s")
    say("slowest: " + ", ".join(f"{x:.1f} s {name}" for x, name in sorted(slowest)[-5:]))
    return int(total.total() != total["as it must be"])


def say(line: str) -> None:
    """Prints a line at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _short(found: str) -> str:
    """The kind and, of a traceback, its last lines."""
    lines = found.splitlines()
    return found if len(lines) < 6 else "\n".join([lines[0][:40], *lines[-6:]])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

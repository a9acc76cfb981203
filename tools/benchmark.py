"""Measure this project side by side with its alternatives, on the machine at hand.

    python tools/benchmark.py op --threads 2
    python tools/benchmark.py train --objects 10 100 --compile
    python tools/benchmark.py infer --precision float32 bfloat16 --batch 1 2
    python tools/benchmark.py page docs/performance.md

Each subcommand is one module of tools/benchmarks/ with NAME, HELP, add_arguments and run; run
returns a report, which is printed in Markdown and, with --output and --json, also written to files.
Each figure of speed stands beside one of equality with the first contender.

`page` measures again what a page of Markdown holds between `<!-- python tools/benchmark.py WORDS
-->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
from pathlib import Path

from benchmarks import data, engines, inference, launches, model, operator, timing, training

FAMILIES = (operator, model, training, inference, data, launches, engines)


MEASURED = re.compile(
    r"(<!-- python tools/benchmark\.py (.+?) -->\n).*?(?=<!-- end -->)", flags=re.DOTALL
)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with one subcommand per family of benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    page = commands.add_parser("page", help="a page's measurements, once more")
    page.add_argument("page", type=Path, metavar="FILE", help="Markdown; it is written anew")
    for family in FAMILIES:
        command = commands.add_parser(family.NAME, help=family.HELP)
        command.add_argument("--device", default="cpu", help="cpu or cuda")
        command.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")
        command.add_argument("--output", type=Path, help="also write the report to this file")
        command.add_argument("--json", type=Path, help="also write it to this file, as JSON")
        family.add_arguments(command)
        command.set_defaults(run=family.run)
    return parser


def measure(args: argparse.Namespace) -> str:
    """Run one family of benchmarks, and return its report."""
    machine = timing.describe_machine(args.device, args.threads)
    found = args.run(args)
    report = machine + "\n" + found.markdown()
    if args.output is not None:
        args.output.write_text(report + "\n")
    if args.json is not None:
        record = {"command": args.command, "machine": machine.splitlines(), **found.record()}
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return report


def main() -> None:
    """Run one family of benchmarks and print its report, or those of a page."""
    parser = build_parser()
    args = parser.parse_args()
    if args.command != "page":
        print(measure(args))
        return

    def again(found: re.Match[str]) -> str:
        return f"{found[1]}{measure(parser.parse_args(shlex.split(found[2])))}\n"

    args.page.write_text(MEASURED.sub(again, args.page.read_text()))


if __name__ == "__main__":
    main()

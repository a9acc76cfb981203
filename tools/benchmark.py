"""Measure this project side by side with its alternatives, on the machine at hand.

    python tools/benchmark.py op --threads 2
    python tools/benchmark.py op --device cuda --dtype bfloat16

Each subcommand is one module of tools/benchmarks/ with NAME, HELP, add_arguments and run; run
returns the report in Markdown, which is printed and, with --output, also written to a file.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import model, operator, timing

FAMILIES = (operator, model)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with one subcommand per family of benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for family in FAMILIES:
        command = commands.add_parser(family.NAME, help=family.HELP)
        command.add_argument("--device", default="cpu", help="cpu or cuda")
        command.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")
        command.add_argument("--output", type=Path, help="also write the report to this file")
        family.add_arguments(command)
        command.set_defaults(run=family.run)
    return parser


def main() -> None:
    """Run one family of benchmarks and print its report."""
    args = build_parser().parse_args()
    report = timing.describe_machine(args.device, args.threads) + "\n" + args.run(args)
    print(report)
    if args.output is not None:
        args.output.write_text(report + "\n")


if __name__ == "__main__":
    main()

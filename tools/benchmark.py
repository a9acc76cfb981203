"""Measure this project side by side with its alternatives, on the machine at hand.

    python tools/benchmark.py op --threads 2
    python tools/benchmark.py train --objects 10 100 --compile
    python tools/benchmark.py infer --precision float32 bfloat16 --batch 1 2

Each subcommand is one module of tools/benchmarks/ with NAME, HELP, add_arguments and run; run
returns a report, which is printed in Markdown and, with --output and --json, also written to files.
Each figure of speed stands beside one of equality with the first contender.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks import data, engines, inference, launches, model, operator, timing, training

FAMILIES = (operator, model, training, inference, data, launches, engines)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with one subcommand per family of benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for family in FAMILIES:
        command = commands.add_parser(family.NAME, help=family.HELP)
        command.add_argument("--device", default="cpu", help="cpu or cuda")
        command.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")
        command.add_argument("--output", type=Path, help="also write the report to this file")
        command.add_argument("--json", type=Path, help="also write it to this file, as JSON")
        family.add_arguments(command)
        command.set_defaults(run=family.run)
    return parser


def main() -> None:
    """Run one family of benchmarks and print its report."""
    args = build_parser().parse_args()
    machine = timing.describe_machine(args.device, args.threads)
    found = args.run(args)
    report = machine + "\n" + found.markdown()
    print(report)
    if args.output is not None:
        args.output.write_text(report + "\n")
    if args.json is not None:
        record = {"command": args.command, "machine": machine.splitlines(), **found.record()}
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

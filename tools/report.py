"""Writes one HTML file about an evaluation: tables, curves, classes, best and worst images.

    python tools/train_net.py --config-file F --eval-only MODEL.WEIGHTS W OUTPUT_DIR DIR
    python tools/report.py --config-file F --output DIR/report.html --opts OUTPUT_DIR DIR

Nothing is computed anew: it reads what the evaluation left in OUTPUT_DIR/inference.
"""

import argparse
import sys
from pathlib import Path

from maskdino.loading import find_config
from maskdino.report import write_report
from maskdino.trainer import load_config


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; `words` stands in for it in tests."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="path or name")
    parser.add_argument("--dataset", metavar="NAME", help="default: first of DATASETS.TEST")
    parser.add_argument("--output", type=Path, metavar="HTML", help="default: in OUTPUT_DIR")
    parser.add_argument("--confidence-threshold", type=float, default=0.5, metavar="T")
    parser.add_argument("--num-images", type=int, default=3, metavar="N", help="best and worst")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="keys and values")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    """Runs the command."""
    args = parse_arguments(words)
    try:
        cfg = load_config(str(find_config(args.config_file)), args.opts)
        folder = Path(cfg.OUTPUT_DIR)
        path = write_report(
            args.output or folder / "report.html",
            args.dataset or cfg.DATASETS.TEST[0],
            folder,
            threshold=args.confidence_threshold,
            num_images=args.num_images,
        )
    except (KeyError, ValueError, OSError) as error:
        sys.exit(f"error: {error.args[0] if isinstance(error, KeyError) else error}")
    print(f"the report is {path}")


if __name__ == "__main__":
    main()

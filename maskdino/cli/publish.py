"""Makes of a training's folder a folder that holds a model, ready to be used or given away.

  maskdino publish RUN -o model                        of the best weights, or averaged, or last
  maskdino publish file.pth --config-file F -o model   of any weights, released ones too
  maskdino publish --inspect FILE                      says what is in a file of weights

The folder holds model.safetensors, without the states of optimizer and training, config.yaml,
categories.json, metrics.json, and a model card, README.md. `maskdino predict --config-file model`
and maskdino.MaskDINOPredictor.from_pretrained("model") read it.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.modeling import build_model

from maskdino.categories import Categories
from maskdino.checkpoint.contents import contents_of
from maskdino.checkpoint.loading import load_trained
from maskdino.checkpoint.pretrained import CONFIG, FILES, WEIGHTS, config_of, save_pretrained
from maskdino.checkpoint.reading import fetch, find_resumption, iterations_of, read_checkpoint
from maskdino.cli.common import CommandError, errors_in_one_line, make_parser
from maskdino.engine.best_checkpoint import BEST_FOLDER, BEST_NAME, HISTORY_NAME, History
from maskdino.integration.extensions import add_import_option
from maskdino.model_zoo import read_config

CHOICES = ("best", "averaged", "last")


@dataclass(frozen=True)
class Chosen:
    """The weights that are published."""

    path: str  # of the checkpoint
    averaged: bool | None = None  # whether they are an average (EMA); None: not known
    iterations: int | None = None  # steps of training behind them; None: not known


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; `words` stands in for it in tests."""
    parser = make_parser(__doc__)
    parser.usage = "%(prog)s RUN_OR_FILE -o FOLDER [options] | --inspect FILE"
    add = parser.add_argument
    add("source", nargs="?", metavar="RUN_OR_FILE", help="folder of a training, or a checkpoint")
    add("-o", "--output", type=Path, metavar="FOLDER", help="where the model goes")
    add("--inspect", metavar="FILE", help="say what is in a file of weights, and nothing else")
    add("--weights", choices=CHOICES, help="of a training (the first that it has)")
    add("--config-file", metavar="FILE", help="of a single checkpoint (config.yaml beside it)")
    add("--half", action="store_true", help="round to float16: half the size, results not equal")
    add("--name", help="that the card gives the model (the name of the folder)")
    add("--license", default="other", help="of the weights, as hubs name it: apache-2.0 (other)")
    add("--dataset", metavar="NAME", help="registered, whose classes are meant")
    add("--metrics", type=Path, metavar="FILE", help="results as JSON (those of the training)")
    add_import_option(parser)
    args = parser.parse_args(words)
    if bool(args.inspect) == bool(args.source):
        parser.error("give either RUN_OR_FILE or --inspect FILE")
    if args.source and args.output is None:
        parser.error("give -o FOLDER, where the model goes")
    return args


def choose_weights(run: Path, wanted: str | None, averages: bool) -> Chosen:
    """The weights of a training that are published: what is wanted, or the first that there are.

    With `averages` the training keeps an average of its weights (SOLVER.EMA).

    Raises:
        CommandError: there are none.
    """
    best, mean = run / BEST_FOLDER / f"{BEST_NAME}.pth", run / "ema" / "model_final.pth"
    if best.is_file() and wanted in (None, "best"):
        return Chosen(str(best), averages, _iterations(str(best)))
    last = find_resumption(str(run)).path
    steps = _iterations(last) if last else None
    if averages and wanted in (None, "averaged"):
        if mean.is_file():
            return Chosen(str(mean), True, steps if last.endswith("model_final.pth") else None)
        if last:
            return Chosen(last, True, steps)
    if last and wanted in (None, "last"):
        return Chosen(last, False, steps)
    raise CommandError(f"{run} holds no {wanted or ''} weights of a training".replace("  ", " "))


def _iterations(path: str) -> int | None:
    return iterations_of(read_checkpoint(path, "meta"))


def metrics_of(run: Path, iterations: int | None) -> dict[str, Any]:
    """What the training measured after so many steps; empty if it did not, or nobody knows."""
    if iterations is None:
        return {}
    history = History.read(run / BEST_FOLDER / HISTORY_NAME, "")
    for entry in history.evaluations:
        if entry.iteration == iterations - 1:
            return entry.results
    found: dict[str, Any] = {}
    log = run / "metrics.json"
    for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() else ():
        try:
            values = json.loads(line)
        except ValueError:  # a line that was cut off
            continue
        if values.get("iteration") == iterations - 1:
            found |= {name: value for name, value in values.items() if "/" in name}
    return found


def publish(args: argparse.Namespace) -> Path:
    """Writes the folder."""
    if (args.output / WEIGHTS).exists():
        raise FileExistsError(f"{args.output} already has a {WEIGHTS}; choose another folder")
    source = Path(args.source)
    run = source if source.is_dir() else None
    config = args.config_file or _config_of(source)
    overrides = ["MODEL.DEVICE", "cpu"]
    metrics: dict[str, Any] = {}
    if run is None:
        if args.weights:
            raise CommandError("--weights is of the folder of a training, not of a checkpoint")
        path = fetch(args.source)
        chosen = Chosen(path, iterations=_iterations(path))
    else:
        averages = read_config(config, "").SOLVER.EMA.ENABLED
        chosen = choose_weights(run, args.weights, averages)
        # The last checkpoint of a training that keeps an average holds both.
        overrides += ["SOLVER.EMA.ENABLED", str(bool(chosen.averaged))]
        if chosen.averaged == averages:  # which is what was evaluated
            metrics = metrics_of(run, chosen.iterations)
    if args.metrics is not None:
        metrics = _read_metrics(args.metrics)
    cfg = read_config(config, chosen.path, overrides, whole=True)
    model = build_model(cfg)
    load_trained(model, cfg)
    categories = None
    if args.dataset is not None:
        categories = Categories.of_dataset(args.dataset, cfg.MODEL.MASK_DINO.NUM_CLASSES)
    print(f"weights of {chosen.path}, which fit {config}")
    return save_pretrained(
        model,
        cfg,
        args.output,
        categories=categories,
        half=args.half,
        name=args.name or args.output.absolute().name,
        metrics=metrics,
        dataset=", ".join(cfg.DATASETS.TEST) if metrics else "",
        license=args.license,
        averaged=chosen.averaged,
        iterations=chosen.iterations,
    )


def _config_of(source: Path) -> Path:
    """The configuration of a training, or of a checkpoint in its folder."""
    folder = source if source.is_dir() else source.parent
    config = folder / CONFIG if folder is source else config_of(source)
    if config is not None and config.is_file():
        return config
    if not source.exists():
        raise FileNotFoundError(f"there is no folder or checkpoint {source}")
    raise FileNotFoundError(
        f"there is no {CONFIG} in {folder}: give the folder of a training, or --config-file"
    )


def _read_metrics(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CommandError(f"--metrics {path} is no JSON ({error})") from error
    if not isinstance(values, dict):
        raise CommandError(f"--metrics {path} holds no names and values")
    return values


@errors_in_one_line()
def main(words: list[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    args = parse_arguments(words)
    if args.inspect:
        print("\n".join(contents_of(fetch(args.inspect)).lines()))
        return 0
    folder = publish(args)
    print("\n".join(contents_of(str(folder / WEIGHTS)).lines()))
    print(f"wrote {folder}: {', '.join(sorted(FILES))}")
    if args.license == "other":
        print("no license is stated: --license says which, before you give the model away")
    return 0

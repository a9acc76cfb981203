"""Trains and evaluates Mask DINO.

    maskdino train --config-file coco/instance/maskdino_R50 --num-gpus 8
    maskdino train --config-file F --resume
    maskdino evaluate --config-file F --weights model_final.pth --report
    torchrun --nproc-per-node 8 -m maskdino train --config-file F

Keys and values at the end, after --opts or without it, override the file:
SOLVER.IMS_PER_BATCH 8 OUTPUT_DIR output/small
"""

import argparse
import logging
import os
import platform
import sys
from contextlib import nullcontext
from pathlib import Path

import detectron2
import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from maskdino import model_zoo
from maskdino.cli.common import CommandError, errors_in_one_line, make_parser
from maskdino.data.records import copy_record, register_beside
from maskdino.engine.before_training import check_settings
from maskdino.engine.evaluating import evaluate_weights
from maskdino.engine.launch import launch
from maskdino.engine.run_folder import check_folder, locked, open_logs
from maskdino.engine.trainer import MaskDINOTrainer
from maskdino.evaluation.report import report_paths, write_report
from maskdino.integration.extensions import add_import_option, config_header
from maskdino.system.devices import configured_device, settle_device
from maskdino.system.files import write_text
from maskdino.system.precision import check_precision
from maskdino.system.words import counted

logger = logging.getLogger("maskdino.train_net")


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; ``words`` stands in for it in tests."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--config-file", required=True, metavar="FILE", help="path or name")
    add("--weights", metavar="FILE", help="checkpoint, or 'released' (MODEL.WEIGHTS)")
    add("--resume", action="store_true", help="go on from the last checkpoint")
    add("--overwrite", action="store_true", help="begin anew in a folder that holds a run")
    add("--eval-only", action="store_true", help="do not train")
    add("--report", action="store_true", help="leave an HTML page of the last evaluation")
    for option, default, about in (
        ("--num-gpus", 1, "GPUs of this machine to use"),
        ("--num-processes", 1, "processes on a machine without GPU"),
        ("--num-machines", 1, "each starts this command"),
        ("--machine-rank", 0, "number of this machine, from 0"),
    ):
        add(option, type=int, default=default, metavar="N", help=about)
    add("--dist-url", default="auto", metavar="URL", help="tcp://HOST:PORT of the first machine")
    add_import_option(parser)
    add("--opts", nargs=argparse.REMAINDER, default=[], dest="named", help=argparse.SUPPRESS)
    add("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="values that override the file")
    args = parser.parse_args(words)
    args.opts += args.named
    return args


def read_config(args: argparse.Namespace) -> CfgNode:
    """Reads the configuration, and checks the weights and what the device must do."""
    cfg = model_zoo.read_config(
        args.config_file, args.weights, args.opts, whole=args.eval_only, resume=args.resume
    )
    if args.report and not cfg.DATASETS.TEST:
        raise ValueError("--report needs a dataset to evaluate, but DATASETS.TEST is empty")
    check_settings(cfg, trains=not args.eval_only)
    device = configured_device(cfg.MODEL.DEVICE, args.num_gpus)
    check_precision(cfg.MODEL.MASK_DINO.TEST.PRECISION, device)
    cfg.freeze()
    return cfg


def set_up(cfg: CfgNode, *, is_evaluation: bool = False) -> CfgNode:
    """Opens the logs, settles the device, and writes the whole configuration beside the logs.

    One that is there stays when a run is evaluated, for it may be that of the training:
    `evaluation.yaml` is the evaluation's.
    """
    PathManager.mkdirs(cfg.OUTPUT_DIR)
    open_logs(cfg.OUTPUT_DIR)
    cfg = settle_device(cfg)
    if comm.is_main_process():
        path = os.path.join(cfg.OUTPUT_DIR, "config.yaml")
        if is_evaluation and os.path.exists(path):
            path = os.path.join(cfg.OUTPUT_DIR, "evaluation.yaml")
        write_text(path, config_header() + cfg.dump())
        copy_record([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST], Path(cfg.OUTPUT_DIR))
        logger.info("Command: %s", " ".join(sys.argv))
        logger.info("The whole configuration is in %s", path)
        versions = (detectron2.__version__, torch.__version__, platform.python_version())
        logger.info("detectron2 %s, torch %s, Python %s", *versions)
        on_gpu = torch.device(cfg.MODEL.DEVICE).type == "cuda"
        device = torch.cuda.get_device_name() if on_gpu else "the CPU, in float32"
        logger.info("%s on %s", counted(comm.get_world_size(), "process"), device)
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
    return cfg


def run(args: argparse.Namespace, cfg: CfgNode) -> None:
    """Trains or evaluates, in one of possibly several processes."""
    register_beside(model_zoo.find_config(args.config_file))  # several processes know nothing yet
    if args.eval_only:
        cfg = set_up(cfg, is_evaluation=True)
        evaluate_weights(cfg, resume=args.resume)
    else:
        with locked(cfg.OUTPUT_DIR) if comm.is_main_process() else nullcontext():
            cfg = set_up(cfg)
            trainer = MaskDINOTrainer(cfg)
            trainer.resume_or_load(resume=args.resume)
            trainer.train()
    if args.report and comm.is_main_process():
        folder = Path(cfg.OUTPUT_DIR)
        for dataset, path in report_paths(cfg.DATASETS.TEST, folder).items():
            logger.info("The report is %s", write_report(path, dataset, folder))


@errors_in_one_line()
def main(words: list[str] | None = None) -> None:
    """Runs the command."""
    args = parse_arguments(words)
    cfg = read_config(args)
    if args.eval_only and not cfg.DATASETS.TEST:
        raise CommandError("DATASETS.TEST is (); it must name at least one dataset to evaluate")
    if not torch.cuda.is_available() and args.num_gpus > 1:
        raise CommandError(f"--num-gpus {args.num_gpus}, but there is no GPU; use --num-processes")
    is_first = args.machine_rank == 0 and os.environ.get("RANK", "0") == "0"
    if is_first and not args.eval_only:
        check_folder(cfg.OUTPUT_DIR, resume=args.resume, overwrite=args.overwrite)
    try:
        launch(
            run,
            args,
            cfg,
            processes=args.num_gpus if torch.cuda.is_available() else args.num_processes,
            machines=args.num_machines,
            machine_rank=args.machine_rank,
            url=args.dist_url,
        )
    except KeyboardInterrupt as error:
        if str(error) or args.eval_only:
            raise
        raise KeyboardInterrupt("interrupted; go on with --resume") from None

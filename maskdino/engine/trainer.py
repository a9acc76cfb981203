"""Training as detectron2's users know it: resumable data, averaged weights, one exact step."""

import contextlib
import logging
import os
import signal
import weakref
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase, hooks
from detectron2.evaluation import (
    DatasetEvaluator,
    verify_results,
)
from detectron2.solver import build_lr_scheduler
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, EventWriter
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from maskdino.checkpoint.checkpointer import MaskDINOCheckpointer
from maskdino.checkpoint.ema import build_average
from maskdino.checkpoint.reading import CheckpointError
from maskdino.data import build_train_mapper, check_datasets
from maskdino.data.stream import (
    Purpose,
    TrainingData,
    build_test_data,
    build_training_data,
    derive_seed,
    seed_everything,
)
from maskdino.engine.before_training import check_settings, warn_of_schedule
from maskdino.engine.best_checkpoint import BestCheckpoint
from maskdino.engine.compiled import compile_layers, replay_network
from maskdino.engine.evaluating import build_model, evaluate_model, write_results
from maskdino.engine.hooks import Evaluate, PeriodicCheckpoint, Resources, SaveAverage
from maskdino.engine.interruption import Interrupted, SignalWatch
from maskdino.engine.solver import build_gradient_clipper, build_optimizer, restore_optimizer
from maskdino.engine.train_step import TrainStep, distribute
from maskdino.engine.writers import WriteFirst, WriteScalars, build_writers
from maskdino.evaluation.build import build_evaluator
from maskdino.system.devices import settle_device
from maskdino.system.errors import UserError
from maskdino.system.files import write_errors

logger = logging.getLogger(__name__)

WRITE_PERIOD = 20  # iterations between lines of the log


class MaskDINOTrainer(TrainerBase):
    """Trains and evaluates what a configuration describes.

    What users of detectron2's `DefaultTrainer` override (`build_*`, `test`) and read (`cfg`,
    `model`, `optimizer`, `scheduler`, `checkpointer`) has the same names here.

    All randomness is a function of one seed and of the iteration: a run that was killed and is
    resumed sees the same data, augmentation and noise as one that ran through. With `SEED` -1 the
    seed is drawn once, logged, and kept in the checkpoint.

    Attributes:
        cfg: configuration.
        seed: non-negative integer.
        stopped: whether training ends here; hooks may set it, the same in all processes.
        training_data: what `build_train_loader` returned.
        average: the averaged weights, or None.
        scheduler: learning-rate schedule.
        checkpointer: reads and writes the whole state.
    """

    def __init__(self, cfg: CfgNode) -> None:
        """Builds model, optimizer, data and hooks; nothing is trained or loaded yet.

        Raises:
            ValueError, OSError: if the configuration, its device, or a dataset that it names, is at
                fault.
        """
        super().__init__()
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()
        cfg = DefaultTrainer.auto_scale_workers(settle_device(cfg), comm.get_world_size())
        check_settings(cfg)
        check_datasets(cfg)
        warn_of_schedule(cfg)
        self.cfg = cfg
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER
        self.seed = cfg.SEED if cfg.SEED >= 0 else _draw_seed()
        seed_everything(derive_seed(self.seed, Purpose.MODEL))
        model = self.build_model(cfg)
        if cfg.SOLVER.COMPILE:
            compile_layers(model)
        if cfg.SOLVER.CUDA_GRAPHS:
            replay_network(model)
        optimizer = self.build_optimizer(cfg, model)
        self.training_data = self.build_train_loader(cfg)
        self._batches: Iterator[list[dict]] = iter(())
        self.stopped = False
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.average = build_average(cfg, model)
        self._train_step = TrainStep(
            distribute(model),
            optimizer,
            build_gradient_clipper(cfg),
            accumulation_steps=cfg.SOLVER.ACCUMULATION_STEPS,
            mixed_precision=cfg.SOLVER.AMP.ENABLED,
        )
        self._plain_model = model
        self._results: dict[str, Any] = {}  # of the last evaluation
        self._is_restored = False
        self._signals = SignalWatch()
        self._train_step.told = lambda: self._signals.came
        parts: dict[str, Any] = {"trainer": weakref.proxy(self)}
        if self.average is not None:
            parts["ema"] = self.average
        self.checkpointer = MaskDINOCheckpointer(self.model, cfg.OUTPUT_DIR, **parts)
        self.register_hooks(self.build_hooks())

    @property
    def model(self) -> nn.Module:
        """The model in training, with several processes wrapped for them."""
        return self._train_step.model

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer."""
        return self._train_step.optimizer

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Builds the meta-architecture that the configuration names, on its device."""
        return build_model(cfg)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> Optimizer:
        """See `maskdino.engine.solver.build_optimizer`."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: Optimizer) -> LRScheduler:
        """Detectron2's schedule of `SOLVER.LR_SCHEDULER_NAME`."""
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Iterable[list[dict]]:
        """Makes the training data: batches of one process, each for one forward pass.

        `TrainingData` begins where a resumed run left off. Any other endless iterable, such as what
        `detectron2.data.build_detection_train_loader` returns, begins anew with each run.
        """
        return build_training_data(cfg, build_train_mapper(cfg))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable[list[dict]]:
        """See `maskdino.data.stream.build_test_data`."""
        return build_test_data(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """See `maskdino.evaluation.build.build_evaluator`."""
        return build_evaluator(cfg, dataset_name)

    def build_hooks(self) -> list[HookBase]:
        """Returns the hooks, in the order in which they act after a step."""
        cfg = self.cfg
        resources = Resources(cfg.SOLVER.IMS_PER_BATCH, torch.device(cfg.MODEL.DEVICE))
        result: list[HookBase] = [hooks.IterationTimer(), resources]
        writers = self.build_writers() if comm.is_main_process() else []
        result.append(WriteFirst(writers, WRITE_PERIOD, cfg.TEST.EVAL_PERIOD))
        if self.average is not None:
            folder = os.path.join(cfg.OUTPUT_DIR, "ema")
            PathManager.mkdirs(folder)
            checkpointer = MaskDINOCheckpointer(self._plain_model, folder)
            result.append(SaveAverage(checkpointer, self.average))
        # Before the evaluation: should that fail, the weights are safe.
        result.append(PeriodicCheckpoint(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD))
        if cfg.SOLVER.BEST.METRIC:
            best = BestCheckpoint(cfg, self._plain_model, self.average)
            result += [Evaluate(cfg.TEST.EVAL_PERIOD, best.evaluate), best]
        else:
            result.append(Evaluate(cfg.TEST.EVAL_PERIOD, self.evaluate))
        result.append(WriteScalars(writers, WRITE_PERIOD, cfg.TEST.EVAL_PERIOD))
        return result

    def build_writers(self) -> list[EventWriter]:
        """See `maskdino.engine.writers.build_writers`."""
        return build_writers(self.cfg, self.max_iter)

    def resume_or_load(self, resume: bool = True) -> None:
        """Goes on from the last checkpoint of `OUTPUT_DIR`, or loads `MODEL.WEIGHTS`.

        Args:
            resume: whether to look for a checkpoint; without one, training starts at the beginning.
        """
        resumed = resume and self.checkpointer.has_checkpoint()
        if resume and not resumed:
            logger.info("No checkpoint in %s: starting at the beginning.", self.cfg.OUTPUT_DIR)
        self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        if resumed:
            if not self._is_restored:
                raise CheckpointError(
                    f"the last checkpoint of {self.cfg.OUTPUT_DIR} holds weights, but no state of "
                    "a training: leave out --resume, and give it as MODEL.WEIGHTS"
                )
            self.start_iter = self.iter + 1
        if self.average is not None and not self.average.restored:
            if resumed:
                logger.warning("The checkpoint has no averaged weights: the average starts now.")
            self.average.reset()

    def train(self) -> dict[str, Any] | None:
        """Trains from `start_iter` to `SOLVER.MAX_ITER`.

        Returns:
            The results of the last evaluation, in the main process; None in others, or where
            nothing was evaluated.

        Raises:
            DataError: the data are at fault; nothing is logged, as the message says it all.
            FloatingPointError: see `TrainStep.run`.
            Interrupted: Ctrl-C or SIGTERM; the last whole step, of all processes, is saved.
            WriteError: a file cannot be written.
        """
        logger.info("The seed is %d; training starts at iteration %d.", self.seed, self.start_iter)
        data = self.training_data
        if isinstance(data, TrainingData):
            self._batches = data.start(self.seed, self.start_iter)
        else:
            self._batches = iter(data)
            if self.start_iter:
                logger.warning("The data of a %s begin anew.", type(data).__name__)
        try:
            self._iterate()
        except Interrupted:
            raise
        except (KeyboardInterrupt, RuntimeError) as error:  # in the last evaluation, or again
            if isinstance(error, RuntimeError) and not self._lost_others():
                raise
            number = self._signals.number or signal.SIGINT
            raise Interrupted("interrupted; go on with --resume", number) from None
        finally:
            if isinstance(self._batches, Generator):
                self._batches.close()  # ends the loading processes, which a traceback keeps alive
            self._batches = iter(())
        if not self._results or not comm.is_main_process():
            return None
        if self.cfg.TEST.EXPECTED_RESULTS:
            verify_results(self.cfg, self._results)
        return self._results

    def _iterate(self) -> None:
        """Makes all steps, with hooks as in `TrainerBase.train`, which cannot end early."""
        self.stopped = False
        self.iter = self.start_iter
        complete = self.start_iter - 1  # the last iteration whose step was made
        self._signals = SignalWatch()
        with (
            self._signals.installed(),
            write_errors(self.cfg.OUTPUT_DIR),
            EventStorage(self.start_iter) as self.storage,
        ):
            try:
                self.before_train()
                while self.iter < self.max_iter and not self.stopped:
                    self.before_step()
                    with self._signals.step(lambda: self._train_step.ends):
                        self.run_step()
                        complete = self.iter
                    self.after_step()
                    self.iter += not self.stopped
            except KeyboardInterrupt:
                raise self._interrupted(complete) from None
            except (UserError, OSError):  # the latter of what cannot be written or read
                raise
            except Exception as error:
                if isinstance(error, RuntimeError) and self._lost_others():
                    raise self._interrupted(complete) from None
                logger.exception("The training ended at iteration %d:", self.iter)
                raise
            finally:
                self.after_train()

    def _lost_others(self) -> bool:
        """Whether an error may be that others of several processes, told to end too, are gone."""
        return comm.get_world_size() > 1 and self._signals.came

    def _interrupted(self, complete: int) -> Interrupted:
        """Saves the state after the last whole step; returns the error that says so."""
        where = "before the first iteration"
        if complete >= self.start_iter:
            where = f"after iteration {complete + 1}"
            if not self._signals.in_step:
                self.iter = complete
                self.check_gradient()
                for hook in self._hooks:
                    if isinstance(hook, WriteFirst):
                        hook.after_step()
                name = "model_final" if complete == self.max_iter - 1 else f"model_{complete:07d}"
                self.checkpointer.save(name, iteration=complete)
        return Interrupted(
            f"interrupted {where}; go on with --resume", self._signals.number or signal.SIGINT
        )

    def run_step(self) -> None:
        """Makes one optimizer step and records its scalars.

        Seeds Python's, NumPy's and PyTorch's global generators with a number that belongs to this
        iteration and process, which makes a resumed run exact. Whoever draws random numbers of
        their own, in a hook for one, should have a generator of their own: from the global ones,
        one gets the same numbers whenever this iteration is trained.
        """
        seed_everything(derive_seed(self.seed, Purpose.STEP, self.iter, comm.get_rank()))
        scalars = self._train_step.run(self._batches)
        for name, value in scalars.items():
            self.storage.put_scalar(name, value)
        rate = max(group["lr"] for group in self.optimizer.param_groups)
        self.storage.put_scalar("lr", rate, smoothing_hint=False)
        self.scheduler.step()
        if self.average is not None:
            self.average.update(self.iter)

    def check_gradient(self) -> None:
        """See `TrainStep.check_gradient`."""
        self._train_step.check_gradient()

    def evaluate(self) -> dict[str, Any]:
        """Evaluates the averaged weights, if there are, else the model's; also to a JSON file."""
        averaged = contextlib.nullcontext() if self.average is None else self.average.applied()
        with self._signals.evaluation(), averaged:
            self._results = self.test(self.cfg, self._plain_model)
        if comm.is_main_process():
            write_results(self.cfg.OUTPUT_DIR, self._results)
        return self._results

    @classmethod
    def test(
        cls,
        cfg: CfgNode,
        model: nn.Module,
        evaluators: DatasetEvaluator | Sequence[DatasetEvaluator] | None = None,
    ) -> dict[str, Any]:
        """Evaluates a model on `DATASETS.TEST`.

        Args:
            cfg: configuration.
            model: with its weights.
            evaluators: one for each dataset; None: those of `build_evaluator`.

        Returns:
            The numbers of the tasks of the dataset, or, with several datasets, a dict of them by
            dataset; empty in all but the main process.

        Raises:
            ValueError: if there are more or fewer evaluators than datasets.
        """
        return evaluate_model(cfg, model, evaluators, cls.build_test_loader, cls.build_evaluator)

    def state_dict(self) -> dict[str, Any]:
        """Returns all that a run needs to go on, but the weights.

        That is the iteration, hooks' states, the seed (with the iteration, it gives the position in
        the data), optimizer, schedule and the scale of float16 losses.
        """
        return {
            **super().state_dict(),
            "seed": self.seed,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "grad_scaler": self._train_step.grad_scaler.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores `state_dict`; the seed is the checkpoint's, so that the data go on."""
        missing = {"iteration", *self.state_dict()} - {"hooks", *state_dict}
        if missing:
            raise CheckpointError(
                f"the last checkpoint of {self.cfg.OUTPUT_DIR} is of another trainer: it lacks "
                f"{', '.join(sorted(missing))}"
            )
        self._is_restored = True
        super().load_state_dict(state_dict)
        if self.cfg.SEED not in (-1, state_dict["seed"]):
            logger.warning(
                "SEED is %d, but the run began with %d, which stays.",
                self.cfg.SEED,
                state_dict["seed"],
            )
        self.seed = state_dict["seed"]
        restore_optimizer(self.optimizer, state_dict["optimizer"])
        self.scheduler.load_state_dict(state_dict["scheduler"])
        grad_scaler = self._train_step.grad_scaler
        if state_dict["grad_scaler"] and grad_scaler.is_enabled():
            grad_scaler.load_state_dict(state_dict["grad_scaler"])


def _draw_seed() -> int:
    """Draws a seed, the same in all processes."""
    return int(comm.all_gather(int.from_bytes(os.urandom(4), "little"))[0])

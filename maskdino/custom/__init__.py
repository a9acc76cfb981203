"""Training on own data: checks, a plan that follows from data and machine, training, a report."""

from maskdino.custom.checks import Finding, check
from maskdino.custom.plan import Machine
from maskdino.custom.prepare import PreparedData, prepare_data, register_prepared
from maskdino.custom.request import TASKS, Request
from maskdino.custom.run import Run, plan_run, train_run
from maskdino.custom.training import CustomTrainer

__all__ = [
    "TASKS",
    "CustomTrainer",
    "Finding",
    "Machine",
    "PreparedData",
    "Request",
    "Run",
    "check",
    "plan_run",
    "prepare_data",
    "register_prepared",
    "train_run",
]

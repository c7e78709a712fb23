"""A recorded run, once more: its plan from args.yaml, and its training step by step in memory.

Training is a function of its settings, so what a study wants to see on the way need not have been
recorded: the run is trained again, and nothing in its folder changes.
"""

import argparse
from pathlib import Path

import torch
import yaml
from torch import nn

from utils import cli, runlog
from utils.cli import UserError
from utils.data import images
from utils.files import load_tensors
from utils.labels import first_difference
from validate import engine
from validate.plan import Plan, make_plan, parse_arguments
from validate.session import EpochRunner, build_student

_DESCRIBED_BY_NAME = ("num_classes", "input_size", "mean", "std")  # flags of custom data sets only


def plan_of(run: Path) -> Plan:
    """The plan of a run folder, its images and labels opened and checked again.

    Raises:
        UserError: no run there, or one that would be another one here: other images or labels by
            now, several processes, or a precision that this device lacks.
    """
    path = run / runlog.ARGUMENTS
    if not path.exists():
        raise UserError(f"{run} is not a run folder: it has no {runlog.ARGUMENTS}")
    record = yaml.safe_load(path.read_text())
    values = {**record["others"], **record["settings"]}
    values["amp"] = values["precision"]
    values["schedule"] = ",".join(f"{kind}:{epochs}" for kind, epochs in values["phases"])
    values["soft_epochs"] = values["hard_epochs"] = None
    arguments = []
    for name in vars(parse_arguments(_required(values))):
        value = values.get(name)
        if str(value) in ("None", "False"):
            continue
        if name in _DESCRIBED_BY_NAME and values["dataset"] != "custom":
            continue
        arguments.append("--" + name.replace("_", "-"))
        if str(value) != "True":
            arguments += map(str, value if isinstance(value, list) else [value])
    plan = make_plan(parse_arguments(arguments))
    if difference := first_difference(record["settings"], plan.settings):
        raise UserError(f"{run} cannot be trained again as it was: {difference}")
    return plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of a study of one run's gradients: --run and --out."""
    parser.add_argument("--run", type=Path, required=True, help="run folder with a label set")
    parser.add_argument("--out", type=Path, required=True, help="PNG and CSV, without the ending")


def soft_plan_of(run: Path) -> Plan:
    """The plan of a run that has soft gradients; raises UserError for one without a label set."""
    plan = plan_of(run)
    if plan.labels is None:
        raise UserError(f"{run} was trained without a label set: it has no soft gradient")
    return plan


def _required(values: dict) -> list[str]:
    """The flags without which the command line does not parse."""
    names = ("data_dir", "val_dir", "output_dir", "dataset", "model")
    return [text for name in names for text in ("--" + name.replace("_", "-"), str(values[name]))]


class Replay:
    """Trains a plan from the start, epoch by epoch.

    Attributes:
        plan, model, optimizer: what is trained.
        epochs: see validate.session.EpochRunner; `epochs.run(epoch)` in order.
        source: renders views of the distilled images.
    """

    def __init__(self, plan: Plan, what: str):
        self.plan = plan
        self.model, self.optimizer = build_student(plan)
        device = plan.machine.device
        self.source = images.open_images(plan.folder, plan.sizes, plan.dataset, device, 0)
        total = len(plan.kinds) * len(plan.folder.files)
        self.bar = cli.progress(desc=what, unit="view", total=total)
        scaler, accumulated = plan.machine.scaler(), plan.settings["grad_accum"]
        trainer = engine.Trainer(
            *(self.model, self.optimizer, scaler, plan.machine, accumulated, self.bar.update)
        )
        self.epochs = EpochRunner(plan, trainer, self.source)


def two_losses(
    plan: Plan, epochs: EpochRunner, number: int, logits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hard loss, and soft loss without T^2, of logits [B, C] for stored label batch `number`."""
    labels, settings = epochs.labels, plan.settings
    views = labels.views(number)
    own, partner, lam = views.mixture(labels.hard_labels, plan.dataset.input_size)
    hard = engine.hard_loss(logits, own, partner, lam, settings["label_smoothing"])
    teacher = labels[number].logits
    return hard, engine.soft_loss(logits, teacher, settings["temperature"], "none")


def gradients(loss: torch.Tensor, model: nn.Module, keep_graph: bool) -> list[torch.Tensor]:
    """The gradient of a loss for every parameter of the model."""
    return list(torch.autograd.grad(loss, list(model.parameters()), retain_graph=keep_graph))


def weights_of(run: Path, name: str = runlog.CHECKPOINT) -> dict[str, torch.Tensor]:
    """The state dict of a run's student."""
    if not (run / name).exists():
        raise UserError(f"{run} has no {name}")
    return load_tensors(run / name, "checkpoint")["model"]

"""Optional loggers of a run: TensorBoard and Weights & Biases, imported only when asked for."""

import argparse
import functools
import hashlib
import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from utils.cli import UserError

Logger = Callable[[dict], None]  # takes an epoch's line of the log
# Of a run folder, its settings, and the epochs done: what a stopped run logged later is left out.
Opener = Callable[[Path, dict, int], Logger]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --tensorboard and --wandb-project."""
    group = parser.add_argument_group("loggers, besides log.jsonl")
    events = "event files in the run folder; needs tensorboard"
    group.add_argument("--tensorboard", action="store_true", help=events)
    group.add_argument("--wandb-project", metavar="NAME", help="Weights & Biases; needs wandb")


def from_arguments(args: argparse.Namespace) -> list[Opener]:
    """What opens the loggers asked for; raises UserError where a package is not installed."""
    openers = []
    if args.tensorboard:
        module = _imported("torch.utils.tensorboard", "--tensorboard")
        openers.append(functools.partial(_tensorboard, module))
    if args.wandb_project is not None:
        module = _imported("wandb", "--wandb-project")
        openers.append(functools.partial(_wandb, module, args.wandb_project))
    return openers


def _imported(module: str, flag: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.rpartition(".")[2]
        raise UserError(f"{flag} needs the package: pip install {package}") from None


def _scalars(line: dict) -> dict[str, float]:
    """The numbers of a log line, but for the epoch."""
    numbers = {name: value for name, value in line.items() if isinstance(value, (int, float))}
    return {name: value for name, value in numbers.items() if name != "epoch"}


def _tensorboard(module: ModuleType, run: Path, settings: dict, epochs_done: int) -> Logger:
    writer = module.SummaryWriter(str(run / "tensorboard"), purge_step=epochs_done + 1)

    def log(line: dict) -> None:
        for name, value in _scalars(line).items():
            writer.add_scalar(name, value, line["epoch"])
        writer.flush()

    return log


def _wandb(module: ModuleType, project: str, run: Path, settings: dict, epochs_done: int) -> Logger:
    # The same folder is the same run, so that one that continues does not become a second one;
    # epochs trained again are left out by W&B, where they are the same.
    identity = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]
    facts = {"project": project, "id": identity, "name": run.name, "dir": str(run)}
    started = module.init(**facts, config=settings, resume="allow")
    return lambda line: started.log(_scalars(line), step=line["epoch"])

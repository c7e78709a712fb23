"""Optional loggers of a run: TensorBoard and Weights & Biases, imported only when asked for."""

import argparse
import hashlib
from collections.abc import Callable
from pathlib import Path

from utils.cli import UserError

Logger = Callable[[dict], None]  # takes an epoch's line of the log
# Takes the run folder, its settings, and the epochs done: what a stopped run logged of later ones
# is left out.
Opener = Callable[[Path, dict, int], Logger]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --tensorboard and --wandb-project."""
    group = parser.add_argument_group("loggers, besides log.jsonl")
    group.add_argument(
        "--tensorboard",
        action="store_true",
        help="event files in the run folder; needs tensorboard",
    )
    group.add_argument("--wandb-project", metavar="NAME", help="Weights & Biases; needs wandb")


def from_arguments(args: argparse.Namespace) -> list[Opener]:
    """What opens the loggers that the flags of add_arguments ask for.

    Raises:
        UserError: the package of one is not installed.
    """
    openers = []
    if args.tensorboard:
        openers.append(_tensorboard())
    if args.wandb_project is not None:
        openers.append(_wandb(args.wandb_project))
    return openers


def scalars(line: dict) -> dict[str, float]:
    """The numbers of a log line, but for the epoch."""
    return {
        name: value
        for name, value in line.items()
        if isinstance(value, (int, float)) and name != "epoch"
    }


def _tensorboard() -> Opener:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs the package: pip install tensorboard") from None

    def start(run: Path, settings: dict, epochs_done: int) -> Logger:
        writer = SummaryWriter(str(run / "tensorboard"), purge_step=epochs_done + 1)

        def log(line: dict) -> None:
            for name, value in scalars(line).items():
                writer.add_scalar(name, value, line["epoch"])
            writer.flush()

        return log

    return start


def _wandb(project: str) -> Opener:
    try:
        import wandb
    except ImportError:
        raise UserError("--wandb-project needs the package: pip install wandb") from None

    def start(run: Path, settings: dict, epochs_done: int) -> Logger:
        # The same folder is the same run, so that one that continues does not become a second one;
        # epochs trained again are left out by W&B, where they are the same.
        identity = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]
        facts = {"project": project, "id": identity, "name": run.name, "dir": str(run)}
        started = wandb.init(**facts, config=settings, resume="allow")
        return lambda line: started.log(scalars(line), step=line["epoch"])

    return start

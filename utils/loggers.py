"""Optional loggers of a run: TensorBoard and Weights & Biases, imported only when asked for."""

import argparse
import hashlib
from collections.abc import Callable
from pathlib import Path

from utils.cli import UserError

Logger = Callable[[dict], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --tensorboard and --wandb-project."""
    group = parser.add_argument_group("loggers, besides log.jsonl")
    group.add_argument(
        "--tensorboard",
        action="store_true",
        help="event files in the run folder; needs tensorboard",
    )
    group.add_argument("--wandb-project", metavar="NAME", help="Weights & Biases; needs wandb")


def from_arguments(args: argparse.Namespace, run: Path, settings: dict) -> list[Logger]:
    """The loggers that the flags of add_arguments ask for; each takes an epoch's log line.

    Raises:
        UserError: the package of one is not installed.
    """
    found = []
    if args.tensorboard:
        found.append(_tensorboard(run))
    if args.wandb_project is not None:
        found.append(_wandb(args.wandb_project, run, settings))
    return found


def scalars(line: dict) -> dict[str, float]:
    """The numbers of a log line, but for the epoch."""
    return {
        name: value
        for name, value in line.items()
        if isinstance(value, (int, float)) and name != "epoch"
    }


def _tensorboard(run: Path) -> Logger:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs the package: pip install tensorboard") from None
    writer = SummaryWriter(str(run / "tensorboard"))

    def log(line: dict) -> None:
        for name, value in scalars(line).items():
            writer.add_scalar(name, value, line["epoch"])
        writer.flush()

    return log


def _wandb(project: str, run: Path, settings: dict) -> Logger:
    try:
        import wandb
    except ImportError:
        raise UserError("--wandb-project needs the package: pip install wandb") from None
    # The same folder is the same run, so that one that continues does not become a second one.
    identity = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]
    started = wandb.init(
        project=project,
        id=identity,
        name=run.name,
        config=settings,
        dir=str(run),
        resume="allow",
    )
    return lambda line: started.log(scalars(line), step=line["epoch"])

"""Device, mixed precision and seeds."""

import argparse
import dataclasses
import os

import numpy
import torch
import torchvision
from torch import nn

from utils.cli import UserError, bounded
from utils.datasets import Dataset

AMP_CHOICES = ("auto", "fp16", "bf16", "off")


@dataclasses.dataclass(frozen=True)
class Runtime:
    """Where and in which precision networks run.

    Attributes:
        device: the torch device.
        dtype: autocast's dtype; None runs in fp32.
    """

    device: torch.device
    dtype: torch.dtype | None

    @property
    def precision(self) -> str:
        """ "fp16", "bf16" or "off": a value of --amp that gives the same precision again."""
        return {torch.float16: "fp16", torch.bfloat16: "bf16", None: "off"}[self.dtype]

    def autocast(self) -> torch.autocast:
        """A context in which the forward pass runs in mixed precision."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def scaler(self) -> torch.amp.GradScaler:
        """Loss scaling, active only where fp16 gradients could underflow."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)


def check_outputs(model: nn.Module, dataset: Dataset, device: torch.device, what: str) -> None:
    """Raises UserError unless the network maps one input to one finite logit per class.

    Args:
        model: on `device`; evaluated without gradients, left in the mode it was in.
        dataset: gives input size and number of classes.
        device: where the network is.
        what: names it in the message.
    """
    training, size = model.training, dataset.input_size
    try:
        with torch.inference_mode():
            logits = model.eval()(torch.zeros(1, 3, size, size, device=device))
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{what} does not take {size}-pixel images: {reason}") from None
    model.train(training)
    shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if shape != (1, dataset.num_classes):
        raise UserError(
            f"{what} gives {shape} for one image, expected (1, {dataset.num_classes}), the number "
            f"of classes of {dataset.name}"
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --device, --amp and --workers."""
    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    group.add_argument(
        "--amp",
        choices=AMP_CHOICES,
        default="auto",
        help="mixed precision; auto: fp16 on CUDA, off on a CPU",
    )
    group.add_argument(
        "--workers",
        type=bounded(int, 0),
        default=4,
        metavar="N",
        help="processes that decode images which are not kept in memory",
    )


def from_arguments(args: argparse.Namespace) -> Runtime:
    """The runtime that the flags of add_arguments ask for; raises UserError if it is not there."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "started by torchrun with several processes, which is not supported yet; start one "
            "process (CUDA_VISIBLE_DEVICES chooses its GPU)"
        )
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: not a device; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            seen = f"only {count} CUDA devices" if count else "no CUDA device"
            raise UserError(f"--device {name}: there is {seen} here; --device cpu runs without one")
    elif device.type != "cpu":
        raise UserError(f"--device {name}: only cpu and cuda are supported")
    if args.amp == "auto":
        return Runtime(device, torch.float16 if device.type == "cuda" else None)
    if args.amp == "fp16" and device.type == "cpu":
        raise UserError("--amp fp16 needs a GPU; on a CPU use --amp bf16 or off")
    return Runtime(device, {"fp16": torch.float16, "bf16": torch.bfloat16, "off": None}[args.amp])


def versions() -> dict[str, str]:
    """Versions of what decides the numbers, for manifests and run folders."""
    return {
        "torch": str(torch.__version__),
        "torchvision": torchvision.__version__,
        "numpy": numpy.__version__,
    }

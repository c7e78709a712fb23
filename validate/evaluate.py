"""Top-1 and top-5 accuracy of a checkpoint.

python validate/evaluate.py --checkpoint O/checkpoint.pt --val-dir V
"""

import sys
from pathlib import Path

if not __package__:  # run as a plain script: imports start at the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import dataclasses

import torch
from torch import nn

import models
from utils import cli, runtime
from utils.cli import UserError
from utils.data import evaluation, images
from utils.data.datasets import Dataset
from utils.files import load_tensors
from validate import engine


def main() -> None:
    parser = cli.Parser(description="Evaluate a checkpoint that validate/train.py wrote.")
    parser.add_argument("--checkpoint", type=Path, required=True, help="checkpoint.pt or best.pt")
    parser.add_argument("--val-dir", type=Path, required=True, help="validation images")
    parser.add_argument(
        "--model",
        help="the network, when it is a package.module:factory: code named by a file is never run",
    )
    runtime.add_arguments(parser)
    evaluation.add_arguments(parser)
    args = parser.parse_args()
    machine = runtime.from_arguments(args)
    model, saved = load_student(args.checkpoint, args.model)
    if args.amp == "auto":
        machine = _training_precision(machine, saved["precision"])
    dataset = Dataset(**saved["dataset"])
    folder = images.scan(args.val_dir)
    images.check_same_classes(folder, saved["classes"], str(args.checkpoint))
    pixels = evaluation.load(folder, dataset, machine.device, args.val_cache)
    top1, top5 = engine.evaluate(
        model.to(machine.device, memory_format=torch.channels_last),
        pixels,
        folder.labels,
        torch.tensor(dataset.mean, device=machine.device),
        torch.tensor(dataset.std, device=machine.device),
        machine,
        lambda starts: cli.progress(starts, desc="evaluate", leave=False, delay=2),
    )
    print(f"top-1 {top1:.4f} %, top-5 {top5:.4f} % of {len(pixels)} images in {args.val_dir}")


def load_student(checkpoint: Path, name: str | None = None) -> tuple[nn.Module, dict]:
    """A trained student on the CPU, and all that its checkpoint holds.

    Args:
        checkpoint: checkpoint.pt or best.pt of a run.
        name: the network; needed only when it is code, which a file may not name.

    Raises:
        UserError: not a checkpoint of validate/train.py, or weights that do not fit.
    """
    saved = load_tensors(checkpoint, "checkpoint")
    if not isinstance(saved, dict) or saved.get("format") != "hald-student":
        raise UserError(f"{checkpoint} is not a checkpoint of validate/train.py")
    needed = ("dataset", "network", "classes", "precision", "model")
    if missing := [field for field in needed if field not in saved]:
        raise UserError(f"{checkpoint} is incomplete: it has no {missing[0]!r}")
    network = name or saved["network"]
    if name is None and ":" in network and not network.startswith("timm:"):
        raise UserError(f"{checkpoint} names the code {network!r}; confirm with --model {network}")
    dataset = Dataset(**saved["dataset"])
    try:
        model = models.build(network, dataset.num_classes, dataset.input_size)
    except ValueError as error:
        raise UserError(f"--model: {error}") from None
    try:
        model.load_state_dict(saved["model"])
    except RuntimeError:
        raise UserError(f"the weights in {checkpoint} do not fit {network}") from None
    return model, saved


def _training_precision(machine: runtime.Runtime, precision: str) -> runtime.Runtime:
    """The precision that training evaluated with, where this device has it."""
    if precision == "fp16" and machine.device.type == "cpu":
        return machine
    dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16, "off": None}
    return dataclasses.replace(machine, dtype=dtypes[precision])


if __name__ == "__main__":
    cli.run(main)

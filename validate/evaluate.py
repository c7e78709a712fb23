"""Top-1 and top-5 accuracy of a checkpoint.

python validate/evaluate.py --checkpoint O/checkpoint.pt --val-dir V [--json] [--per-class]
"""

import sys
from pathlib import Path

if not __package__:  # run as a plain script: imports start at the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import contextlib
import json
from collections.abc import Callable

import torch
from torch import nn

import models
from utils import cli, runtime
from utils.cli import UserError
from utils.data import datasets, evaluation, folders
from utils.data.datasets import Dataset
from utils.data.views import normalise
from utils.files import load_tensors
from utils.metrics import hits, top_classes
from utils.runtime import send
from utils.weights import load_state, own_facts, unwrap_state

_BATCH_SIZE = 256


def main() -> None:
    parser = cli.Parser(description="Evaluate a checkpoint that validate/train.py wrote.")
    parser.add_argument("--checkpoint", type=Path, required=True, help="checkpoint.pt or best.pt")
    parser.add_argument("--val-dir", type=Path, required=True, help="validation images")
    parser.add_argument(
        "--model",
        help="the network, when it is a package.module:factory (code named by a file is never run) "
        "or the checkpoint is of other code",
    )
    parser.add_argument("--dataset", help="of a checkpoint of other code, such as published ones")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of a line"
    )
    parser.add_argument(
        "--per-class",
        nargs="?",
        type=Path,
        const=True,
        metavar="DIR",
        help="also write accuracy per class and the confusion matrix, as CSV and picture, to a "
        "folder (default: that of the checkpoint)",
    )
    runtime.add_arguments(parser, decodes=False)
    evaluation.add_arguments(parser)
    args = parser.parse_args()
    if args.dataset == "custom":
        raise UserError(
            "--dataset custom: size and normalisation of the images are not known; give the name "
            "of a data set that has them, or a checkpoint of validate/train.py, which holds them"
        )
    named = datasets.named(args.dataset) if args.dataset else None
    model, saved = load_student(args.checkpoint, args.model, named)
    machine = runtime.start(args.device, args.amp)
    if args.per_class and machine.world > 1:
        raise UserError("--per-class is for one process")
    if args.amp == "auto" and (saved["precision"], machine.device.type) != ("fp16", "cpu"):
        machine = runtime.start(device=args.device, amp=saved["precision"])  # as in training
    dataset = Dataset(**saved["dataset"])
    folder = folders.scan(args.val_dir, dataset.num_classes)
    if saved["classes"]:
        folders.check_same_classes(folder, saved["classes"], str(args.checkpoint))
    with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):
        pixels = evaluation.load(folder, dataset, machine.device, args.val_cache)
    model.to(machine.device, memory_format=torch.channels_last)
    runtime.check_outputs(model, dataset, machine.device, f"the network of {args.checkpoint}")
    predicted = []
    if args.per_class:
        model.register_forward_hook(
            lambda _model, _input, logits: predicted.append(top_classes(logits.float())[:, 0])
        )
    top1, top5 = accuracy(
        model, pixels=pixels, targets=folder.labels, dataset=dataset, machine=machine
    )
    result = {"checkpoint": str(args.checkpoint), "val_dir": str(args.val_dir)}
    result |= {"images": len(pixels), "top1": top1, "top5": top5}
    written = ""
    if args.per_class:
        from validate import per_class  # and matplotlib, which training does without

        out = args.checkpoint.parent if args.per_class is True else args.per_class
        matrix = per_class.confusion(folder.labels, torch.cat(predicted).cpu(), folder.classes)
        per_class.write(matrix, folder.classes, out)
        result["per_class"] = dict(zip(folder.classes, per_class.accuracies(matrix), strict=True))
        written = f"; {per_class.TABLE}, {per_class.MATRIX} and {per_class.PICTURE} in {out}"
    text = f"top-1 {top1:.4f} %, top-5 {top5:.4f} % of {len(pixels)} images in {args.val_dir}"
    print(json.dumps(result) if args.json else text + written)


@torch.inference_mode()
def accuracy(
    model: nn.Module,
    pixels: torch.Tensor,
    targets: torch.Tensor,
    dataset: Dataset,
    machine: runtime.Runtime,
    after_batch: Callable[[], object] | None = None,
) -> tuple[float, float]:
    """Top-1 and top-5 accuracy in percent; under torchrun the ranks share the batches.

    Args:
        model: the network, on machine.device.
        pixels: uint8 [N, 3, S, S], see utils.data.evaluation.load.
        targets: int64 [N].
        dataset: gives mean and standard deviation.
        machine: device and precision.
        after_batch: called after each batch; may raise to end the evaluation there.
    """
    model.eval()
    facts = (torch.tensor(dataset.mean), torch.tensor(dataset.std), targets)
    mean, std, targets = (send(tensor, machine.device) for tensor in facts)
    counts = torch.zeros(5, dtype=torch.int64, device=machine.device)
    starts = range(0, len(pixels), _BATCH_SIZE)[machine.rank :: machine.world]
    for start in cli.progress(starts, desc="evaluate", leave=False, delay=2):
        rows = slice(start, start + _BATCH_SIZE)
        batch = send(pixels[rows], machine.device).float()
        with machine.autocast():
            logits = model(normalise(batch, mean, std))
        counts += hits(logits.float(), targets[rows])
        if after_batch:
            after_batch()
    ranked = machine.total(counts).tolist()
    return 100 * ranked[0] / len(pixels), 100 * sum(ranked) / len(pixels)


def check_confirmed(network: str, confirmed: str | None, path: Path) -> None:
    """Raises UserError where a file names code as its network that the command line does not."""
    if network != confirmed and ":" in network and not network.startswith("timm:"):
        raise UserError(f"{path} names the code {network!r}; confirm with --model {network}")


def load_student(
    checkpoint: Path, name: str | None = None, dataset: Dataset | None = None
) -> tuple[nn.Module, dict]:
    """A trained student on the CPU, and all that its checkpoint holds.

    Args:
        checkpoint: checkpoint.pt or best.pt of a run, or one of other code: a state dict, alone or
            in a dict such as the published checkpoint.pth.tar.
        name: the network; needed where it is code, which a file may not name, and for other code.
        dataset: what a checkpoint of other code was trained on.

    Raises:
        UserError: no checkpoint, one that must be named or is not whole, or weights that do not
            fit.
    """
    saved = load_tensors(checkpoint, "checkpoint")
    facts = own_facts(saved, checkpoint)
    if facts is None:
        if name is None or dataset is None:
            raise UserError(
                f"{checkpoint} is not a checkpoint of validate/train.py; say with --model and "
                "--dataset what it is of"
            )
        hint = "save the averaged weights alone to evaluate them"
        state = unwrap_state(saved, checkpoint, hint=hint)
        saved = {"network": name, "dataset": vars(dataset), "model": state}
        saved |= {"precision": "off", "classes": None}
        facts = dataset
    elif dataset is not None:
        raise UserError(f"--dataset is for checkpoints of other code; {checkpoint} names its own")
    network = name or saved["network"]
    check_confirmed(network, name, checkpoint)
    try:
        model = models.build(network, facts.num_classes, facts.input_size)
    except ValueError as error:
        raise UserError(f"--model: {error}") from None
    state = models.under_our_names(model, saved["model"])
    load_state(model, state, f"the weights in {checkpoint}", network)
    return model, saved


if __name__ == "__main__":
    cli.run(main)

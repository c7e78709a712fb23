"""Top-1 and top-5 accuracy of a checkpoint, and accuracy per class.

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
from torch import Tensor, nn

import models
from utils import cli, runtime
from utils.cli import UserError
from utils.data import datasets, evaluation, folders
from utils.data.datasets import Dataset
from utils.data.views import normalise
from utils.files import load_tensors, save_figure
from utils.metrics import hits, top_classes
from utils.results import write_csv
from utils.runtime import Runtime, send
from utils.weights import load_state, own_facts, unwrap_state

_BATCH_SIZE = 256
_TABLE, _MATRIX, _PICTURE = "per_class.csv", "confusion.csv", "confusion.png"


def main() -> None:
    parser = cli.Parser(description="Evaluate a checkpoint that validate/train.py wrote.")
    parser.add_argument("--checkpoint", type=Path, required=True, help="checkpoint.pt or best.pt")
    parser.add_argument("--val-dir", type=Path, required=True, help="validation images")
    parser.add_argument(
        "--model", help="of a checkpoint of other code, or a package.module:factory to be confirmed"
    )
    parser.add_argument("--dataset", help="of a checkpoint of other code, such as published ones")
    parser.add_argument("--json", action="store_true", help="print one JSON object, not a line")
    parser.add_argument(
        "--per-class",
        nargs="?",
        type=Path,
        const=True,
        metavar="DIR",
        help="also write accuracy per class and confusions, as CSV and picture, to a folder "
        "(default: that of the checkpoint)",
    )
    runtime.add_arguments(parser, decodes=False)
    evaluation.add_arguments(parser)
    args = parser.parse_args()
    if args.dataset == "custom":
        raise UserError("--dataset custom has no size, mean and std; name a data set that has them")
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
    top1, top5 = accuracy(model, pixels, folder.labels, dataset, machine)
    result = {"checkpoint": str(args.checkpoint), "val_dir": str(args.val_dir)}
    result |= {"images": len(pixels), "top1": top1, "top5": top5}
    text = f"top-1 {top1:.4f} %, top-5 {top5:.4f} % of {len(pixels)} images in {args.val_dir}"
    if args.per_class:
        out = args.checkpoint.parent if args.per_class is True else args.per_class
        predictions = torch.cat(predicted).cpu()
        result["per_class"] = write_per_class(folder.labels, predictions, folder.classes, out)
        text += f"; {_TABLE}, {_MATRIX} and {_PICTURE} in {out}"
    print(json.dumps(result) if args.json else text)


@torch.inference_mode()
def accuracy(
    model: nn.Module,
    pixels: Tensor,
    targets: Tensor,
    dataset: Dataset,
    machine: Runtime,
    after_batch: Callable[[], object] | None = None,
) -> tuple[float, float]:
    """Top-1 and top-5 accuracy in percent; under torchrun the ranks share the batches.

    pixels: uint8 [N, 3, S, S], see utils.data.evaluation.load; targets: int64 [N]. `after_batch`
    is called after each batch, and may raise to end the evaluation there.
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


def write_per_class(targets: Tensor, predicted: Tensor, classes: list[str], out: Path) -> dict:
    """Writes accuracy per class and confusions of int64 [N] classes; returns each class's top-1."""
    from matplotlib.figure import Figure  # which training does without

    count = len(classes)
    matrix = torch.bincount(targets * count + predicted, minlength=count**2).view(count, count)
    images = matrix.sum(1, keepdim=True)
    shares = 100 * (matrix.double() / images.clamp(min=1))
    top1 = [round(share, 4) for share in shares.diagonal().tolist()]
    rows = zip(classes, images[:, 0].tolist(), matrix.diagonal().tolist(), top1, strict=True)
    names = ("class", "images", "correct", "top1")
    out.mkdir(parents=True, exist_ok=True)
    write_csv([dict(zip(names, row, strict=True)) for row in rows], out / _TABLE)
    taken_for = [dict(zip(classes, row, strict=True)) for row in matrix.tolist()]
    rows = zip(classes, taken_for, strict=True)
    write_csv([{"class": name, **row} for name, row in rows], out / _MATRIX)
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(shown, label="of the class's images (%)")
    axes.set(xlabel="predicted class", ylabel="class")
    if count <= 40:  # of which the names have room
        axes.set_xticks(range(count), classes, rotation=90)
        axes.set_yticks(range(count), classes)
    save_figure(figure, out / _PICTURE)
    return dict(zip(classes, top1, strict=True))


def load_student(
    checkpoint: Path, name: str | None = None, dataset: Dataset | None = None
) -> tuple[nn.Module, dict]:
    """A trained student on the CPU, and all that its checkpoint holds.

    For other code's checkpoints, such as the published checkpoint.pth.tar, the network's name and
    what it was trained on must be given; the name, too, where it is code, which no file may name.

    Raises:
        UserError: no whole checkpoint, something that must be given, or weights that do not fit.
    """
    saved = load_tensors(checkpoint, "checkpoint")
    facts = own_facts(saved, checkpoint)
    if facts and dataset:
        raise UserError(f"--dataset is for checkpoints of other code; {checkpoint} names its own")
    if not facts:
        if name is None or dataset is None:
            what = f"{checkpoint} is not a checkpoint of validate/train.py"
            raise UserError(f"{what}; say with --model and --dataset what it is of")
        hint, facts = "save the averaged weights alone to evaluate them", dataset
        state = unwrap_state(saved, checkpoint, hint=hint)
        saved = {"network": name, "dataset": vars(dataset), "model": state}
        saved |= {"precision": "off", "classes": None}
    network = name or saved["network"]
    if name is None and ":" in network and not network.startswith("timm:"):
        raise UserError(f"{checkpoint} names the code {network!r}; confirm with --model {network}")
    try:
        model = models.build(network, facts.num_classes, facts.input_size)
    except ValueError as error:
        raise UserError(f"--model: {error}") from None
    state = models.under_our_names(model, saved["model"])
    load_state(model, state, f"the weights in {checkpoint}", network)
    return model, saved


if __name__ == "__main__":
    cli.run(main)

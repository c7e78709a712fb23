"""Selects distilled images from an ordinary image folder, as RDED does (arXiv 2312.03526).

Random crops of each image are scored by a teacher (cross-entropy with the image's class), the best
crop of each image is kept, and the best images of each class are written; optionally several of
them tiled into one. Nothing has to be downloaded but the images.

python scripts/prepare_distilled.py --data-dir TRAIN --out-dir D --dataset imagenet1k
    --teacher ResNet18 --ipc 10 --collage 2
"""

import sys
from pathlib import Path

if not __package__:  # run as a plain script: imports start at the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import dataclasses

import torch
import torch.nn.functional as F
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from relabel.teacher import Ensemble, label_views, load_teacher, training_facts
from utils import cli, runtime
from utils.cli import UserError, bounded
from utils.data import custom, datasets, folders, images
from utils.data.views import ORDER, ViewSpec, centre_views, crop_resize, draw, shuffle
from utils.files import atomic_write, to_json, whole_folder

_BATCH = 64


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = cli.Parser(description="Select distilled images by a teacher's confidence (RDED).")
    add = parser.add_argument
    add("--data-dir", type=Path, required=True, help="training images")
    add("--out-dir", type=Path, required=True, help="distilled images to make")
    datasets.add_arguments(parser)
    add("--teacher", required=True, metavar="NAME", help="the network that scores the crops")
    file, like = {"type": Path, "metavar": "FILE"}, "as for relabel/generate.py"
    add("--teacher-weights", **file, help=f"a state dict, found, if need be, {like}")
    add("--teacher-classes", **file, help=f"all classes of a teacher of more, {like}")
    add("--ipc", type=bounded(int, 1), required=True, help="images per class to make")
    add("--crops", type=bounded(int, 0), default=5, help="crops per image; 0: the central square")
    share = {"type": bounded(float, 0.0001, 1), "metavar": "SHARE"}
    add("--min-scale", **share, default=0.5, help="least area of a crop")
    add("--collage", type=bounded(int, 1, 4), default=1, help="N: tile N x N crops into an image")
    add("--candidates", type=bounded(int, 1), default=300, help="random images per class to score")
    add("--format", choices=("png", "jpg"), default="png", help="of the images written")
    add("--seed", type=bounded(int, 0, 2**62), default=0, help="of candidates and crops")
    runtime.add_arguments(parser)
    return parser.parse_args()


def firsts_by_class(order: torch.Tensor, labels: torch.Tensor, count: int) -> list[torch.Tensor]:
    """For each class at most `count` rows of `labels`, those that come first in an order of all."""
    by_class = order[labels[order].argsort(stable=True)]
    return [rows[:count] for rows in by_class.split(torch.bincount(labels).tolist())]


def choose_at_random(labels: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """int64, ascending: at most `count` random rows of each class."""
    order = torch.from_numpy(shuffle(seed, ORDER, 0, len(labels)))
    return torch.cat(firsts_by_class(order, labels, count)).sort().values


def score_crops(
    teacher: Ensemble,
    folder: folders.ImageFolder,
    dataset: datasets.Dataset,
    args: argparse.Namespace,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy, float32 [images], and box, int32 [images, 4], of the best crop of every image.

    Raises UserError where the teacher's output is not a number.
    """
    device, (sizes, _) = teacher.runtime.device, images.inspect(folder)
    source = images.open_images(folder, sizes, dataset, device, args.workers)
    spec = ViewSpec(dataset.input_size, _BATCH, args.min_scale, mix="none")
    rounds = [draw(spec, sizes, args.seed, epoch) for epoch in range(1, args.crops + 1)]
    # What is scored is what is written: the crop, not its mirror image.
    rounds = [dataclasses.replace(views, flip=torch.zeros_like(views.flip)) for views in rounds]
    rounds = rounds or [centre_views(sizes, _BATCH)]
    best = torch.full((len(sizes),), torch.inf)
    boxes = torch.zeros(len(sizes), 4, dtype=torch.int32)
    scored = label_views(teacher, source, rounds)
    for batch, logits in cli.progress(scored, desc="scoring crops", total=sum(map(len, rounds))):
        index = batch.index.cpu()
        targets = folder.labels[index].to(device)
        loss = F.cross_entropy(logits, targets, reduction="none").cpu()
        better = loss < best[index]
        best[index[better]] = loss[better]
        boxes[index[better]] = batch.box.cpu()[better]
    if not best.isfinite().all():
        path = folder.files[(~best.isfinite()).nonzero()[0, 0]]
        what = f"the teacher's output for {path} is NaN or infinite"
        raise UserError(f"{what}: other weights, or --amp off")
    return best, boxes


def write_images(
    out: Path,
    folder: folders.ImageFolder,
    chosen: list[torch.Tensor],
    boxes: torch.Tensor,
    size: int,
    args: argparse.Namespace,
) -> None:
    """Writes IPC images of `size` pixels per class into an empty folder, in the published layout.

    `chosen` has for each class IPC * collage² rows of `folder`, the best first; `boxes`, int32
    [images, 4], is the crop of each image.
    """
    tile, no_flip = size // args.collage, torch.zeros(1, dtype=torch.bool)
    names = folders.published_names(folder.classes)
    bar = cli.progress(chosen, desc="writing images", unit="class")
    for name, best_first in zip(names, bar, strict=True):
        (out / name).mkdir()
        for position in range(args.ipc):
            tiles = []
            # Dealt out so that every collage gets one of the best.
            for row in best_first[position :: args.ipc]:
                pixels = images.pixels_of(images.decode(folder.files[row]))
                tiles.append(crop_resize(pixels[None], boxes[row, None], no_flip, tile)[0])
            canvas = make_grid(tiles, nrow=args.collage, padding=0).round().clamp(0, 255).byte()
            path = out / name / f"{position:05d}.{args.format}"
            to_pil_image(canvas).save(path, quality=95)  # of a JPEG


def main() -> None:
    args = parse_arguments()
    dataset = datasets.from_arguments(args, inferred=True)
    machine = runtime.from_arguments(args)
    folder = folders.scan(args.data_dir, dataset.num_classes)
    weights = args.teacher_weights and [args.teacher_weights]
    trained_with = training_facts([args.teacher], weights, dataset)
    dataset = custom.complete(dataset, folder, None, trained_with, "the teacher's checkpoint")
    if dataset.input_size % args.collage:
        raise UserError(f"--collage {args.collage} does not divide {dataset.input_size} pixels")
    needed = args.ipc * args.collage**2
    takes = f"IPC {args.ipc} with --collage {args.collage} takes {needed}"
    if args.candidates < needed:
        raise UserError(f"--candidates {args.candidates} is too few: {takes} per class")
    for name, count in zip(folder.classes, folder.counts(), strict=True):
        if count < needed:
            raise UserError(f"{folder.root / name} has {count} images, but {takes} per class")
    classes = {"classes": folder.classes, "listing": args.teacher_classes}
    teacher = load_teacher(args.teacher, args.teacher_weights, dataset, machine, **classes)
    record = {
        "dataset": dataclasses.asdict(dataset),
        folders.SOURCE: folder.listing_sha256(),
        "teacher": args.teacher,
        "teacher_sha256": teacher.sha256,
        "classes": folder.classes,
    }
    choices = ("ipc", "crops", "min_scale", "collage", "candidates", "format", "seed")
    record |= {name: getattr(args, name) for name in choices}
    made = args.out_dir / folders.SELECTION
    if made.is_file() and made.read_bytes() == to_json(record):
        print(f"{args.out_dir} is there already: nothing to do")
        return
    with whole_folder(args.out_dir) as out:
        rows = choose_at_random(folder.labels, args.candidates, args.seed)
        files = [folder.files[row] for row in rows]
        looked_at = dataclasses.replace(folder, files=files, labels=folder.labels[rows])
        losses, boxes = score_crops(Ensemble([teacher], None, machine), looked_at, dataset, args)
        chosen = firsts_by_class(losses.argsort(stable=True), looked_at.labels, needed)
        write_images(out, looked_at, chosen, boxes, dataset.input_size, args)
        atomic_write(out / folders.SELECTION, to_json(record))
    made = f"IPC {args.ipc} for {len(folder.classes)} classes"
    print(f"{args.out_dir}: {made}; relabel/generate.py labels them without BSSL")


if __name__ == "__main__":
    cli.run(main)

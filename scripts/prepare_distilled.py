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

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from relabel.teacher import Ensemble, load_teacher, training_facts
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
    weights = "a state dict; default: $Main_Data_Path/<dataset>/NAME.pth, else "
    weights += "$Main_Data_Path/NAME.pth, else torchvision's"
    add("--teacher-weights", type=Path, metavar="FILE", help=weights)
    listing = "all classes of a teacher of more, as for relabel/generate.py"
    add("--teacher-classes", type=Path, metavar="FILE", help=listing)
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


def choose_candidates(labels: torch.Tensor, limit: int, seed: int) -> torch.Tensor:
    """int64: for each class at most `limit` random images, class by class."""
    order = torch.from_numpy(shuffle(seed, ORDER, 0, len(labels)))
    by_class = order[torch.argsort(labels[order], stable=True)]
    counts = torch.bincount(labels).tolist()
    return torch.cat([rows[:limit].sort().values for rows in by_class.split(counts)])


def score_crops(
    teacher: Ensemble,
    folder: folders.ImageFolder,
    sizes: np.ndarray,
    dataset: datasets.Dataset,
    args: argparse.Namespace,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best crop of every image of `folder`.

    Returns:
        float32 [images], its cross-entropy, and int32 [images, 4], its box.

    Raises:
        UserError: the teacher's output for an image is not a number.
    """
    device = teacher.runtime.device
    source = images.open_images(folder, sizes, dataset, device, args.workers)
    spec = ViewSpec(dataset.input_size, _BATCH, args.min_scale, mix="none")
    rounds = [draw(spec, sizes, args.seed, epoch) for epoch in range(1, args.crops + 1)]
    # What is scored is what is written: the crop, not its mirror image.
    rounds = [dataclasses.replace(views, flip=torch.zeros_like(views.flip)) for views in rounds]
    best = torch.full((len(sizes),), torch.inf)
    boxes = torch.zeros(len(sizes), 4, dtype=torch.int32)
    bar = cli.progress(desc="scoring crops", unit="crop", total=len(sizes) * max(1, len(rounds)))
    for views in rounds or [centre_views(sizes, _BATCH)]:
        batches = list(views.to(device))
        for batch, pixels in zip(batches, source.render(batches), strict=True):
            index = batch.index.cpu()
            targets = folder.labels[index].to(device)
            loss = F.cross_entropy(teacher.logits(pixels), targets, reduction="none").cpu()
            better = loss < best[index]
            best[index[better]] = loss[better]
            boxes[index[better]] = batch.box.cpu()[better]
            bar.update(len(loss))
    bar.close()
    if not torch.isfinite(best).all():
        path = folder.files[int((~torch.isfinite(best)).nonzero()[0, 0])]
        raise UserError(
            f"the teacher's output for {path} is NaN or infinite: other weights, or --amp off"
        )
    return best, boxes


def write_images(
    out: Path, folder: folders.ImageFolder, chosen: list[list[int]], boxes, size: int, args
) -> None:
    """Writes IPC images per class in the published layout.

    Args:
        out: an empty folder.
        folder: the images.
        chosen: for each class IPC * collage² rows of `folder`, the best first.
        boxes: int32 [images, 4], the crop of every image.
        size: side of the images written, in pixels.
        args: --ipc, --collage, --format.
    """
    tile = size // args.collage
    no_flip = torch.zeros(1, dtype=torch.bool)
    bar = cli.progress(desc="writing images", unit="img", total=len(chosen) * args.ipc)
    for name, best_first in zip(folders.published_names(folder.classes), chosen, strict=True):
        (out / name).mkdir()
        for position in range(args.ipc):
            # Tiles are dealt out so that every collage gets one of the best.
            tiles = []
            for image in best_first[position :: args.ipc]:
                pixels = images.pixels_of(images.decode(folder.files[image]))
                tiles.append(crop_resize(pixels[None], boxes[image : image + 1], no_flip, tile)[0])
            grid = torch.stack(tiles).unflatten(0, (args.collage, args.collage))
            canvas = grid.permute(2, 0, 3, 1, 4).reshape(3, tile * args.collage, -1)
            array = canvas.round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
            path = out / name / f"{position:05d}.{args.format}"
            Image.fromarray(array).save(path, **({"quality": 95} if args.format == "jpg" else {}))
            bar.update()
    bar.close()


def main() -> None:
    args = parse_arguments()
    dataset = datasets.from_arguments(args, inferred=True)
    machine = runtime.start(args.device, args.amp)
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
    teacher = load_teacher(
        args.teacher,
        args.teacher_weights,
        dataset,
        machine,
        classes=folder.classes,
        listing=args.teacher_classes,
    )
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
        candidates = choose_candidates(folder.labels, args.candidates, args.seed)
        looked_at = dataclasses.replace(
            folder,
            files=[folder.files[index] for index in candidates.tolist()],
            labels=folder.labels[candidates],
        )
        sizes, _ = images.inspect(looked_at)
        losses, boxes = score_crops(
            Ensemble([teacher], None, machine), looked_at, sizes, dataset, args
        )
        chosen = []
        for label in range(len(folder.classes)):
            members = (looked_at.labels == label).nonzero()[:, 0]
            chosen.append(members[losses[members].argsort(stable=True)][:needed].tolist())
        write_images(out, looked_at, chosen, boxes, dataset.input_size, args)
        atomic_write(out / folders.SELECTION, to_json(record))
    print(
        f"{args.out_dir}: IPC {args.ipc} for {len(folder.classes)} classes; relabel/generate.py "
        "labels them without BSSL"
    )


if __name__ == "__main__":
    cli.run(main)

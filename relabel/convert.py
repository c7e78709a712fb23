"""Imports a published FKD label folder as a label set that trains without a teacher.

The folder holds `sampler_indices_dict.pt` ({"0": [image indices of pass 0], ...}) and, for every
pass p, `epoch_<p>.tar`: a list of batches [coords, flips, mix_index, lam, bbox, soft_labels].
Crops are stored there as half-precision fractions of the image; imported are the pixels that the
published training code cuts (truncated). soft_labels are softmax(logits / 20); stored are the
centred logits 20 log p.

python relabel/convert.py --fkd-dir F --data-dir D --out-dir L --dataset imagenet1k
"""

import sys
from pathlib import Path

if not __package__:  # run as a plain script: imports start at the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import dataclasses
from typing import NamedTuple

import numpy as np
import torch

from utils import cli
from utils.cli import UserError, bounded
from utils.data import datasets, folders, images
from utils.data.views import Views, ViewSpec
from utils.files import load_tensors, sha256_file
from utils.labels import LabelWriter, centre, make_settings
from utils.metrics import near_chance

TEMPERATURE = 20.0
_INDICES = "sampler_indices_dict.pt"
_FILE = "published label file"
_ROUNDING = 0.01  # of a sum of half-precision probabilities


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = cli.Parser(description="Import a published FKD label folder as a label set.")
    parser.add_argument("--fkd-dir", type=Path, required=True, help="the published label folder")
    parser.add_argument("--data-dir", type=Path, required=True, help="the images it was made for")
    parser.add_argument("--out-dir", type=Path, required=True, help="the label set to make")
    datasets.add_arguments(parser)
    parser.add_argument(
        "--force", action="store_true", help="go on although the labels hardly fit the images"
    )
    crop = "smallest crop the labels were made with; hard epochs use it too"
    parser.add_argument(
        "--min-scale", type=bounded(float, 0.0001, 1), default=0.08, metavar="X", help=crop
    )
    return parser.parse_args()


class PublishedPass(NamedTuple):
    """One pass as published, checked: its views, and float32 [images, C] probabilities."""

    views: Views
    probabilities: torch.Tensor


def read_pass(
    path: Path, order: list[int], sizes: np.ndarray, num_classes: int, input_size: int
) -> PublishedPass:
    """Reads and checks `epoch_<p>.tar`.

    `order` holds the image index of every view, `sizes` [images, 2] heights and widths. Raises
    UserError, naming the batch and what does not fit.
    """
    batches = load_tensors(path, _FILE)
    if not isinstance(batches, list) or not batches:
        raise UserError(f"{path} is not a list of label batches")
    batch_size, start = len(batches[0][1]), 0
    parts: dict[str, list[torch.Tensor]] = {
        name: [] for name in ("box", "flip", "mix_index", "mix_box", "mix_lam", "probabilities")
    }
    for position, batch in enumerate(batches):
        where = f"{path}, batch {position}"
        if not isinstance(batch, (list, tuple)) or len(batch) != 6:
            raise UserError(f"{where}: expected coords, flips, mix_index, lam, bbox, soft_labels")
        coords, flips, mix_index, lam, bbox, probabilities = batch
        coords, flips = torch.as_tensor(coords).float(), torch.as_tensor(flips).bool()
        count = len(flips)
        belong = min(batch_size, len(order) - start)
        if count != belong or coords.shape != (count, 4):
            raise UserError(f"{where}: {count} views where {belong} belong")
        if probabilities.shape != (count, num_classes):
            raise UserError(
                f"{where}: soft labels are {tuple(probabilities.shape)}, expected "
                f"({count}, {num_classes})"
            )
        if not torch.isfinite(probabilities).all():
            raise UserError(f"{where}: soft labels are not finite")
        sums = probabilities.float().sum(dim=1)
        if (probabilities < 0).any() or (sums - 1).abs().max() > _ROUNDING:
            raise UserError(
                f"{where}: soft labels are no probabilities, whose sum is 1, but perhaps logits, "
                "as other codes store them; only softmax(logits / 20) can be imported"
            )
        parts["box"].append(_boxes(coords, sizes[order[start : start + count]], where))
        parts["flip"].append(flips)
        parts["probabilities"].append(probabilities.float())
        if mix_index is not None:
            mix_index = torch.as_tensor(mix_index).long()
            if mix_index.shape != (count,) or not ((mix_index >= 0) & (mix_index < count)).all():
                raise UserError(f"{where}: mix_index does not name views of the batch")
            parts["mix_index"].append(mix_index)
        if bbox is not None:
            box = torch.tensor([int(value) for value in bbox], dtype=torch.int32)
            if len(box) != 4 or not ((box >= 0) & (box <= input_size)).all():
                raise UserError(f"{where}: CutMix box {bbox} does not fit {input_size} pixels")
            parts["mix_box"].append(torch.cat([box[:2], (box[2:] - box[:2]).clamp(min=0)]))
        elif lam is not None:
            parts["mix_lam"].append(torch.tensor(float(lam)))
        start += count
    if start != len(order):
        raise UserError(f"{path} has {start} views, {_INDICES} lists {len(order)}")
    return _assemble(parts, order, batch_size, len(batches), path)


def _boxes(coords: torch.Tensor, sizes: np.ndarray, where: str) -> torch.Tensor:
    """int32 [B, 4] pixels of fractional crops (top, left, height, width), truncated."""
    scale = torch.from_numpy(np.asarray(sizes, dtype=np.float64)).repeat(1, 2)
    box = (coords.double() * scale).trunc().int()
    box[:, 2:].clamp_(min=1)
    limit = torch.from_numpy(np.asarray(sizes, dtype=np.int32))
    if (box[:, :2] < 0).any() or (box[:, :2] + box[:, 2:] > limit).any():
        raise UserError(f"{where}: a crop lies outside its image; are these the right images?")
    return box


def _assemble(
    parts: dict[str, list[torch.Tensor]], order: list[int], batch_size: int, batches: int, path
) -> PublishedPass:
    cutmix, mixup = len(parts["mix_box"]) == batches, len(parts["mix_lam"]) == batches
    if parts["mix_box"] and not cutmix:
        raise UserError(f"{path} mixes batches with and without a CutMix box")
    mixed = cutmix or (mixup and bool((torch.stack(parts["mix_lam"]) < 1).any()))
    if mixed and len(parts["mix_index"]) != batches:
        raise UserError(f"{path} has mixed batches without mix_index")
    views = Views(
        index=torch.tensor(order),
        box=torch.cat(parts["box"]),
        flip=torch.cat(parts["flip"]),
        batch_size=batch_size,
        mix_index=torch.cat(parts["mix_index"]) if mixed else None,
        mix_box=torch.stack(parts["mix_box"]) if cutmix else None,
        mix_lam=torch.stack(parts["mix_lam"]) if mixed and not cutmix else None,
    )
    return PublishedPass(views, torch.cat(parts["probabilities"]))


def to_logits(probabilities: torch.Tensor) -> torch.Tensor:
    """Centred logits 20 log p; a probability that half precision lost becomes its smallest one."""
    smallest = torch.finfo(torch.float16).smallest_normal / 1024
    return centre(TEMPERATURE * probabilities.clamp(min=smallest).log())


def read_order(path: Path, images_count: int) -> list[list[int]]:
    """Image indices of every pass; raises UserError unless each pass holds every image once."""
    if not path.exists():
        raise UserError(
            f"{path.parent} has no {path.name}: only the layout of HALD's published labels can be "
            "imported; relabel/generate.py labels the images anew"
        )
    content = load_tensors(path, _FILE)
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path} is not a dictionary of image indices")
    passes = []
    for pass_index in range(len(content)):
        order = content.get(str(pass_index), content.get(pass_index))
        if order is None:
            raise UserError(f"{path} has no entry for pass {pass_index}")
        order = [int(index) for index in order]
        if sorted(order) != list(range(images_count)):
            raise UserError(
                f"{path}: pass {pass_index} lists {len(order)} images, which are not the "
                f"{images_count} of the image folder once each"
            )
        passes.append(order)
    return passes


def check_fit(
    args: argparse.Namespace,
    one: PublishedPass,
    hard_labels: torch.Tensor,
    dataset: datasets.Dataset,
) -> None:
    """Stops when the labels hardly ever name the class of the image: other images or order."""
    main_class = one.views.mixture(hard_labels, dataset.input_size).main_class()
    hits, count = int((one.probabilities.argmax(1) == main_class).sum()), len(main_class)
    if near_chance(hits, count, dataset.num_classes) and not args.force:
        raise UserError(
            f"only {100 * hits / count:.1f} % of the labels in {args.fkd_dir} name the class of "
            f"their image in {args.data_dir}: probably other images, or another class order; "
            "--force goes on"
        )


def main() -> None:
    args = parse_arguments()
    dataset = datasets.from_arguments(args)
    folder = folders.scan(args.data_dir, dataset.num_classes)
    dataset = dataclasses.replace(dataset, num_classes=len(folder.classes))
    if not args.fkd_dir.is_dir():
        raise UserError(f"published label folder not found: {args.fkd_dir}")
    sizes, fingerprint = images.inspect(folder)
    orders = read_order(args.fkd_dir / _INDICES, len(folder.files))

    def published(pass_index: int) -> PublishedPass:
        path = args.fkd_dir / f"epoch_{pass_index}.tar"
        return read_pass(path, orders[pass_index], sizes, dataset.num_classes, dataset.input_size)

    beginning = published(0)
    check_fit(args, beginning, folder.labels, dataset)
    first = beginning.views
    mix = "none" if first.mix_index is None else "mixup" if first.mix_box is None else "cutmix"
    settings = make_settings(
        dataset=dataset,
        folder=folder,
        sizes=sizes,
        images_sha256=fingerprint,
        ipc=folder.ipc(),
        passes=len(orders),
        spec=ViewSpec(dataset.input_size, first.batch_size, min_scale=args.min_scale, mix=mix),
        seed=None,
        origin={
            "teachers": [],
            "imported": {
                "layout": "FKD",
                "temperature": TEMPERATURE,
                "sampler_indices_sha256": sha256_file(args.fkd_dir / _INDICES),
            },
        },
        codec={"name": "fp16"},
    )
    writer = LabelWriter(args.out_dir, settings, sizes, "--out-dir")
    if writer.complete():
        print(f"{args.out_dir} is complete and verified: nothing to do")
        return
    with writer.begun():
        for pass_index in cli.progress(range(len(orders)), desc="convert", unit="pass"):
            if writer.verified(pass_index):
                continue
            one = published(pass_index)
            boxes_differ = (one.views.mix_box is None) != (first.mix_box is None)
            if one.views.batch_size != first.batch_size or boxes_differ:
                raise UserError(f"pass {pass_index} has another batch size or mixing than pass 0")
            writer.write_pass(pass_index, to_logits(one.probabilities), one.views, folder.labels)
        manifest = writer.finish()
    print(
        f"{args.out_dir}: {len(orders)} passes of {len(folder.files)} soft labels; teacher top-1 "
        f"on the views {manifest['teacher_top1']:.1f} %"
    )


if __name__ == "__main__":
    cli.run(main)

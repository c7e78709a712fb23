"""Imports a published label folder as a label set that trains without a teacher.

The layouts are those of HALD, SRe2L, FADRM, CV-DD, LPLD and LPQLD (relabel/published.py); the
folder tells which. Published boxes are half-precision fractions, which those codes truncate to
pixels: another box than the teacher saw in most views. Rounding gives the teacher's, and is done
here; --boxes published keeps the truncated ones.

python relabel/convert.py --fkd-dir F --data-dir D --out-dir L --dataset imagenet1k
"""

import sys
from pathlib import Path

if not __package__:  # run as a plain script: imports start at the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import hashlib
import math
from typing import NamedTuple

import torch

from relabel.compress import copy_labels
from relabel.published import TEMPERATURE, PublishedLabels
from utils import cli
from utils.cli import UserError, bounded
from utils.data import custom, datasets, folders, images
from utils.data.views import Mixture, Views, ViewSpec
from utils.labels import LabelWriter, codecs, make_settings

_CHECKED_VIEWS = 1000  # at least, and two passes, before anything is written
_LEAST_ABOVE_CHANCE = 0.025  # of the teacher's top-1 on the views


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = cli.Parser(description="Import a published label folder as a label set.")
    add = parser.add_argument
    add("--fkd-dir", type=Path, required=True, help="the published label folder")
    add("--data-dir", type=Path, required=True, help="the images it was made for")
    add("--out-dir", type=Path, required=True, help="the label set to make")
    datasets.add_arguments(parser)
    boxes = "crops in whole pixels: rounded, as the teacher saw them, or truncated, as published "
    boxes += "code trains on them"
    add("--boxes", choices=("rounded", "published"), default="rounded", help=boxes)
    seed = {"type": bounded(int, 0, 2**62), "default": 42, "metavar": "N"}
    add("--fkd-seed", **seed, help="of the image order, where the folder does not hold it")
    add("--force", action="store_true", help="go on although the labels hardly fit the images")
    crop = {"type": bounded(float, 0.0001, 1), "default": 0.08, "metavar": "X"}
    crop["help"] = "smallest crop the labels were made with; hard epochs use it too"
    add("--min-scale", **crop)
    codecs.add_arguments(parser, default="fp16")
    parser.set_defaults(codec=None)  # what is right depends on the folder
    return parser.parse_args()


class Fit(NamedTuple):
    """How well labels fit the classes of their views."""

    right: torch.Tensor  # bool [N], whether the label's top-1 class is the view's main one
    # float32 [N], the standardised logit of each class in a view, weighted by its share. Unlike
    # top-1, it does not depend on which class of an even mixture the teacher names. For labels of
    # other views it is 0 on average, with a standard deviation of at most 1.
    score: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor, mixture: Mixture) -> "Fit":
        """Of centred logits [N, C] and what the views show."""
        standard = logits / logits.square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-12)
        own, partner = (
            standard.gather(1, classes[:, None])[:, 0] for classes in (mixture.own, mixture.partner)
        )
        right = logits.argmax(dim=1) == mixture.main_class()
        return cls(right, mixture.lam * own + (1 - mixture.lam) * partner)

    def falls_behind(self, other: "Fit") -> bool:
        """Whether these labels certainly fit less than half as well as others."""
        expected = float(other.score.mean())
        noise = 3 / math.sqrt(len(self.score))
        return float(self.score.mean()) < min(expected / 2, expected - noise)


def share_of(right: torch.Tensor) -> float:
    """The teacher's top-1 on views, of whether each is named right."""
    return int(right.sum()) / len(right)


def convinces(right: torch.Tensor, classes: int) -> bool:
    """Whether labels name their classes far more often than those in another order would.

    The score would not tell: classes that follow each other in a list may be alike.
    """
    chance = 1 / classes
    deviations = 3 * math.sqrt(chance * (1 - chance) / len(right))
    return share_of(right) > chance + max(deviations, _LEAST_ABOVE_CHANCE)


def check_fit(published: PublishedLabels, seed: int, force: bool) -> Fit:
    """Takes the image order that fits the first passes best; returns how well it does.

    Raises UserError, which says what is in doubt, unless one fits or is forced.
    """
    enough = max(2, math.ceil(_CHECKED_VIEWS / len(published.sizes)))
    first_passes = range(min(published.passes, enough))
    tried, classes = [], published.dataset.num_classes
    for orders in published.derived_orders(seed) if published.derived else [published.orders]:
        published.orders = orders
        fits = [Fit.of(*published.read_pass(pass_index)[1:]) for pass_index in first_passes]
        tried.append((Fit(*map(torch.cat, zip(*fits, strict=True))), fits, orders))
    fit, fits, published.orders = max(tried, key=lambda each: share_of(each[0].right))
    late = any(each.falls_behind(fits[0]) for each in fits)
    if (convinces(fit.right, classes) and not late) or force:
        return fit
    reason = "probably other images, or another class order"
    if published.derived and convinces(fits[0].right, classes):
        reason = (
            "the image order derived for the first pass fits, those of later passes do not: they "
            "were not drawn one after the other by torch's sampler"
        )
    elif published.derived and not names_other_classes(published):
        reason = f"the image order is not that of --fkd-seed {seed}, or these are other images"
    top1 = 100 * share_of(fit.right)
    raise UserError(
        f"{published.folder}: teacher top-1 on the views is only {top1:.1f} %: {reason}; "
        "--force goes on"
    )


def names_other_classes(published: PublishedLabels) -> bool:
    """Whether views of one class are labelled alike: the image order fits, the classes do not."""
    _, logits, mixture = published.read_pass(0)
    main, order = mixture.main_class().sort(stable=True)
    pairs = main[1:] == main[:-1]
    alike = logits.argmax(dim=1)[order].diff()[pairs] == 0
    return len(alike) > 0 and convinces(alike, published.dataset.num_classes)


def origin_of(published: PublishedLabels, seed: int) -> dict:
    """What the manifest says of where the labels come from."""
    orders = b"".join(order.astype("<i4").tobytes() for order in published.orders)
    imported = {
        "layout": published.layout,
        "labels": published.kind,
        "temperature": TEMPERATURE if published.kind == "probabilities" else None,
        "boxes": published.boxes,
        "order_seed": seed if published.derived else None,
        "order_sha256": hashlib.sha256(orders).hexdigest(),
        "source_sha256": published.fingerprint(),
    }
    return {"teachers": [], "imported": imported}


def describe(published: PublishedLabels, seed: int) -> str:
    """What was found, in a line."""
    kind = f"the {published.topk} largest logits" if published.topk else published.kind
    order = f"from {published.order_file.name}"
    if published.derived:
        order = f"derived from seed {seed}"
    text = (
        f"{published.folder}: layout of {published.layout}, {len(published.stored)} batches of "
        f"{published.batch_size} views, {kind}; image order {order}; boxes {published.boxes}"
    )
    if published.boxes == "rounded":
        text += " to the pixels that the teacher saw (--boxes published truncates)"
    if repeated := published.passes * published.per_pass - len(published.stored):
        text += f"; the last pass is filled up with the first {repeated} batches"
    return text


def main() -> None:
    args = parse_arguments()
    dataset = datasets.from_arguments(args, inferred=True)
    if dataset.input_size is None:  # the labelled views may have another size than the images
        raise UserError("--dataset custom also needs --input-size, the side of the labelled views")
    folder = folders.scan(args.data_dir, dataset.num_classes)
    sizes, fingerprint = images.inspect(folder)
    dataset = custom.complete(dataset, folder, sizes)
    published = PublishedLabels(args.fkd_dir, folder, sizes, dataset, args.boxes)
    if published.topk and args.codec in (None, "topk"):
        args.codec, args.topk = "topk", args.topk or published.topk
    args.codec = args.codec or "fp16"
    first = check_fit(published, args.fkd_seed, args.force)
    print(describe(published, args.fkd_seed))

    def read(pass_index: int) -> tuple[Views, torch.Tensor, int]:
        views, logits, mixture = published.read_pass(pass_index)
        fit = Fit.of(logits, mixture)
        share, expected = share_of(fit.right), share_of(first.right)
        if fit.falls_behind(first) and not args.force:
            raise UserError(
                f"{args.fkd_dir}: teacher top-1 on the views of pass {pass_index} is only "
                f"{100 * share:.1f} %, on those of the first ones {100 * expected:.1f} %: its "
                "image order does not fit; --force goes on"
            )
        # A pass of a pruned folder has a few views more than there are images.
        return views, logits, round(share * len(folder.files))

    spec = ViewSpec(dataset.input_size, published.batch_size, args.min_scale, mix=published.mix)
    settings = make_settings(
        dataset=dataset,
        folder=folder,
        sizes=sizes,
        images_sha256=fingerprint,
        ipc=folder.ipc(),
        passes=published.passes,
        spec=spec,
        seed=None,
        origin=origin_of(published, args.fkd_seed),
        codec=codecs.from_arguments(args),
    )
    writer = LabelWriter(args.out_dir, settings, sizes, "--out-dir")
    if writer.complete():
        print(f"{args.out_dir} is complete and verified: nothing to do")
        return
    manifest = copy_labels(writer, read, folder.labels, "convert")
    print(
        f"{args.out_dir}: {published.passes} passes of {len(folder.files)} soft labels; teacher "
        f"top-1 on the views {manifest['teacher_top1']:.1f} %"
    )


if __name__ == "__main__":
    cli.run(main)

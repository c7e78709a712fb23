"""Stores the labels of a label set in another codec.

python relabel/compress.py --label-dir L --out-dir L2 --codec klt --bytes-per-label 64
"""

import sys
from pathlib import Path

if not __package__:  # run as a plain script: imports start at the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
from collections.abc import Iterator

import torch

from utils import cli, codecs
from utils.cli import UserError
from utils.codecs.base import Codes, Mixture, distortion
from utils.labels import LabelSet, LabelWriter
from utils.views import Views

_ROWS = 1024  # labels expanded at once


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = cli.Parser(description="Store the labels of a label set in another codec.")
    parser.add_argument("--label-dir", type=Path, required=True, help="a finished label set")
    parser.add_argument("--out-dir", type=Path, required=True, help="the label set to make")
    parser.add_argument(
        "--slc", type=cli.bounded(int, 1), metavar="N", help="only so many soft labels per class"
    )
    codecs.add_arguments(parser)
    return parser.parse_args()


def expanded(
    source: LabelSet, views: Views, codes: Codes
) -> Iterator[tuple[torch.Tensor, Mixture]]:
    """The labels of a pass as float32 [n, C] centred logits and mixtures, a chunk at a time."""
    mixture = source.mixture(views)
    for start in range(0, len(views.index), _ROWS):
        rows = slice(start, start + _ROWS)
        yield source.codec.expand(tuple(code[rows] for code in codes), mixture[rows]), mixture[rows]


def all_passes(source: LabelSet) -> Iterator[tuple[torch.Tensor, Mixture]]:
    """The labels of all passes, a chunk at a time."""
    for number in range(source.passes):
        yield from expanded(source, *source.load_pass(number))


def lost(source: LabelSet, result: LabelSet) -> float:
    """Distortion at temperature 20 of the first labels, against those they were made from."""
    before, _ = next(all_passes(source))
    after, _ = next(all_passes(result))
    return distortion(before, after)


def main() -> None:
    args = parse_arguments()
    parameters = codecs.from_arguments(args)
    source = LabelSet.open(args.label_dir)
    if args.slc is not None:
        source.use_slc(args.slc)
    if args.out_dir.resolve() == args.label_dir.resolve():
        raise UserError("--out-dir is --label-dir; the labels need a folder of their own")
    settings = {
        key: value for key, value in source.manifest.items() if key not in ("teacher_top1", "files")
    } | {"codec": parameters, "recoded_from": source.manifest["codec"], "passes": source.passes}
    if args.slc is not None:
        settings["slc"] = args.slc
    writer = LabelWriter(args.out_dir, settings, source.sizes, "--out-dir")
    if writer.complete():
        print(f"{args.out_dir} is complete and verified: nothing to do")
        return
    with writer.begun():
        if writer.codec is None:
            print(f"fitting codec {args.codec}", flush=True)
            writer.fit(all_passes(source))
        for number in cli.progress(range(source.passes), desc="compress", unit="pass"):
            if not writer.verified(number):
                views, codes = source.load_pass(number)
                logits = (chunk for chunk, _ in expanded(source, views, codes))
                correct = source.teacher_correct(number)
                writer.write_pass(number, logits, views, source.hard_labels, correct)
        writer.finish()
    result = LabelSet.open(args.out_dir)
    labels = source.passes * source.manifest["images"]["count"]
    before, after = source.bytes_on_disk(), result.bytes_on_disk()
    print(
        f"{labels} soft labels in {args.out_dir}: {after:,} bytes, {after / labels:.1f} per label "
        f"(before: {before / labels:.1f}, a factor of {before / after:.1f}); distortion at "
        f"temperature 20 of the first labels {lost(source, result):.4f}"
    )


if __name__ == "__main__":
    cli.run(main)

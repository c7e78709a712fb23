"""Stores the labels of a label set in another codec.

python relabel/compress.py --label-dir L --out-dir L2 --codec klt --bytes-per-label 64
"""

import sys
from pathlib import Path

if not __package__:  # run as a plain script: imports start at the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
from collections.abc import Callable, Iterable, Sequence

import torch

from utils import cli, runtime
from utils.cli import UserError
from utils.data.views import Views
from utils.labels import LabelSet, LabelWriter, codecs
from utils.labels.codecs.base import information

_ROWS = 1024  # labels compared at once, in double precision


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, or other arguments."""
    parser = cli.Parser(description="Store the labels of a label set in another codec.")
    add = parser.add_argument
    add("--label-dir", type=Path, required=True, help="a finished label set")
    add("--out-dir", type=Path, required=True, help="the label set to make")
    slc = "only so many soft labels per class"
    add("--slc", type=cli.bounded(int, 1), metavar="N", help=slc)
    codecs.add_arguments(parser)
    return parser.parse_args(arguments)


def compare(
    labels: LabelSet, reference: LabelSet, passes: Iterable[int], temperatures: Sequence[float]
) -> tuple[list[float], float]:
    """Distortion, as the codecs define it, by temperature; the share of equal top-1 classes.

    Two passes are in memory at a time. Raises UserError when the sets label different views.
    """
    sums = torch.zeros(len(temperatures), 2, dtype=torch.float64)
    agree = count = 0
    for pass_index in passes:
        views, stored = labels.whole_pass(pass_index)
        expected_views, teacher = reference.whole_pass(pass_index)
        if views.checksum() != expected_views.checksum():
            raise UserError(
                f"views of pass {pass_index} in {labels.path} differ from those in {reference.path}"
            )
        agree += int((stored.argmax(1) == teacher.argmax(1)).sum())
        count += len(stored)
        for pair in zip(teacher.split(_ROWS), stored.split(_ROWS), strict=True):
            told = [information(*pair, temperature) for temperature in temperatures]
            sums += torch.tensor(told, dtype=torch.float64)
    missing, told = sums.unbind(1)
    # As in `distortion`, labels that say nothing have nothing to lose.
    return torch.where(told > 0, missing / told, 0).tolist(), agree / count


def copy_labels(
    writer: LabelWriter,
    read: Callable[[int], tuple[Views, torch.Tensor, int]],
    hard_labels: torch.Tensor,
    what: str,
) -> dict:
    """Makes a label set of labels that exist, one pass in memory at a time; returns its manifest.

    `read` gives the views of a pass, their float32 [N, C] logits, and the teacher's hits.
    """
    with writer.begun():
        if needed := writer.passes_to_fit():
            print(f"fitting codec {writer.settings['codec']['name']}", flush=True)
            writer.fit((read(pass_index)[:2] for pass_index in range(needed)), hard_labels)
        for pass_index in cli.progress(range(writer.settings["passes"]), desc=what, unit="pass"):
            if not writer.verified(pass_index):
                views, logits, correct = read(pass_index)
                writer.write_pass(pass_index, logits, views, hard_labels, correct)
                del logits  # before the next is read
        return writer.finish()


def main() -> None:
    args = parse_arguments()
    parameters = codecs.from_arguments(args)
    source = LabelSet.open(args.label_dir)
    if args.slc is not None:
        source.passes = source.passes_for(args.slc)
    if args.out_dir.resolve() == args.label_dir.resolve():
        raise UserError("--out-dir is --label-dir; the labels need a folder of their own")
    labels = source.passes * source.manifest["images"]["count"]
    before, budget = source.bytes_on_disk(), parameters.get("bytes_per_label", 0)
    if budget > before / labels:
        raise UserError(
            f"--bytes-per-label {budget:g}: the labels in {args.label_dir} take "
            f"{before / labels:.1f} bytes each already, and more bytes do not bring back what is "
            "lost; give a smaller budget, or --distortion"
        )
    packer = {k: v for k, v in runtime.versions().items() if k == "pcodec"}
    settings = {
        **source.manifest,
        "passes": source.passes,
        "codec": parameters,
        "recoded_from": source.manifest["codec"],
        "versions": {**source.manifest["versions"], **packer},
        "slc": args.slc or source.manifest["slc"],
    }
    writer = LabelWriter(args.out_dir, settings, source.sizes, "--out-dir")
    if writer.complete():
        print(f"{args.out_dir} is complete and verified: nothing to do")
        return

    def read(pass_index: int) -> tuple[Views, torch.Tensor, int]:
        return *source.whole_pass(pass_index), source.teacher_correct(pass_index)

    copy_labels(writer, read, source.hard_labels, "compress")
    result = LabelSet.open(args.out_dir)
    (lost,), _ = compare(result, source, [0], (20.0,))
    after, counted = result.bytes_on_disk(), result.budgeted_bytes() / labels
    print(
        f"{labels} soft labels in {args.out_dir}: {after:,} bytes, {after / labels:.1f} per label "
        f"(before: {before / labels:.1f}, a factor of {before / after:.1f}), {counted:.1f} "
        "of them for labels and codec, which a budget counts, the rest for manifest and checksums; "
        f"distortion at temperature 20 of the first pass {lost:.4f}, against the labels in "
        f"{args.label_dir}"
    )


if __name__ == "__main__":
    cli.run(main)

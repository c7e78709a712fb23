"""Images per second of both stages and of evaluation, against the straightforward pipeline.

python benchmarks/speed.py --out benchmarks/results/speed

Both pipelines (ours, and benchmarks/straightforward.py) work on the same JPEG files with the same
network and batch size and are timed by turns. Writes OUT.csv (every timing) and OUT.txt (the table
that is also printed).
"""

import sys
from pathlib import Path

if not __package__:  # run as a plain script: imports start at the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import contextlib
import shlex
import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import partial

import torch

from analysis.tables import column, grouped
from benchmarks import straightforward
from benchmarks.bench import Bench, add_arguments
from benchmarks.measuring import by_turns, processor
from relabel.generate import fit_codec, label_pass, views_per_forward
from relabel.packers import default_packers, pass_writer
from relabel.teacher import Ensemble, Teacher
from utils import cli, runtime
from utils.cli import bounded
from utils.data import evaluation
from utils.data.views import draw
from utils.files import atomic_write
from utils.labels import LabelWriter, codecs, make_settings
from utils.labels.manifest import pass_name
from utils.results import provenance, write_csv
from validate.evaluate import accuracy
from validate.kinds import Batch, hard_loss
from validate.step import Step, compiled, parameter_groups

PLAIN, OURS, COMPILED = "straightforward", "ours", "ours, compiled"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="files to write, without ending")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=[*STAGES])
    parser.add_argument("--repeats", type=bounded(int, 1), default=5, metavar="N")
    passes = "over all images per timing"
    parser.add_argument("--passes", type=bounded(int, 1), default=1, metavar="N", help=passes)
    codecs.add_arguments(parser, default="fp16")
    add_arguments(parser)
    parser.set_defaults(views_per_forward=None)  # relabel/generate.py's own default
    return parser.parse_args()


class Relabelling:
    """Stage 1 as relabel/generate.py runs it; a codec that has to be fitted is so beforehand."""

    def __init__(self, bench: Bench):
        args, machine = bench.args, bench.begin_stage()
        self.source, self.labels = bench.resident(), bench.folder.labels
        teacher = Teacher("", bench.teacher(torch.channels_last), "")
        self.ensemble = Ensemble([teacher], None, machine)
        settings = make_settings(
            dataset=bench.dataset,
            folder=bench.folder,
            sizes=bench.sizes,
            images_sha256="",
            ipc=None,
            passes=args.passes * (args.repeats + 1),
            spec=bench.spec,
            seed=0,
            origin={"views_per_forward": views_per_forward(args, machine.device)},
            codec=codecs.from_arguments(args),
        )
        self.writer = LabelWriter(bench.root / "labels", settings, bench.sizes)
        if self.writer.codec is None:
            with self.writer.begun():
                fit_codec(self.writer, self.ensemble, self.source, self.labels)
        # For all timings, as processes take seconds to start; the first timing does not count.
        self.beside = contextlib.ExitStack()
        writing = pass_writer(self.writer, default_packers(machine.device))
        self.write_pass = self.beside.enter_context(writing)

    def run(self, passes: range) -> None:
        """Labels, packs and writes some passes."""
        with self.writer.begun(), cli.progress(disable=True) as bar:
            for pass_index in passes:
                views, logits = label_pass(pass_index, self.writer, self.ensemble, self.source, bar)
                self.write_pass(pass_index, logits, views, self.labels)
            while not all((self.writer.path / pass_name(one)).exists() for one in passes):
                time.sleep(0.005)


class Training:
    """Hard-label epochs as validate/train.py runs them.

    Attributes:
        step: makes the optimiser steps.
    """

    def __init__(self, bench: Bench, compile_student: bool = False):
        machine = bench.begin_stage()
        self.bench, self.source = bench, bench.resident()
        self.labels = bench.folder.labels.to(machine.device)
        model = bench.network(torch.channels_last).train()
        optimizer = torch.optim.AdamW(parameter_groups(model, 0.01), lr=1e-3, fused=True)
        model = compiled(model, machine, grad_accum=1) if compile_student else model
        self.step = Step(model, optimizer, machine.scaler(), machine)

    def batches(self, epoch: int) -> Iterator[Batch]:
        """One view of every image."""
        views = draw(self.bench.spec, self.bench.sizes, seed=0, epoch=epoch + 1)
        views = list(views.to(self.labels.device))
        for batch_views, pixels in zip(views, self.source.render(views), strict=True):
            mixture = batch_views.mixture(self.labels, self.source.size)
            yield Batch(pixels, own=mixture.own, partner=mixture.partner, lam=mixture.lam)

    def loss(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The mean loss of a batch, float32 []."""
        return hard_loss(logits, batch.mixture, straightforward.SMOOTHING)

    def run(self, epochs: range) -> None:
        """Trains for some epochs."""
        for epoch in epochs:
            self.step.begin_epoch()
            for batch in self.batches(epoch):
                self.step([batch], self.loss)
            self.step.means()


class Evaluation:
    """Evaluation as validate/train.py does it, of the same images as if for validation."""

    def __init__(self, bench: Bench):
        self.bench, self.machine = bench, bench.begin_stage()
        self.model = bench.network(torch.channels_last)
        self.pixels = evaluation.load(bench.folder, bench.dataset, self.machine.device)

    def run(self, passes: range) -> None:
        """Evaluates once for each pass."""
        for _ in passes:
            accuracy(
                self.model,
                pixels=self.pixels,
                targets=self.bench.folder.labels,
                dataset=self.bench.dataset,
                machine=self.machine,
            )


STAGES = {
    "relabel": {PLAIN: straightforward.Relabelling, OURS: Relabelling},
    "train": {
        PLAIN: straightforward.Training,
        OURS: Training,
        COMPILED: partial(Training, compile_student=True),
    },
    "evaluate": {OURS: Evaluation},
}


def projection(rows: list[dict]) -> list[str]:
    """Minutes to train on ImageNet-1K at IPC 10: a line where training and evaluation are timed."""
    rates = {
        (stage, name): statistics.median(column(timings, "images_per_second"))
        for (stage, name), timings in grouped(rows, "stage", "pipeline").items()
    }
    if ("train", OURS) not in rates or ("evaluate", OURS) not in rates:
        return []
    training = max(rates["train", OURS], rates.get(("train", COMPILED), 0))
    minutes = (300 * 10_000 / training + 30 * 50_000 / rates["evaluate", OURS]) / 60
    what = "300 epochs of 10,000 images with 30 evaluations of 50,000, projected"
    return [f"{what}: {minutes:.1f} min"]


def table(rows: list[dict]) -> str:
    """Median rates, and ratios to the straightforward pipeline turn by turn, with their range."""
    title = f"{'stage':9}{'pipeline':17}{'images/s':>9}{'ratio':>8}{'(min to max)':>17}"
    lines = [f"{title}{'peak MB':>9}{'GPU %':>7}"]
    groups = grouped(rows, "stage", "pipeline")
    for (stage, name), timings in groups.items():
        rates, ratio, spread = column(timings, "images_per_second"), "", ""
        if (stage, PLAIN) in groups:
            plain = column(groups[stage, PLAIN], "images_per_second")
            ratios = [rate / other for rate, other in zip(rates, plain, strict=True)]
            ratio = f"{statistics.median(ratios):.2f}"
            spread = f"({min(ratios):.2f} to {max(ratios):.2f})"
        used = [percent for percent in column(timings, "gpu_percent") if percent is not None]
        percent = f"{statistics.mean(used):.0f}" if used else "-"
        line = f"{stage:9}{name:17}{statistics.median(rates):9.1f}{ratio:>8}{spread:>17}"
        lines.append(f"{line}{max(column(timings, 'peak_mb')):9}{percent:>7}")
    return "\n".join(lines)


def main() -> None:
    args = parse_arguments()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as root:
        bench = Bench.begin(args, Path(root))
        for stage in args.stages:
            print(f"{stage} ...", flush=True)
            pipelines = {name: partial(make, bench) for name, make in STAGES[stage].items()}
            if not args.compile:
                pipelines.pop(COMPILED, None)
            rows += [{"stage": stage, **timing} for timing in by_turns(pipelines, bench)]
    about = [
        provenance(shlex.join(["python", "benchmarks/speed.py", *sys.argv[1:]])),
        f"{processor()}; {runtime.describe(bench.machine)}",
        f"{args.classes} classes x {args.ipc}, {args.size} x {args.size} JPEG; {args.model}, batch "
        f"size {args.batch_size}, {args.workers} workers, codec {args.codec}",
        f"{PLAIN}: fp32, JPEG decoded for every view, one batch per forward pass",
    ]
    report = "\n".join([*about, "", table(rows), *projection(rows)])
    # Not with_suffix: a name may have a dot of its own.
    write_csv(rows, args.out.with_name(f"{args.out.name}.csv"), *about)
    atomic_write(args.out.with_name(f"{args.out.name}.txt"), f"{report}\n".encode())
    print(report)


if __name__ == "__main__":
    cli.run(main)

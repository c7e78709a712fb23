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
import dataclasses
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
from benchmarks.measuring import by_turns
from relabel.generate import fit_codec, label_passes, views_per_forward
from relabel.packers import default_packers, pass_writer
from relabel.teacher import Ensemble, Teacher
from utils import cli, hardware, runtime
from utils.cli import UserError, bounded
from utils.data import evaluation
from utils.files import atomic_write
from utils.labels import LabelWriter, codecs, make_settings
from utils.labels.manifest import pass_name
from utils.results import provenance, write_csv
from validate import train
from validate.evaluate import accuracy
from validate.settings import Materials, resolve
from validate.settings import parse_arguments as training_arguments

MOST_PASSES = 10_000  # that relabelling could ever be timed over
_PATIENCE = 60  # seconds until passes that are packed are on disk
PLAIN, OURS, EAGER, COMPILED = "straightforward", "ours", "eager", "compiled"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = cli.Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, help="files to write, without ending")
    add("--stages", nargs="+", choices=STAGES, default=[*STAGES])
    kinds = "eager and compiled: our training without CUDA graphs, and with a compiled student"
    known = {"choices": [PLAIN, OURS, EAGER, COMPILED], "default": [PLAIN, OURS, EAGER]}
    add("--pipelines", nargs="+", **known, help=kinds)
    add("--repeats", type=bounded(int, 1), default=5, metavar="N")
    seconds = "a timing goes over all images as often as takes about so long"
    add("--seconds", type=bounded(float, 0), default=1, metavar="S", help=seconds)
    count = "evaluate so many, the same ones again and again (default: all)"
    add("--val-images", type=bounded(int, 1), metavar="N", help=count)
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
        self.ensemble = Ensemble([teacher], None, machine, graph=True)
        settings = make_settings(
            dataset=bench.dataset,
            folder=bench.folder,
            sizes=bench.sizes,
            images_sha256="",
            ipc=None,
            passes=MOST_PASSES,
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
        packing = contextlib.ExitStack()
        writing = pass_writer(self.writer, default_packers(machine.device, self.writer))
        self.write_pass, self.close = packing.enter_context(writing), packing.close

    def run(self, passes: range) -> int:
        """Labels, packs and writes some passes; returns the number of views."""
        with self.writer.begun(), cli.progress(disable=True) as bar:
            labelled = label_passes(passes, self.writer, self.ensemble, self.source, bar)
            for pass_index, views, logits in labelled:
                self.write_pass(pass_index, logits, views, self.labels)
            given_up = time.monotonic() + _PATIENCE
            while not all((self.writer.path / pass_name(one)).exists() for one in passes):
                time.sleep(0.005)
                if time.monotonic() > given_up:
                    raise UserError("passes were packed, but not written; is the disk full?")
        return len(passes) * len(self.labels)


class Training:
    """Hard-label epochs as validate/train.py trains them; `training`: see validate.train."""

    def __init__(self, bench: Bench, **settings: bool):
        """The settings are those of --graph and --compile, where they are not the defaults."""
        args, machine, folder = bench.args, bench.begin_stage(), bench.folder
        words = ["--data-dir", folder.root, "--val-dir", folder.root, "--output-dir", bench.root]
        words += ["--dataset", "imagenet1k", "--model", args.model, "--lr", 0.001, "--eta", 2]
        words += ["--batch-size", args.batch_size, "--schedule", "hard:10000"]
        materials = Materials(bench.dataset, folder, bench.sizes, "", folder, labels=None)
        resolved = resolve(training_arguments([*map(str, words)]), materials, machine)
        resolved = dataclasses.replace(resolved, **settings)
        self.training = train.Training(resolved, materials, machine)

    def run(self, epochs: range) -> int:
        """Trains for some epochs; returns the number of images."""
        images = 0
        for epoch in epochs:
            for _ in self.steps(epoch):
                pass
            images += self.training.step.views
            self.training.step.means()
        return images

    def steps(self, epoch: int) -> Iterator[None]:
        """Trains an epoch, step by step."""
        kind = self.training.begin_epoch(epoch)
        for batches in self.training.batches(kind, epoch):
            self.training.step(batches, kind.loss)
            yield


class Evaluation:
    """Evaluation as validate/train.py does it, of the same images, again and again."""

    def __init__(self, bench: Bench):
        machine, model = bench.begin_stage(), bench.network(torch.channels_last)
        decoded = evaluation.load(bench.folder, bench.dataset, machine.device)
        rows = torch.arange(bench.args.val_images or len(decoded)) % len(decoded)
        self.images, labels = len(rows), bench.folder.labels[rows]
        pixels = decoded[rows.to(decoded.device)]
        self.evaluate = partial(accuracy, model, pixels, labels, bench.dataset, machine)

    def run(self, passes: range) -> int:
        """Evaluates once for each pass; returns the number of images."""
        for _ in passes:
            self.evaluate()
        return len(passes) * self.images


STAGES = {
    "relabel": {PLAIN: straightforward.Relabelling, OURS: Relabelling},
    "train": {
        PLAIN: straightforward.Training,
        OURS: Training,
        EAGER: partial(Training, graph=False),
        COMPILED: partial(Training, compile=True),
    },
    "evaluate": {OURS: Evaluation},
}


def projection(rows: list[dict]) -> list[str]:
    """Minutes to train on ImageNet-1K at IPC 10: a line where training and evaluation are timed."""
    rates = {
        key: statistics.median(column(timings, "images_per_second"))
        for key, timings in grouped(rows, "stage", "pipeline").items()
    }
    if ("train", OURS) not in rates or ("evaluate", OURS) not in rates:
        return []
    training = max(rates["train", OURS], rates.get(("train", COMPILED), 0))
    minutes = (300 * 10_000 / training + 30 * 50_000 / rates["evaluate", OURS]) / 60
    what = "300 epochs of 10,000 images with 30 evaluations of 50,000, projected"
    return [f"{what}: {minutes:.1f} min"]


def table(rows: list[dict]) -> str:
    """Median rates, and ratios to the straightforward pipeline turn by turn, with their range."""
    line = "{:9}{:17}{:>9}{:>8}{:>17}{:>9}{:>7}"
    title = ("stage", "pipeline", "images/s", "ratio", "(min to max)", "peak MB", "GPU %")
    lines = [line.format(*title)]
    groups = grouped(rows, "stage", "pipeline")
    for (stage, name), timings in groups.items():
        rates, ratio, spread = column(timings, "images_per_second"), "", ""
        if (stage, PLAIN) in groups:
            plain = column(groups[stage, PLAIN], "images_per_second")
            ratios = [rate / other for rate, other in zip(rates, plain, strict=False)]
            ratio = f"{statistics.median(ratios):.2f}"
            spread = f"({min(ratios):.2f} to {max(ratios):.2f})"
        used = [percent for percent in column(timings, "gpu_percent") if percent is not None]
        percent = f"{statistics.mean(used):.0f}" if used else "-"
        rate, most = f"{statistics.median(rates):.1f}", max(column(timings, "peak_mb"))
        lines.append(line.format(stage, name, rate, ratio, spread, most, percent))
    return "\n".join(lines)


def main() -> None:
    args = parse_arguments()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict] = []
    report = "nothing was timed: these stages have none of these pipelines"
    with tempfile.TemporaryDirectory() as root:
        bench = Bench(args, Path(root))
        cores, machine = runtime.usable_cores(), runtime.describe(bench.machine)
        about = [
            provenance(shlex.join(["python", "benchmarks/speed.py", *sys.argv[1:]])),
            f"{hardware.processor()}, {cores} CPU cores; {machine}",
            f"{args.classes} classes x {args.ipc}, {args.size} x {args.size} JPEG; {args.model}, "
            f"batch size {args.batch_size}, {args.workers} workers, codec {args.codec}",
            f"{PLAIN}: PyTorch's defaults (fp32; on a GPU TF32 in convolutions), JPEG decoded for "
            "every view, one batch per forward pass",
        ]
        if bench.machine.device.type == "cpu":  # which has no graphs to do without
            args.pipelines = [name for name in args.pipelines if name != EAGER]
        for stage in args.stages:
            print(f"{stage} ...", flush=True)
            known = STAGES[stage].items()
            made_by = {name: partial(make, bench) for name, make in known if name in args.pipelines}
            for timing in by_turns(made_by, bench):
                rows.append({"stage": stage, **timing})
                report = "\n".join([*about, "", table(rows), *projection(rows)])
                # Not with_suffix: a name may have a dot of its own.
                write_csv(rows, args.out.with_name(f"{args.out.name}.csv"), *about)
                atomic_write(args.out.with_name(f"{args.out.name}.txt"), f"{report}\n".encode())
    print(report)


if __name__ == "__main__":
    cli.run(main)

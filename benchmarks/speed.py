"""Images per second of relabelling, training and evaluation, against the straightforward pipeline.

python benchmarks/speed.py --out runs/speed

Our pipelines and those of benchmarks/straightforward.py work on the same JPEG files with the same
network and batch size and take turns, each in a process of its own. Writes OUT.csv (every timing)
and OUT.txt (the table that is also printed).
"""

import sys
from pathlib import Path

if not __package__:  # run as a plain script: imports start at the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import datetime
import shlex
import statistics
import tempfile
from functools import partial

import torch

from benchmarks import straightforward
from benchmarks.bench import Bench, add_arguments
from benchmarks.measuring import by_turns, describe_machine
from relabel.generate import label_pass, pass_writer, views_per_forward
from relabel.teacher import Ensemble, Teacher
from utils import cli, runtime
from utils.cli import bounded
from utils.data.views import Views, draw
from utils.files import atomic_write
from utils.labels import LabelWriter, centre, codecs, make_settings
from utils.labels.codecs.base import distortion
from utils.results import write_csv
from validate.evaluate import accuracy
from validate.kinds import Batch, hard_loss
from validate.step import Step, compiled, parameter_groups

PLAIN, OURS = "straightforward", "ours"
SMOOTHING = 0.8
SLC = 150  # of the published recipe; the fitted part of a codec serves so many labels


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = cli.Parser(description="Speed of both stages against the straightforward pipeline.")
    parser.add_argument("--out", type=Path, required=True, help="files to write, without ending")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=[*STAGES])
    parser.add_argument("--repeats", type=bounded(int, 1), default=5, metavar="N")
    passes = "over all images per timing"
    parser.add_argument("--passes", type=bounded(int, 1), default=1, metavar="N", help=passes)
    codecs.add_arguments(parser, default="fp16")
    add_arguments(parser)
    parser.set_defaults(views_per_forward=None)  # as relabel/generate.py has it by default
    return parser.parse_args()


class Relabelling:
    """Stage 1 as relabel/generate.py runs it, pass by pass; its codec is fitted beforehand."""

    def __init__(self, bench: Bench):
        device = bench.machine.device
        if device.type == "cpu":
            runtime.keep_freed_memory()
        self.source, self.hard_labels = bench.resident(), bench.folder.labels
        teacher = Teacher("", bench.teacher(torch.channels_last), "")
        self.ensemble = Ensemble([teacher], None, bench.machine)
        settings = make_settings(
            dataset=bench.dataset,
            folder=bench.folder,
            sizes=bench.sizes,
            images_sha256="",
            ipc=None,
            passes=max(SLC // bench.args.ipc, 1),
            spec=bench.spec,
            seed=0,
            origin={"views_per_forward": views_per_forward(bench.args, device)},
            codec=codecs.from_arguments(bench.args),
        )
        path = Path(tempfile.mkdtemp(dir=bench.root)) / "labels"
        self.writer = LabelWriter(path, settings, bench.sizes)
        if self.writer.codec is None:
            views, logits = self.label(0)
            with self.writer.begun():
                mixture = views.mixture(self.hard_labels, bench.args.size)
                self.writer.fit([(logits, mixture)])

    def label(self, pass_index: int) -> tuple[Views, torch.Tensor]:
        """The views of a pass, and float32 [N, C] logits."""
        with cli.progress(disable=True) as bar:
            return label_pass(pass_index, self.writer, self.ensemble, self.source, bar)

    def run(self, passes: range) -> None:
        """Labels, packs and writes some passes."""
        writing = pass_writer(self.writer, self.ensemble.runtime.device)
        with self.writer.begun(), writing as write_pass:
            for pass_index in passes:
                views, logits = self.label(pass_index)
                write_pass(pass_index, logits, views, self.hard_labels)


class Training:
    """Hard-label epochs as validate/train.py runs them.

    Attributes:
        loss_of: the loss of logits and a batch.
    """

    def __init__(self, bench: Bench, compile_student: bool = False):
        if bench.machine.device.type == "cpu":
            runtime.keep_freed_memory()
        self.bench, self.source = bench, bench.resident()
        self.hard_labels = bench.folder.labels.to(bench.machine.device)
        model = bench.network(torch.channels_last)
        optimizer = torch.optim.AdamW(parameter_groups(model, 0.01), lr=1e-3, fused=True)
        model = compiled(model, bench.machine, 1) if compile_student else model
        self.step = Step(model, optimizer, bench.machine.scaler(), bench.machine)
        self.loss_of = lambda logits, batch: hard_loss(logits, batch.mixture, SMOOTHING)

    def run(self, epochs: range) -> None:
        """One view of every image in each epoch."""
        for epoch in epochs:
            drawn = draw(self.bench.spec, self.bench.sizes, 0, epoch + 1)
            views = list(drawn.to(self.bench.machine.device))
            self.step.begin_epoch()
            self.step.model.train()
            for batch_views, pixels in zip(views, self.source.render(views), strict=True):
                mixture = batch_views.mixture(self.hard_labels, self.source.size)
                self.step([Batch(pixels, *mixture)], self.loss_of)
            self.step.means()


class Evaluation:
    """Accuracy on so many grey images, as validate/train.py measures it."""

    def __init__(self, bench: Bench, count: int):
        size = bench.args.size
        self.accuracy = partial(
            accuracy,
            bench.network(torch.channels_last),
            pixels=torch.zeros(count, 3, size, size, dtype=torch.uint8),
            targets=torch.zeros(count, dtype=torch.int64),
            dataset=bench.dataset,
            machine=bench.machine,
        )

    def run(self, passes: range) -> None:
        """Evaluates the network once for each pass."""
        for _ in passes:
            self.accuracy()


def measure(bench: Bench, stage: str, images: int, pipelines: dict) -> list[dict]:
    """Timings of the pipelines by turns, each row with its stage."""
    args = bench.args
    rows = by_turns(pipelines, args.repeats, args.passes, images, bench.machine.device)
    return [{"stage": stage, **row} for row in rows]


def relabel(bench: Bench) -> tuple[list[dict], list[str]]:
    """Times passes over all images in both pipelines, and compares the labels of the same views."""
    views = draw(bench.spec, bench.sizes, 0)
    pipelines = {
        PLAIN: partial(straightforward.Relabelling, bench, views),
        OURS: partial(Relabelling, bench),
    }
    rows = measure(bench, "relabel", len(bench.folder.files), pipelines)
    ours = Relabelling(bench)
    views, logits = ours.label(0)
    codec, mixture = ours.writer.codec, views.mixture(ours.hard_labels, bench.args.size)
    decoded = codec.expand(codec.unpack(codec.pack(centre(logits), mixture)), mixture)
    expected = centre(straightforward.Relabelling(bench, views).label())
    difference = float((decoded - expected).norm() / expected.norm())
    return rows, [
        f"labels, relative difference to the straightforward pipeline's: {difference:.4f}",
        f"labels, distortion at T = 20: {distortion(expected, decoded):.2e}",
    ]


def train(bench: Bench) -> tuple[list[dict], list[str]]:
    """Times hard-label epochs in both pipelines, and evaluation; projects a whole run."""
    pipelines = {
        PLAIN: partial(straightforward.Training, bench, SMOOTHING),
        OURS: partial(Training, bench),
    }
    if bench.args.compile:
        pipelines[f"{OURS}, compiled"] = partial(Training, bench, compile_student=True)
    rows = measure(bench, "train", len(bench.folder.files), pipelines)
    count = 4096 if bench.machine.device.type == "cuda" else 64
    rows += measure(bench, "evaluate", count, {OURS: partial(Evaluation, bench, count)})
    training = max(statistics.median(rates(rows, "train", name)) for name in [*pipelines][1:])
    evaluating = statistics.median(rates(rows, "evaluate", OURS))
    minutes = (300 * 10_000 / training + 30 * 50_000 / evaluating) / 60
    what = "300 epochs of 10,000 images (ImageNet-1K, IPC 10) with 30 evaluations of 50,000"
    return rows, [f"{what}, projected: {minutes:.1f} min"]


STAGES = {"relabel": relabel, "train": train}


def rates(rows: list[dict], stage: str, pipeline: str) -> list[float]:
    """Images per second of all repeats of a pipeline."""
    chosen = [row for row in rows if (row["stage"], row["pipeline"]) == (stage, pipeline)]
    return [row["images_per_second"] for row in chosen]


def table(rows: list[dict]) -> list[str]:
    """A line per pipeline: rates, and ratios to the straightforward pipeline, with their spread."""
    title = f"{'stage':10}{'pipeline':18}{'images/s':>10}{'min':>9}{'max':>9}{'ratio':>8}{'min':>7}"
    lines = [f"{title}{'max':>7}{'peak MB':>9}{'GPU %':>7}"]
    for stage, name in dict.fromkeys((row["stage"], row["pipeline"]) for row in rows):
        own, plain = rates(rows, stage, name), rates(rows, stage, PLAIN)
        line = f"{stage:10}{name:18}{statistics.median(own):10.1f}{min(own):9.1f}{max(own):9.1f}"
        ratios = [rate / other for rate, other in zip(own, plain, strict=False)]
        if ratios and name != PLAIN:
            line += f"{statistics.median(ratios):8.2f}{min(ratios):7.2f}{max(ratios):7.2f}"
        else:
            line += " " * 22
        chosen = [row for row in rows if (row["stage"], row["pipeline"]) == (stage, name)]
        used = [row["gpu_percent"] for row in chosen if row["gpu_percent"] is not None]
        percent = f"{statistics.mean(used):.0f}" if used else "-"
        lines.append(f"{line}{max(row['peak_mb'] for row in chosen):9}{percent:>7}")
    return lines


def main() -> None:
    args = parse_arguments()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    rows, notes = [], []
    with tempfile.TemporaryDirectory() as root:
        bench = Bench.begin(args, Path(root))
        for stage in args.stages:
            print(f"{stage} ...", flush=True)
            timings, results = STAGES[stage](bench)
            rows, notes = rows + timings, notes + results
    about = [
        f"command: {shlex.join(['python', 'benchmarks/speed.py', *sys.argv[1:]])}",
        f"{datetime.date.today()}; {describe_machine(bench.machine.device)}; "
        f"torch {torch.__version__}; precision {bench.machine.precision}",
        f"images: {args.classes} classes x {args.ipc}, {args.size} x {args.size} JPEG; "
        f"{args.model}, batch size {args.batch_size}, {args.workers} workers, codec {args.codec}",
        "straightforward: fp32, JPEG decoded for every view, one batch per forward pass",
    ]
    report = "\n".join([*about, "", *table(rows), "", *notes])
    # Not with_suffix: a name may have a dot of its own.
    write_csv(rows, args.out.with_name(f"{args.out.name}.csv"), *about)
    atomic_write(args.out.with_name(f"{args.out.name}.txt"), f"{report}\n".encode())
    print(report)


if __name__ == "__main__":
    cli.run(main)

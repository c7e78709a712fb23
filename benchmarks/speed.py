"""Images per second of relabelling and training, against the straightforward pipeline.

python benchmarks/speed.py --out benchmarks/results/speed

Both pipelines (ours, and benchmarks/straightforward.py) work on the same JPEG files with the same
network and batch size, take turns, each in processes of its own, and are timed several times after
a first round that is not counted. The limit beside them is the network alone on resident random
batches. Writes OUT.csv (every timing), OUT.json and OUT.txt (the table that is also printed).
"""

import sys
from pathlib import Path

if not __package__:  # run as a plain script: imports start at the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import nn

import models
from benchmarks import straightforward
from benchmarks.measuring import Elsewhere, Meter, provenance
from relabel.generate import label_pass, pass_writer
from relabel.teacher import Ensemble, Teacher, use_batch_statistics
from utils import cli, runtime
from utils.cli import UserError, bounded
from utils.data import datasets, images
from utils.data.views import Views, ViewSpec, draw
from utils.files import atomic_write, to_json
from utils.labels import LabelSet, LabelWriter, centre, make_settings
from utils.labels.codecs.base import distortion
from utils.results import write_csv
from validate.evaluate import accuracy
from validate.kinds import Batch, hard_loss
from validate.step import Step, parameter_groups
from validate.step import compiled as compile_student

PLAIN, OURS = "straightforward", "ours"
PER_CORE = "ours, a process per core"
SMOOTHING = 0.8


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = cli.Parser(description="Speed of both stages against the straightforward pipeline.")
    parser.add_argument("--out", type=Path, required=True, help="files to write, without ending")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=[*STAGES])
    parser.add_argument("--model", default="ResNet18", help="teacher and student")
    parser.add_argument("--size", type=bounded(int, 8), default=224, metavar="S")
    parser.add_argument("--classes", type=bounded(int, 2), default=16, metavar="N")
    parser.add_argument("--ipc", type=bounded(int, 1), default=10, metavar="N")
    parser.add_argument("--batch-size", type=bounded(int, 2), default=16, metavar="N")
    parser.add_argument("--repeats", type=bounded(int, 1), default=5, metavar="N")
    passes = "over all images per timing"
    parser.add_argument("--passes", type=bounded(int, 1), default=1, metavar="N", help=passes)
    compiled = "also time training with the compiled student"
    parser.add_argument("--compile", action="store_true", help=compiled)
    runtime.add_arguments(parser)
    parser.set_defaults(workers=min(16, os.cpu_count() or 1))
    return parser.parse_args()


def write_jpegs(root: Path, classes: int, ipc: int, size: int) -> None:
    """Smooth random colours with some noise, as JPEGs of quality 90: classes x ipc files."""
    random = np.random.default_rng(0)
    for label in range(classes):
        folder = root / f"{label:05d}"
        folder.mkdir(parents=True)
        for position in range(ipc):
            coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            smooth = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), float)
            noisy = smooth + random.normal(0, 8, smooth.shape)
            array = noisy.clip(0, 255).astype(np.uint8)
            Image.fromarray(array).save(folder / f"{position:03d}.jpg", quality=90)


@dataclasses.dataclass(frozen=True)
class Bench:
    """What all measurements share.

    Attributes:
        args, machine, dataset: arguments, device and precision, and facts of the images.
        root: a folder for files that are thrown away.
    """

    args: argparse.Namespace
    machine: runtime.Runtime
    dataset: datasets.Dataset
    root: Path

    def folder(self, ipc: int) -> images.ImageFolder:
        """JPEG images, so many of every class."""
        root = self.root / f"ipc{ipc}"
        if not root.exists():
            write_jpegs(root, self.dataset.num_classes, ipc, self.dataset.input_size)
        return images.scan(root)

    def network(self, fast: bool) -> nn.Module:
        """The network with the weights of seed 0; channels last where it is ours."""
        torch.manual_seed(0)
        size = self.dataset.input_size
        try:
            model = models.build(self.args.model, self.dataset.num_classes, size)
        except ValueError as error:
            raise UserError(f"--model: {error}") from None
        layout = torch.channels_last if fast else torch.contiguous_format
        return model.to(self.machine.device, memory_format=layout)

    def teacher(self, fast: bool) -> nn.Module:
        """The network as a teacher under BSSL."""
        model = self.network(fast).requires_grad_(False).eval()
        use_batch_statistics(model)
        return model

    def resident(self, folder: images.ImageFolder) -> tuple[images.ResidentImages, np.ndarray]:
        """The decoded images, and their sizes."""
        sizes = np.full((len(folder.files), 2), self.dataset.input_size)
        return images.open_images(folder, sizes, self.dataset, self.machine.device, 0), sizes

    def settings(self, folder: images.ImageFolder, sizes: np.ndarray, passes: int) -> dict:
        """The settings of a label set of these images."""
        together, batch = 256 if self.machine.device.type == "cuda" else 1, self.args.batch_size
        return make_settings(
            dataset=self.dataset,
            folder=folder,
            sizes=sizes,
            images_sha256="",
            ipc=None,
            passes=passes,
            spec=self.spec(),
            seed=0,
            origin={"views_per_forward": max(together // batch, 1) * batch},
            codec={"name": "fp16"},
        )

    def spec(self) -> ViewSpec:
        """What views are drawn from."""
        return ViewSpec(self.dataset.input_size, self.args.batch_size)


class OurRelabelling:
    """Stage 1 as relabel/generate.py runs it, pass by pass."""

    keeps_memory = True

    def __init__(self, bench: Bench, folder: images.ImageFolder, passes: int):
        started = time.perf_counter()
        self.source, sizes = bench.resident(folder)
        self.decoding = time.perf_counter() - started
        model = bench.teacher(fast=True)
        self.ensemble = Ensemble([Teacher("", model, "")], None, bench.machine)
        settings = bench.settings(folder, sizes, passes)
        path = Path(tempfile.mkdtemp(dir=bench.root)) / "labels"
        self.writer, self.labels = LabelWriter(path, settings, sizes), folder.labels

    def run(self, passes: range) -> None:
        """Labels, packs and writes some passes."""
        writing = pass_writer(self.writer, self.ensemble.runtime.device)
        with self.writer.begun(), cli.progress(disable=True) as bar, writing as write_pass:
            for pass_index in passes:
                views, logits = label_pass(pass_index, self.writer, self.ensemble, self.source, bar)
                write_pass(pass_index, logits, views, self.labels)


class PlainRelabelling:
    """Stage 1 of the straightforward pipeline, always the same views."""

    keeps_memory = False

    def __init__(self, bench: Bench, folder: images.ImageFolder, views: Views):
        self.loader = straightforward.crops_loader(
            folder.root, views, bench.dataset, bench.args.workers, bench.machine.device
        )
        self.teacher, self.views = bench.teacher(fast=False), views
        self.path, self.device = bench.root / "epoch.tar", bench.machine.device

    def run(self, passes: range) -> np.ndarray:
        """Labels and saves the views, once for each pass; returns float32 [N, C] logits."""
        for _ in passes:
            logits = straightforward.relabel(
                self.teacher, self.loader, self.views, self.path, self.device
            )
        return logits.numpy()


class PlainTraining:
    """Hard-label epochs of the straightforward pipeline."""

    keeps_memory = False

    def __init__(self, bench: Bench, folder: images.ImageFolder):
        self.model, self.device = bench.network(fast=False), bench.machine.device
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.loader = straightforward.training_loader(
            folder.root, bench.dataset, bench.args.batch_size, bench.args.workers, self.device
        )

    def run(self, epochs: range) -> None:
        """One view of every image in each epoch."""
        for _ in epochs:
            straightforward.train_epoch(
                self.model, self.optimizer, self.loader, SMOOTHING, self.device
            )


def relabel(bench: Bench, meter: Meter) -> None:
    """Times passes over all images, by turns in both pipelines; compares the labels."""
    args, device, size = bench.args, bench.machine.device, bench.dataset.input_size
    folder = bench.folder(args.ipc)
    count, passes = len(folder.files), args.passes * (args.repeats + 1)
    cores = runtime.usable_cores() if device.type == "cpu" else 1
    views = draw(bench.spec(), np.full((count, 2), size), 0)
    pipelines = {
        PLAIN: Elsewhere(device, PlainRelabelling, bench, folder, views),
        OURS: Elsewhere(device, OurRelabelling, bench, folder, passes),
    }
    if cores > 1:
        pipelines[PER_CORE] = Elsewhere(
            device, OurRelabelling, bench, folder, cores * passes, processes=cores
        )
    meter.by_turns("relabel", pipelines, args.repeats, args.passes, count)
    ours = OurRelabelling(bench, folder, 1)
    ours.run(range(1))
    with ours.writer.begun():
        ours.writer.finish()
    stored = LabelSet.open(ours.writer.path)
    labels = torch.cat([stored[batch].logits for batch in range(stored.batches_per_pass)])
    plain = PlainRelabelling(bench, folder, views)
    expected = centre(torch.from_numpy(plain.run(range(1))))
    difference = (labels - expected).norm() / expected.norm()
    name = "labels: relative difference to the straightforward pipeline's (same views)"
    meter.notes[name] = f"{difference:.4f}"
    meter.notes["labels: distortion at T = 20"] = f"{distortion(expected, labels):.2e}"
    meter.notes["relabel: decoding once, ms per image"] = f"{1000 * ours.decoding / count:.2f}"
    together = stored.manifest["views_per_forward"]
    pixels = torch.randn(together, 3, size, size, device=device)
    forward = partial(ours.ensemble.logits, pixels, args.batch_size)
    meter.alone("relabel", "forward alone", args.repeats, together, forward)


class OurTraining:
    """Hard-label epochs as validate/train.py runs them.

    Attributes:
        step: makes the optimiser steps.
        after_step: called after each of them.
    """

    keeps_memory = True

    def __init__(self, bench: Bench, folder: images.ImageFolder, compiled: bool = False):
        self.bench, self.labels = bench, folder.labels.to(bench.machine.device)
        self.source, self.sizes = bench.resident(folder)
        model = bench.network(fast=True)
        optimizer = torch.optim.AdamW(parameter_groups(model, 0.01), lr=1e-3, fused=True)
        model = compile_student(model, bench.machine, 1) if compiled else model
        self.step = Step(model, optimizer, bench.machine.scaler(), bench.machine)
        self.after_step = lambda: None

    def run(self, epochs: range) -> None:
        """One view of every image in each epoch."""
        for epoch in epochs:
            views = list(draw(self.bench.spec(), self.sizes, 0, epoch + 1).to(self.labels.device))
            self.step.begin_epoch()
            self.step.model.train()
            for batch_views, pixels in zip(views, self.source.render(views), strict=True):
                mixture = batch_views.mixture(self.labels, self.source.size)
                self.step([Batch(pixels, *mixture)], _hard_loss)
                self.after_step()
            self.step.means()


def _hard_loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    return hard_loss(logits, batch.mixture, SMOOTHING)


def train(bench: Bench, meter: Meter) -> None:
    """Times hard-label epochs over all images, by turns in both pipelines."""
    args, device, size = bench.args, bench.machine.device, bench.dataset.input_size
    folder = bench.folder(args.ipc)
    pipelines = {
        PLAIN: Elsewhere(device, PlainTraining, bench, folder),
        OURS: Elsewhere(device, OurTraining, bench, folder),
    }
    if args.compile:
        pipelines[f"{OURS}, compiled"] = Elsewhere(device, OurTraining, bench, folder, True)
    meter.by_turns("train", pipelines, args.repeats, args.passes, len(folder.files))
    training = OurTraining(bench, folder)
    labels = training.labels[: args.batch_size]
    batch = Batch(
        pixels=torch.randn(len(labels), 3, size, size, device=device),
        own=labels,
        partner=labels,
        lam=torch.ones(len(labels), device=device),
    )

    def step() -> None:
        training.step([batch], _hard_loss)

    meter.alone("train", "optimiser step alone", args.repeats, len(labels), step)
    count = 1024 if device.type == "cuda" else 16
    grey = torch.zeros(count, 3, size, size, dtype=torch.uint8)
    classes = torch.zeros(count, dtype=torch.int64)

    def evaluate() -> None:
        accuracy(
            training.step.model,
            pixels=grey,
            targets=classes,
            dataset=bench.dataset,
            machine=bench.machine,
        )

    meter.alone("evaluate", OURS, args.repeats, count, evaluate)
    rate = max(statistics.median(meter.rates("train", name)) for name in [*pipelines][1:])
    seconds = 300 * 10_000 / rate
    seconds += 30 * 50_000 / statistics.median(meter.rates("evaluate", OURS))
    name = "train: 300 epochs of 10,000 images with 30 evaluations of 50,000, projected"
    meter.notes[name] = f"{seconds / 60:.1f} min"


STAGES = {"relabel": relabel, "train": train}


def table(meter: Meter, header: dict) -> str:
    """Rates with their spread, ratios to the straightforward pipeline, and the notes, as text."""
    lines = [f"{name}: {value}" for name, value in header.items()]
    title = f"{'stage':9}{'pipeline':28}{'images/s':>10}{'min':>9}{'max':>9}{'ratio':>8}{'min':>7}"
    lines += ["", f"{title}{'max':>7}{'peak MB':>9}{'GPU %':>7}"]
    for stage, name in dict.fromkeys((row["stage"], row["pipeline"]) for row in meter.rows):
        rates = meter.rates(stage, name)
        plain = meter.rates(stage, PLAIN) if name.startswith(OURS) else []
        ratios = [rate / other for rate, other in zip(rates, plain, strict=False)]
        line = f"{stage:9}{name:28}{statistics.median(rates):10.1f}{min(rates):9.1f}"
        line += f"{max(rates):9.1f}"
        if ratios:
            line += f"{statistics.median(ratios):8.2f}{min(ratios):7.2f}{max(ratios):7.2f}"
        else:
            line += " " * 22
        rows = [row for row in meter.rows if (row["stage"], row["pipeline"]) == (stage, name)]
        peaks = [row["peak_mb"] for row in rows if row["peak_mb"] is not None]
        used = [row["gpu_percent"] for row in rows if row["gpu_percent"] is not None]
        percent = f"{statistics.mean(used):.0f}" if used else "-"
        lines.append(f"{line}{max(peaks, default='-'):>9}{percent:>7}")
    lines += ["", *[f"{name}: {value}" for name, value in meter.notes.items()]]
    return "\n".join(lines)


def main() -> None:
    args = parse_arguments()
    machine = runtime.from_arguments(args)
    facts = datasets.named("imagenet1k")
    dataset = datasets.Dataset("benchmark", args.classes, args.size, facts.mean, facts.std)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    header = {
        **provenance(machine.device),
        "precision": {"off": "fp32"}.get(machine.precision, machine.precision),
        "images": f"{args.classes} classes x {args.ipc}, {args.size} x {args.size} JPEG; "
        f"{args.model}, batch size {args.batch_size}, {args.workers} workers",
        "straightforward": "fp32, JPEG decoded for every view, one batch per forward pass",
    }
    meter = Meter(machine.device)
    with tempfile.TemporaryDirectory() as root:
        if machine.device.type == "cpu":
            ratio = f"{runtime.bf16_speedup():.2f}"
            meter.notes["convolutions in bf16, times as fast as in fp32"] = ratio
        for stage in args.stages:
            print(f"{stage} ...", flush=True)
            STAGES[stage](Bench(args, machine, dataset, Path(root)), meter)
    common = {name: header[name] for name in ("date", "machine", "torch", "precision", "command")}
    report = table(meter, header)
    results = {**header, "timings": meter.rows, "results": meter.notes}
    # Not with_suffix: a name may have a dot of its own.
    write_csv([row | common for row in meter.rows], args.out.with_name(f"{args.out.name}.csv"))
    atomic_write(args.out.with_name(f"{args.out.name}.json"), to_json(results))
    atomic_write(args.out.with_name(f"{args.out.name}.txt"), f"{report}\n".encode())
    print(report)


if __name__ == "__main__":
    cli.run(main)

"""Images per second of relabelling and training, against the straightforward pipeline.

python benchmarks/speed.py --out benchmarks/results/speed

Both pipelines (ours, and benchmarks/straightforward.py) work on the same JPEG files with the same
network and batch size, take turns, each in processes of its own, and are timed several times after
a first round that is not counted. The limit beside them is the network alone on resident random
batches. Writes OUT.csv (every timing),
OUT.json and OUT.txt (the table that is also printed).
"""

import sys
from pathlib import Path

if not __package__:  # run as a plain script: imports start at the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import atexit
import contextlib
import csv
import dataclasses
import io
import multiprocessing
import os
import platform
import re
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import date

import numpy as np
import torch
from PIL import Image
from torch import nn

import models
from benchmarks import straightforward
from relabel.background import pass_writer
from relabel.generate import label_views
from relabel.teacher import Ensemble, Teacher, use_batch_statistics
from utils import cli, runtime
from utils.cli import UserError, bounded
from utils.data import datasets, images
from utils.data.views import RATIO, Views, ViewSpec, draw
from utils.files import atomic_write, to_json
from utils.labels import LabelSet, LabelWriter, centre
from utils.labels.codecs.base import distortion
from validate import engine

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
    parser.add_argument(
        "--passes", type=bounded(int, 1), default=1, metavar="N", help="over all images per timing"
    )
    parser.add_argument(
        "--compile", action="store_true", help="also time training with the compiled student"
    )
    runtime.add_arguments(parser)
    parser.set_defaults(workers=min(16, os.cpu_count() or 1))
    return parser.parse_args()


def write_jpegs(root: Path, classes: int, ipc: int, size: int) -> None:
    """Smooth random colours with some noise, as JPEGs of quality 90: classes x ipc files."""
    numbers = np.random.default_rng(0)
    for label in range(classes):
        folder = root / f"{label:05d}"
        folder.mkdir(parents=True)
        for number in range(ipc):
            coarse = Image.fromarray(numbers.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            smooth = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), float)
            noisy = smooth + numbers.normal(0, 8, smooth.shape)
            array = noisy.clip(0, 255).astype(np.uint8)
            Image.fromarray(array).save(folder / f"{number:03d}.jpg", quality=90)


class Meter:
    """Times sections, and what they take: memory, and the GPU's utilisation where there is one."""

    def __init__(self, device: torch.device):
        self.device, self.rows, self._utilisation = device, [], Utilisation(device)

    @contextlib.contextmanager
    def section(
        self, stage: str, name: str, repeat: int, count: int, pipeline: "Elsewhere | None" = None
    ) -> Iterator[None]:
        """Times a block that handles `count` images; repeat 0 warms up and is not counted.

        The block runs `pipeline`; without one it works in this process, whose memory on a CPU tells
        nothing: it goes on holding what other blocks took.
        """
        reset_peak(self.device)
        self._wait()
        started = time.perf_counter()
        yield
        self._wait()
        seconds = time.perf_counter() - started
        row = {"stage": stage, "pipeline": name, "repeat": repeat, "images": count}
        row |= {"seconds": round(seconds, 4), "images_per_second": round(count / seconds, 2)}
        peak = pipeline.peak if pipeline else peak_memory(self.device)
        row |= {
            "peak_mb": round(peak / 1e6) if pipeline or self.device.type == "cuda" else None,
            "gpu_percent": self._utilisation.since(started),
        }
        if repeat > 0:
            self.rows.append(row)

    def rates(self, stage: str, name: str) -> list[float]:
        """Images per second of all counted repeats."""
        return [
            row["images_per_second"]
            for row in self.rows
            if (row["stage"], row["pipeline"]) == (stage, name)
        ]

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def reset_peak(device: torch.device) -> None:
    """Lets `peak_memory` start from what is held now, freed memory that is kept included."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Bytes: of GPU memory, or of this process without its workers."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024


class Utilisation:
    """The GPU's utilisation as nvidia-smi samples it, where there is one."""

    def __init__(self, device: torch.device):
        self._samples: list[tuple[float, float]] = []
        if device.type == "cuda" and shutil.which("nvidia-smi"):
            query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
            query += ["-lms", "50", "-i", f"GPU-{torch.cuda.get_device_properties(device).uuid}"]
            sampler = subprocess.Popen(query, stdout=subprocess.PIPE, text=True)
            atexit.register(sampler.kill)
            threading.Thread(target=self._read, args=(sampler.stdout,), daemon=True).start()

    def _read(self, lines: Iterable[str]) -> None:
        for line in lines:
            if line.strip().isdigit():
                self._samples.append((time.perf_counter(), float(line)))

    def since(self, started: float) -> float | None:
        """The mean of the samples since a time, in percent; None without any."""
        values = [value for moment, value in self._samples if moment > started]
        return round(statistics.mean(values), 1) if values else None


@dataclasses.dataclass
class Bench:
    """What all measurements share.

    Attributes:
        args, machine, dataset: arguments, device and precision, and facts of the images.
        root: a folder for files that are thrown away.
        meter: keeps the timings.
        notes: further results by name, for the table and the JSON file.
    """

    args: argparse.Namespace
    machine: runtime.Runtime
    dataset: datasets.Dataset
    root: Path
    meter: Meter
    notes: dict

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
        return (
            images.open_images(folder, sizes, self.dataset, self.machine.device, 0),
            sizes,
        )

    def settings(self, folder: images.ImageFolder, passes: int) -> dict:
        """The manifest of a label set of these images."""
        size = self.dataset.input_size
        together = 256 if self.machine.device.type == "cuda" else 1
        batch = self.args.batch_size
        return {
            "dataset": "benchmark",
            "num_classes": len(folder.classes),
            "classes": folder.classes,
            "ipc": None,
            "slc": None,
            "passes": passes,
            "batch_size": batch,
            "image_size": [size, size],
            "input_size": size,
            "mean": list(self.dataset.mean),
            "std": list(self.dataset.std),
            "seed": 0,
            "crop_scale": [0.08, 1.0],
            "crop_ratio": list(RATIO),
            "mix": "cutmix",
            "views_per_forward": max(together // batch, 1) * batch,
            "codec": {"name": "fp16"},
            "images": {"count": len(folder.files), "per_class": folder.counts()},
            "versions": runtime.versions(),
        }

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
        settings = bench.settings(folder, passes)
        path = Path(tempfile.mkdtemp(dir=bench.root)) / "labels"
        self.writer, self.labels = LabelWriter(path, settings, sizes), folder.labels

    def run(self, numbers: range) -> None:
        """Labels, packs and writes some passes."""
        together = self.writer.settings["views_per_forward"]
        writing = pass_writer(self.writer, self.ensemble.runtime.device)
        with self.writer.begun(), cli.progress(disable=True) as bar, writing as writes:
            for number in numbers:
                views = self.writer.draw(number)
                logits = label_views(number, views, together, self.ensemble, self.source, bar)
                writes.write_pass(number, logits, views, self.labels)


class PlainRelabelling:
    """Stage 1 of the straightforward pipeline, always the same views."""

    keeps_memory = False

    def __init__(self, bench: Bench, folder: images.ImageFolder, views: Views):
        facts = (bench.dataset.input_size, bench.dataset.mean, bench.dataset.std)
        self.loader = straightforward.crops_loader(
            folder.root, views, *facts, bench.args.workers, bench.machine.device
        )
        self.teacher, self.views = bench.teacher(fast=False), views
        self.path, self.device = bench.root / "epoch.tar", bench.machine.device

    def run(self, numbers: range) -> np.ndarray:
        """Labels and saves the views, once for each number; returns float32 [N, C] logits."""
        for _ in numbers:
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
        facts = (bench.dataset.input_size, bench.dataset.mean, bench.dataset.std)
        self.loader = straightforward.training_loader(
            folder.root, *facts, bench.args.batch_size, bench.args.workers, self.device
        )

    def run(self, numbers: range) -> None:
        """One view of every image, once for each number."""
        for _ in numbers:
            straightforward.train_epoch(
                self.model, self.optimizer, self.loader, SMOOTHING, self.device
            )


class Elsewhere:
    """A pipeline in processes of its own: memory and settings of one are not another's.

    A context, in which the processes live. They share this process's threads, and what they are
    told to run.

    Attributes:
        peak: bytes, the sum of what each process has held at most.
    """

    def __init__(self, bench: Bench, make: Callable, *arguments: object, processes: int = 1):
        """In each of so many processes there will be a pipeline `make(bench, *arguments)`."""
        self.peak = 0
        threads = max(torch.get_num_threads() // processes, 1)
        facts = (bench.args, bench.machine, bench.dataset, bench.root)
        self._beginning = (threads, facts, make, arguments)
        spawned = multiprocessing.get_context("spawn")
        self._pools = [ProcessPoolExecutor(1, spawned) for _ in range(processes)]

    def run(self, numbers: range) -> object:
        """Runs the pipeline; returns what the first process's part returned."""
        count = len(self._pools)
        results = self._each(_run, [(numbers[rank::count],) for rank in range(count)])
        self.peak = sum(peak for _, peak in results)
        return results[0][0]

    def _each(self, work: Callable, arguments: list[tuple]) -> list:
        """What a function returns in each of the processes."""
        waiting = [
            pool.submit(work, *own) for pool, own in zip(self._pools, arguments, strict=True)
        ]
        try:
            return [future.result() for future in waiting]
        except BrokenProcessPool:
            raise UserError(
                "a process of the benchmark was ended from outside, perhaps for lack of memory; "
                "try a smaller --ipc"
            ) from None

    def __enter__(self) -> "Elsewhere":
        try:
            self._each(_begin, [self._beginning] * len(self._pools))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        for pool in self._pools:
            pool.shutdown()


def _begin(threads: int, facts: tuple, make: Callable, arguments: tuple) -> None:
    """In a process of Elsewhere: makes its pipeline."""
    global _pipeline, _device
    torch.set_num_threads(threads)
    _device = facts[1].device
    if make.keeps_memory and _device.type == "cpu":
        runtime.keep_freed_memory()
    # A meter of a GPU would sample its utilisation a second time.
    _pipeline = make(Bench(*facts, Meter(torch.device("cpu")), {}), *arguments)


def _run(numbers: range) -> tuple[object, int]:
    """In a process of Elsewhere: what its pipeline returns, and the most bytes it held."""
    reset_peak(_device)
    return _pipeline.run(numbers), peak_memory(_device)


def relabel(bench: Bench) -> None:
    """Times passes over all images, by turns in both pipelines; compares the labels."""
    args, device = bench.args, bench.machine.device
    folder, passes = bench.folder(args.ipc), args.passes
    count, meter = len(folder.files), bench.meter
    rounds, sizes = args.repeats + 1, np.full((count, 2), bench.dataset.input_size)
    cores = runtime.usable_cores() if device.type == "cpu" else 1
    views = draw(bench.spec(), sizes, 0)
    with contextlib.ExitStack() as processes:

        def start(*work: object, **options: object) -> Elsewhere:
            return processes.enter_context(Elsewhere(bench, *work, **options))

        pipelines = {PLAIN: (start(PlainRelabelling, folder, views), passes)}
        pipelines[OURS] = start(OurRelabelling, folder, passes * rounds), passes
        if cores > 1:
            several = cores * passes
            shared = start(OurRelabelling, folder, several * rounds, processes=cores)
            pipelines[PER_CORE] = shared, several
        for repeat in range(rounds):
            for name, (pipeline, several) in pipelines.items():
                with meter.section("relabel", name, repeat, several * count, pipeline):
                    result = pipeline.run(range(repeat * several, (repeat + 1) * several))
                if name == PLAIN:
                    expected = centre(torch.from_numpy(result))
    ours = OurRelabelling(bench, folder, 1)
    ours.run(range(1))
    with ours.writer.begun():
        ours.writer.finish()
    stored = LabelSet.open(ours.writer.path)
    found = torch.cat([stored[batch].logits for batch in range(stored.batches_per_pass)])
    bench.notes["labels: relative difference to the straightforward pipeline's (same views)"] = (
        f"{(found - expected).norm() / expected.norm():.4f}"
    )
    bench.notes["labels: distortion at T = 20"] = f"{distortion(expected, found):.2e}"
    bench.notes["relabel: decoding once, ms per image"] = f"{1000 * ours.decoding / count:.2f}"
    together = stored.manifest["views_per_forward"]
    pixels = torch.randn(together, 3, *[bench.dataset.input_size] * 2, device=device)
    for repeat in range(args.repeats + 1):
        with meter.section("relabel", "forward alone", repeat, 4 * together):
            for _ in range(4):
                ours.ensemble.logits(pixels, args.batch_size)


class OurTraining:
    """Hard-label epochs as validate/train.py runs them."""

    keeps_memory = True

    def __init__(self, bench: Bench, folder: images.ImageFolder, compiled: bool = False):
        self.bench, self.labels = bench, folder.labels.to(bench.machine.device)
        self.source, self.sizes = bench.resident(folder)
        model = bench.network(fast=True)
        groups = engine.parameter_groups(model, 0.01)
        self.trainer = engine.Trainer(
            engine.compiled(model, bench.machine, 1) if compiled else model,
            torch.optim.AdamW(groups, lr=1e-3, fused=True),
            bench.machine.scaler(),
            bench.machine,
            1,
            lambda views: None,
        )

    def run(self, numbers: range) -> None:
        """One view of every image, once for each number."""
        for number in numbers:
            self.epoch(number)

    def epoch(self, number: int) -> engine.EpochResult:
        """One view of every image."""
        views = draw(self.bench.spec(), self.sizes, 0, number + 1)
        batches = list(views.to(self.bench.machine.device))
        return engine.train_hard_epoch(self.trainer, self.source, batches, self.labels, SMOOTHING)


def train(bench: Bench) -> None:
    """Times one hard-label epoch over all images, by turns in both pipelines."""
    args, device, meter = bench.args, bench.machine.device, bench.meter
    folder = bench.folder(args.ipc)
    count, size = len(folder.files), bench.dataset.input_size
    with contextlib.ExitStack() as processes:
        pipelines = {PLAIN: Elsewhere(bench, PlainTraining, folder)}
        processes.enter_context(pipelines[PLAIN])
        for compiled in (False, True)[: 1 + args.compile]:
            ours = Elsewhere(bench, OurTraining, folder, compiled)
            pipelines[OURS + ", compiled" * compiled] = processes.enter_context(ours)
        for repeat in range(args.repeats + 1):
            numbers = range(repeat * args.passes, (repeat + 1) * args.passes)
            for name, pipeline in pipelines.items():
                with meter.section("train", name, repeat, args.passes * count, pipeline):
                    pipeline.run(numbers)
    training = OurTraining(bench, folder)
    trainer, source = training.trainer, training.source
    pixels = torch.randn(args.batch_size, 3, size, size, device=device)
    targets = torch.zeros(args.batch_size, dtype=torch.int64, device=device)

    def step() -> None:
        with bench.machine.autocast():
            logits = trainer.model(pixels)
        loss = nn.functional.cross_entropy(logits.float(), targets)
        trainer.scaler.scale(loss).backward()
        trainer.scaler.step(trainer.optimizer)
        trainer.scaler.update()
        trainer.optimizer.zero_grad(set_to_none=True)

    for repeat in range(args.repeats + 1):
        with meter.section("train", "forward and backward alone", repeat, 4 * args.batch_size):
            for _ in range(4):
                step()
    evaluation = 4096 if device.type == "cuda" else 64
    pixels = torch.zeros(evaluation, 3, size, size, dtype=torch.uint8)
    for repeat in range(args.repeats + 1):
        with meter.section("evaluate", OURS, repeat, evaluation):
            targets = torch.zeros(evaluation, dtype=torch.int64)
            engine.evaluate(trainer.model, pixels, targets, source.mean, source.std, bench.machine)
    project(bench, [name for name in pipelines if name != PLAIN])


def project(bench: Bench, variants: list[str]) -> None:
    """Notes how long ImageNet-1K at IPC 10 takes: 300 epochs and 30 evaluations of 50,000."""
    rate = max(statistics.median(bench.meter.rates("train", name)) for name in variants)
    seconds = 300 * 10_000 / rate
    seconds += 30 * 50_000 / statistics.median(bench.meter.rates("evaluate", OURS))
    bench.notes["train: 300 epochs of 10,000 images with 30 evaluations of 50,000, projected"] = (
        f"{seconds / 60:.1f} min"
    )


STAGES = {"relabel": relabel, "train": train}


def describe_machine(device: torch.device) -> str:
    """The processor, or the GPU, and the number of CPU cores."""
    cores = f"{len(os.sched_getaffinity(0))} CPU cores"
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    processor = found[1].strip() if found else platform.machine()
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {cores} ({processor})"
    return f"{processor}, {cores}, {torch.get_num_threads()} threads"


def table(bench: Bench, header: dict) -> str:
    """Rates with their spread, ratios to the straightforward pipeline, and the notes, as text."""
    meter, lines = bench.meter, [f"{name}: {value}" for name, value in header.items()]
    lines += ["", f"{'stage':9}{'pipeline':28}{'images/s':>10}{'min':>9}{'max':>9}"]
    lines[-1] += f"{'ratio':>8}{'min':>7}{'max':>7}{'peak MB':>9}{'GPU %':>7}"
    for stage, name in dict.fromkeys((row["stage"], row["pipeline"]) for row in meter.rows):
        rates = meter.rates(stage, name)
        line = f"{stage:9}{name:28}{statistics.median(rates):10.1f}"
        line += f"{min(rates):9.1f}{max(rates):9.1f}"
        plain = meter.rates(stage, PLAIN) if name.startswith(OURS) else []
        ratios = [rate / other for rate, other in zip(rates, plain, strict=False)]
        for value in (statistics.median, min, max) if ratios else ():
            line += f"{value(ratios):{8 if value is statistics.median else 7}.2f}"
        line += " " * (22 if not ratios else 0)
        rows = [row for row in meter.rows if (row["stage"], row["pipeline"]) == (stage, name)]
        peaks = [row["peak_mb"] for row in rows if row["peak_mb"] is not None]
        line += f"{max(peaks, default='-'):>9}"
        used = [row["gpu_percent"] for row in rows if row["gpu_percent"] is not None]
        lines.append(line + (f"{statistics.mean(used):7.0f}" if used else f"{'-':>7}"))
    return "\n".join([*lines, "", *(f"{name}: {value}" for name, value in bench.notes.items())])


def main() -> None:
    args = parse_arguments()
    machine = runtime.from_arguments(args)
    facts = datasets.named("imagenet1k")
    dataset = datasets.Dataset("benchmark", args.classes, args.size, facts.mean, facts.std)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    header = {
        "command": " ".join(["python benchmarks/speed.py", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "machine": describe_machine(machine.device),
        "torch": str(torch.__version__),
        "precision": {"off": "fp32"}.get(machine.precision, machine.precision),
        "images": f"{args.classes} classes x {args.ipc}, {args.size} x {args.size} JPEG; "
        f"{args.model}, batch size {args.batch_size}, {args.workers} workers",
        "straightforward": "fp32, JPEG decoded for every view, one batch per forward pass",
    }
    with tempfile.TemporaryDirectory() as root:
        bench = Bench(args, machine, dataset, Path(root), Meter(machine.device), {})
        if machine.device.type == "cpu":
            ratio = f"{runtime.bf16_speedup():.2f}"
            bench.notes["convolutions in bf16, times as fast as in fp32"] = ratio
        for stage in args.stages:
            print(f"{stage} ...", flush=True)
            STAGES[stage](bench)
    text = io.StringIO()
    common = {name: header[name] for name in ("date", "machine", "torch", "precision", "command")}
    columns = ["stage", "pipeline", "repeat", "images", "seconds", "images_per_second", "peak_mb"]
    writer = csv.DictWriter(text, [*columns, "gpu_percent", *common], lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, **common} for row in bench.meter.rows)
    report = table(bench, header)
    results = {**header, "timings": bench.meter.rows, "results": bench.notes}
    contents = {"csv": text.getvalue().encode(), "json": to_json(results)}
    for ending, content in (contents | {"txt": f"{report}\n".encode()}).items():
        atomic_write(args.out.with_name(f"{args.out.name}.{ending}"), content)
    print(report)


if __name__ == "__main__":
    cli.run(main)

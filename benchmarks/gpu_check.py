"""Whether the fast paths agree with the plain ones on this device; the checks of gpu_check.sh.

python benchmarks/gpu_check.py --out runs/gpu_check --checks pipeline labels views training

Prints every difference with its limit and writes OUT/CHECK.csv when a check is done; exits with 1
when a difference is above its limit.
"""

import sys
from pathlib import Path

if not __package__:  # run as a plain script: imports start at the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import copy
import importlib.util
import itertools
import json
import re
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.bench import Bench, add_arguments
from benchmarks.speed import Training
from relabel.teacher import Ensemble, Teacher
from utils import cli, runtime
from utils.data.images import ResidentImages
from utils.data.views import draw
from utils.labels import centre
from utils.labels.codecs.base import distortion
from utils.results import provenance, write_csv
from utils.runtime import Runtime

ROOT = Path(__file__).resolve().parents[1]
STEPS = 50
PRECISIONS = {  # below fp32, by kind of device
    "cpu": {"bf16": torch.bfloat16},
    "cuda": {"bf16": torch.bfloat16, "fp16": torch.float16},
}
LAUNCHES = {  # calls of CUDA, as the profiler names them
    *("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx"),
    *("cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync"),
}


class Check(NamedTuple):
    """A comparison: what is compared, the difference, and the largest one that passes."""

    name: str
    value: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the difference is within the limit (NaN is not)."""
        return self.value <= self.limit


def largest(difference: torch.Tensor) -> float:
    """The largest of absolute values."""
    return float(difference.abs().max())


def label_checks(bench: Bench) -> Iterator[Check]:
    """Labels of grouped batches, in all precisions, and made twice."""
    device, size = bench.machine.device, bench.args.batch_size
    (pixels,) = bench.resident().render([draw(bench.spec, bench.sizes, seed=0).to(device)])
    teacher = Teacher("", bench.teacher(torch.channels_last), "")

    def ensemble(dtype: torch.dtype | None, graph: bool = False) -> Ensemble:
        return Ensemble([teacher], None, Runtime(device, dtype), graph)

    def labels(teachers: Ensemble, together: int = 16 * size) -> torch.Tensor:
        parts = [teachers.logits(part, size) for part in pixels.split(together)]
        return centre(torch.cat(parts).cpu())

    exact, graphed = ensemble(None), ensemble(None, graph=True)
    alone, grouped = labels(exact, size), labels(exact)
    what = "labels: 16 batches in one forward pass, fp32, largest difference"
    yield Check(what, largest(grouped - alone), 1e-4)
    yield Check("labels: the same forward passes again", largest(labels(exact) - grouped), 0)
    for _ in range(4):  # warmed up, captured, replayed
        replayed = labels(graphed)
    what = "labels: by a CUDA graph against kernel by kernel, fp32"
    yield Check(what, largest(replayed - grouped), 1e-4)
    for name, dtype in PRECISIONS[device.type].items():
        short = labels(ensemble(dtype))
        relative = float((short - alone).norm() / alone.norm())
        yield Check(f"labels: {name} against fp32, relative", relative, 0.05)
        yield Check(f"labels: {name}, distortion at T = 20", distortion(alone, short), 5e-3)


def view_checks(bench: Bench) -> Iterator[Check]:
    """Views rendered on the device, in groups, against single batches on the CPU."""
    source, views = bench.resident(), draw(bench.spec, bench.sizes, seed=0)
    on_device, again = source.render([views.to(bench.machine.device)] * 2)
    on_cpu = ResidentImages(source.pixels.cpu(), bench.dataset, torch.device("cpu"))
    expected = torch.cat(list(on_cpu.render(list(views))))
    levels = 255 * max(bench.dataset.std) * largest(on_device.cpu() - expected)
    yield Check("views: against the CPU's, largest difference in grey levels", levels, 0.02)
    yield Check("views: rendered again", largest(again - on_device), 0)


def loss_curve(bench: Bench, dtype: torch.dtype | None, **settings: bool) -> torch.Tensor:
    """float32 [STEPS]: the loss of each of the first steps of training."""
    bench = copy.copy(bench)
    bench.machine = Runtime(bench.machine.device, dtype)
    pipeline, losses = Training(bench, **settings), []
    step = pipeline.training.step
    steps = itertools.chain.from_iterable(map(pipeline.steps, itertools.count()))
    for _ in itertools.islice(steps, STEPS):
        losses.append(step.loss_sum / step.views)
        step.begin_epoch()
    return torch.stack(losses).cpu()


def training_checks(bench: Bench, compile_student: bool = False) -> Iterator[Check]:
    """The losses of the first steps in graphs and all precisions, against eager fp32."""
    exact = loss_curve(bench, None, graph=False)
    how = "compiled, in graphs" if compile_student else "in graphs"
    for name, dtype in {"fp32": None, **PRECISIONS[bench.machine.device.type]}.items():
        curve = loss_curve(bench, dtype, compile=compile_student)
        difference = float(((curve - exact).abs() / exact).mean())
        what = f"training: {name} {how}, mean difference of the loss over {STEPS} steps, relative"
        yield Check(what, difference, 0.05 if dtype else 0.01)


def launch_checks(bench: Bench) -> Iterator[Check]:
    """Launches and copies of a training step as the profiler counts them; needs a GPU."""
    if bench.machine.device.type == "cpu":
        print("launches: needs a GPU")
        return
    for name, graph, limit in (("kernel by kernel", False, 400), ("one graph a step", True, 40)):
        pipeline = Training(bench, graph=graph)
        pipeline.run(range(2))  # warm up and capture
        with torch.profiler.profile() as profile:
            pipeline.run(range(2, 3))
        steps = -(-len(bench.folder.files) // bench.args.batch_size)
        seen = {event.key: event.count / steps for event in profile.key_averages()}
        counted = sum(seen.get(name, 0) for name in LAUNCHES)
        yield Check(f"launches: {name}, launches and copies per step", counted, limit)
        # Where the profiler sees nothing, the count above says nothing.
        expected, graphs = (1, seen.get("cudaGraphLaunch", 0)) if graph else (100, counted)
        yield Check(f"launches: {name}, less than {expected} by", expected - graphs, 0)


def pipeline_checks(bench: Bench) -> Iterator[Check]:
    """Both stages as a user runs them: relabel, train, a signal, continue, evaluate."""
    root, images, model = bench.root, bench.folder.root, bench.args.model
    weights, labels, run, output = (root / name for name in ("t.pt", "labels", "run", "output"))
    torch.save(bench.network(torch.contiguous_format).state_dict(), weights)
    device, log = ["--device", bench.machine.device], run / "log.jsonl"
    both = ["--dataset", "custom", "--data-dir", images, "--label-dir", labels, *device]

    def ended(what: str, script: str, words: list[object], stopped: bool = False) -> Check:
        line, expected = [sys.executable, ROOT / script, *words], 0
        with output.open("w") as file:
            process = subprocess.Popen([*map(str, line)], stdout=file, stderr=subprocess.STDOUT)
        if stopped:
            expected = 128 + signal.SIGTERM
            while not log.exists() and process.poll() is None:
                time.sleep(0.005)
            process.send_signal(signal.SIGTERM)
        if process.wait() != expected:
            print(output.read_text())
        difference = abs(process.returncode - expected)
        return Check(f"pipeline: {what}, exit code {expected}", difference, 0)

    codec = "klt" if importlib.util.find_spec("pcodec") else "fp16"
    words = [*both, "--teacher", model, "--teacher-weights", weights, "--force", "--passes", 2]
    words += ["--codec", codec, "--batch-size", bench.args.batch_size]
    yield ended(f"relabelling, codec {codec}", "relabel/generate.py", words)
    validation = ["--val-dir", images, "--val-cache", "off"]
    words = [*both, *validation, "--output-dir", run, "--model", model]
    words += ["--schedule", "soft:20,hard:20,soft:20"]
    yield ended("a signal in training", "validate/train.py", words, stopped=True)
    continued = ended("continued training", "validate/train.py", words)
    yield continued
    if not continued.passed:
        return
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for kind in ("soft", "hard"):
        rates = [line["images_per_second"] for line in lines if line["kind"] == kind]
        rate = f"{statistics.median(rates):.0f} images/s"
        print(f"pipeline: {rate} in {kind} epochs of {len(bench.folder.files)} images")
    words = ["--checkpoint", run / "checkpoint.pt", *validation, *device]
    yield ended("evaluation", "validate/evaluate.py", words)
    top1 = float(re.search(r"top-1 ([\d.]+) %", output.read_text())[1])
    recorded = json.loads((run / "result.json").read_text())["last"]["top1"]
    yield Check("pipeline: top-1 of the checkpoint against the run's", abs(top1 - recorded), 1e-3)


CHECKS = {
    "pipeline": pipeline_checks,
    "labels": label_checks,
    "views": view_checks,
    "training": training_checks,
    "launches": launch_checks,
    "compiled": partial(training_checks, compile_student=True),
}


def main() -> None:
    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--checks", nargs="+", choices=CHECKS, default=[*CHECKS])
    add_arguments(parser)
    parser.set_defaults(classes=100, ipc=8)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    passed = []
    for name in args.checks:
        with tempfile.TemporaryDirectory() as root:
            bench, rows = Bench(args, Path(root)), []
            about = provenance(f"python benchmarks/gpu_check.py --checks {name}")
            for check in CHECKS[name](bench):
                verdict = "ok" if check.passed else "FAILED"
                line = f"{verdict:7}{check.value:.2e} (limit {check.limit:.0e})  {check.name}"
                print(line, flush=True)
                passed.append(check.passed)
                rows.append({**check._asdict(), "passed": check.passed})
                path = args.out / f"{name}.csv"
                write_csv(rows, path, about, runtime.describe(bench.machine))
    sys.exit(not all(passed))


if __name__ == "__main__":
    cli.run(main)

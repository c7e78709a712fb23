"""Agreement of the fast paths with the plain ones, on this device; part of gpu_check.sh.

python benchmarks/gpu_check.py --out runs/gpu_check

Compares labels, views and training, prints every difference with its limit, and writes
OUT/agreement.csv; exits with 1 when one is above its limit.
"""

import sys
from pathlib import Path

if not __package__:  # run as a plain script: imports start at the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import dataclasses
import itertools
import tempfile

import torch

from benchmarks.bench import Bench, add_arguments
from benchmarks.speed import Training
from relabel.teacher import Ensemble, Teacher
from utils import cli, runtime
from utils.data.views import draw
from utils.labels import centre
from utils.labels.codecs.base import distortion
from utils.results import provenance, write_csv
from utils.runtime import Runtime

STEPS = 50


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = cli.Parser(description="Agreement of fast and plain paths on this device.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    add_arguments(parser)
    parser.set_defaults(classes=100, ipc=8)
    return parser.parse_args()


@dataclasses.dataclass
class Check:
    """One comparison.

    Attributes:
        name: what is compared.
        value: the difference.
        limit: the largest one that passes.
    """

    name: str
    value: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the difference is within the limit (NaN is not)."""
        return self.value <= self.limit


def label_checks(bench: Bench) -> list[Check]:
    """Labels of grouped batches, in all precisions, and made twice."""
    device, size = bench.machine.device, bench.args.batch_size
    (pixels,) = bench.resident().render([draw(bench.spec, bench.sizes, seed=0).to(device)])
    teacher = Teacher("", bench.teacher(torch.channels_last), "")

    def labels(dtype: torch.dtype | None, together: int) -> torch.Tensor:
        ensemble = Ensemble([teacher], None, Runtime(device, dtype))
        parts = [ensemble.logits(part, size) for part in pixels.split(together)]
        return centre(torch.cat(parts).cpu())

    group = 16 * size
    alone, grouped = labels(None, size), labels(None, group)
    grouping = float((grouped - alone).abs().max())
    again = float((labels(None, group) - grouped).abs().max())
    checks = [
        Check("labels: 16 batches in one forward pass, fp32, largest difference", grouping, 1e-4),
        Check("labels: the same forward passes again", again, 0),
    ]
    precisions = {"bf16": torch.bfloat16}
    if device.type == "cuda":
        precisions["fp16"] = torch.float16
    for name, dtype in precisions.items():
        short = labels(dtype, group)
        relative, lost = float((short - alone).norm() / alone.norm()), distortion(alone, short)
        checks += [
            Check(f"labels: {name} against fp32, relative", relative, 0.05),
            Check(f"labels: {name}, distortion at T = 20", lost, 5e-3),
        ]
    return checks


def view_checks(bench: Bench) -> list[Check]:
    """Views rendered twice, in groups, and on the CPU."""
    source = bench.resident()
    on_cpu = dataclasses.replace(bench, machine=Runtime(torch.device("cpu"), None)).resident()
    views = draw(bench.spec, bench.sizes, seed=1)
    batches = list(views.to(bench.machine.device))
    source.together = 8 * views.batch_size
    grouped = torch.cat(list(source.render(batches)))
    source.together = 1
    first = torch.cat(list(source.render(batches)))
    second = torch.cat(list(source.render(batches)))
    reference = torch.cat(list(on_cpu.render(list(views))))
    grey = 255 * source.std[:, None, None]
    replayed = float((first - second).abs().max())
    grouping = float(((grouped - first) * grey).abs().max())
    elsewhere = float(((reference - first.cpu()) * grey.cpu()).abs().max())
    return [
        Check("views: replayed, largest difference", replayed, 0),
        Check("views: in groups, grey levels", grouping, 1e-2),
        Check("views: against the CPU, grey levels", elsewhere, 1e-2),
    ]


def loss_curve(bench: Bench, dtype: torch.dtype | None, compiled: bool) -> torch.Tensor:
    """float64 [STEPS]: the loss of each of the first steps of training."""
    machine = Runtime(bench.machine.device, dtype)
    training = Training(dataclasses.replace(bench, machine=machine), compiled)
    losses: list[torch.Tensor] = []
    for epoch in itertools.count():
        for batch in training.batches(epoch):
            training.step.begin_epoch()
            training.step([batch], training.loss)
            losses.append(training.step.loss_sum.double() / len(batch.pixels))
            if len(losses) == STEPS:
                return torch.stack(losses).cpu()


def training_checks(bench: Bench) -> list[Check]:
    """The losses of 50 steps in all precisions, and compiled, against eager fp32."""
    device = bench.machine.device
    exact = loss_curve(bench, None, False)
    variants: dict[str, tuple[torch.dtype | None, bool, float]] = {
        "bf16": (torch.bfloat16, False, 0.05)
    }
    if device.type == "cuda":
        variants["fp16"] = (torch.float16, False, 0.05)
    if bench.args.compile:
        variants["compiled, fp32"] = (None, True, 0.01)
        if device.type == "cuda":
            variants["compiled, fp16"] = (torch.float16, True, 0.05)
    checks = []
    for name, (dtype, compiled, limit) in variants.items():
        curve = loss_curve(bench, dtype, compiled)
        difference = float(((curve - exact).abs() / exact).mean())
        what = f"training: {name}, mean difference of the loss over {STEPS} steps, relative"
        checks.append(Check(what, difference, limit))
    return checks


def main() -> None:
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as root:
        bench = Bench.begin(args, Path(root))
        # Differences of 1e-4 are looked for, which the shortened products of TF32 would hide.
        torch.backends.cudnn.allow_tf32 = False
        checks = label_checks(bench) + view_checks(bench) + training_checks(bench)
    rows = [{**vars(check), "passed": check.passed} for check in checks]
    args.out.mkdir(parents=True, exist_ok=True)
    about = provenance("python benchmarks/gpu_check.py"), runtime.describe(bench.machine)
    write_csv(rows, args.out / "agreement.csv", *about)
    print(*about, sep="\n")
    for check in checks:
        verdict = "ok" if check.passed else "FAILED"
        print(f"{verdict:7}{check.value:.2e} (limit {check.limit:.0e})  {check.name}")
    sys.exit(not all(check.passed for check in checks))


if __name__ == "__main__":
    cli.run(main)

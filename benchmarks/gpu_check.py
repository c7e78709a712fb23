"""Agreement of the fast paths with the plain ones, on this device; part of gpu_check.sh.

python benchmarks/gpu_check.py --out runs/gpu_check

Compares labels and training (views are compared by the GPU tests), prints every difference with its
limit, and writes OUT/agreement.csv; exits with 1 when one is above its limit.
"""

import sys
from pathlib import Path

if not __package__:  # run as a plain script: imports start at the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import dataclasses
import itertools
import tempfile
from typing import NamedTuple

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
PRECISIONS = {  # below fp32, by kind of device
    "cpu": {"bf16": torch.bfloat16},
    "cuda": {"bf16": torch.bfloat16, "fp16": torch.float16},
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
    for name, dtype in PRECISIONS[device.type].items():
        short = labels(dtype, group)
        relative, lost = float((short - alone).norm() / alone.norm()), distortion(alone, short)
        checks += [
            Check(f"labels: {name} against fp32, relative", relative, 0.05),
            Check(f"labels: {name}, distortion at T = 20", lost, 5e-3),
        ]
    return checks


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
    precisions = PRECISIONS[bench.machine.device.type]
    variants = [(name, dtype, False, 0.05) for name, dtype in precisions.items()]
    if bench.args.compile:
        variants.append(("compiled, fp32", None, True, 0.01))
    if bench.args.compile and "fp16" in precisions:
        variants.append(("compiled, fp16", torch.float16, True, 0.05))
    exact, checks = loss_curve(bench, None, False), []
    for name, dtype, compile_student, limit in variants:
        curve = loss_curve(bench, dtype, compile_student)
        difference = float(((curve - exact).abs() / exact).mean())
        what = f"training: {name}, mean difference of the loss over {STEPS} steps, relative"
        checks.append(Check(what, difference, limit))
    return checks


def main() -> None:
    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    add_arguments(parser)
    parser.set_defaults(classes=100, ipc=8)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        bench = Bench.begin(args, Path(root))
        # Differences of 1e-4 are looked for, which the shortened products of TF32 would hide.
        torch.backends.cudnn.allow_tf32 = False
        checks = label_checks(bench) + training_checks(bench)
    rows = [{**check._asdict(), "passed": check.passed} for check in checks]
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

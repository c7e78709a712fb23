"""Agreement of the fast paths with the plain ones, on this device; part of gpu_check.sh.

python benchmarks/gpu_check.py --out runs/gpu_check
python benchmarks/gpu_check.py --out runs/gpu_check --summary

The first command compares labels, training and views, and writes OUT/agreement.json. The second one
puts what gpu_check.sh left in OUT together: OUT/gpu_check.json and OUT/gpu_check.txt.
"""

import sys
from pathlib import Path

if not __package__:  # run as a plain script: imports start at the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import dataclasses
import tempfile

import torch

from benchmarks.measuring import provenance
from benchmarks.speed import Bench, OurTraining
from relabel.teacher import Ensemble, Teacher
from utils import cli, runtime
from utils.cli import bounded
from utils.data import datasets
from utils.data.views import draw
from utils.files import atomic_write, read_json, to_json
from utils.labels import centre
from utils.labels.codecs.base import distortion
from utils.runtime import Runtime

STEPS = 50


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = cli.Parser(description="Agreement of fast and plain paths on this device.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--summary", action="store_true", help="only put results together")
    parser.add_argument("--model", default="ResNet18", help="teacher and student")
    parser.add_argument("--size", type=bounded(int, 8), default=224, metavar="S")
    parser.add_argument("--classes", type=bounded(int, 2), default=100, metavar="N")
    parser.add_argument("--batch-size", type=bounded(int, 2), default=16, metavar="N")
    parser.add_argument("--compile", action="store_true", help="also check the compiled student")
    runtime.add_arguments(parser)
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


def relative(values: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what was expected."""
    return float((values - expected).norm() / expected.norm())


def label_checks(bench: Bench) -> list[Check]:
    """Labels of grouped batches, in all precisions, and made twice."""
    device, size = bench.machine.device, bench.args.batch_size
    source, sizes = bench.resident(bench.folder(8))
    views = draw(bench.spec(), sizes, 0).to(device)
    (pixels,) = source.render([views])
    teacher = Teacher("", bench.teacher(fast=True), "")

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
        lost = distortion(alone, short)
        checks += [
            Check(f"labels: {name} against fp32, relative", relative(short, alone), 0.05),
            Check(f"labels: {name}, distortion at T = 20", lost, 5e-3),
        ]
    return checks


def view_checks(bench: Bench) -> list[Check]:
    """Views rendered twice, in groups, and on the CPU."""
    device, folder = bench.machine.device, bench.folder(8)
    source, sizes = bench.resident(folder)
    cpu = dataclasses.replace(bench, machine=Runtime(torch.device("cpu"), None))
    on_cpu, _ = cpu.resident(folder)
    views = draw(bench.spec(), sizes, 1)
    batches = list(views.to(device))
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


def loss_curve(bench: Bench, machine: Runtime, compiled: bool) -> torch.Tensor:
    """The loss of each of the first steps of training."""
    training = OurTraining(dataclasses.replace(bench, machine=machine), bench.folder(8), compiled)
    sums: list[torch.Tensor] = []
    training.after_step = lambda: sums.append(training.step.loss_sum.clone())
    curves = []
    for epoch in range(-(-STEPS * bench.args.batch_size // len(training.labels))):
        sums.clear()
        training.run(range(epoch, epoch + 1))
        curves.append(torch.stack(sums).double().diff(prepend=sums[0].new_zeros(1).double()))
    return torch.cat(curves)[:STEPS].cpu()


def training_checks(bench: Bench) -> list[Check]:
    """The losses of 50 steps in all precisions, and compiled, against eager fp32."""
    device = bench.machine.device
    exact = loss_curve(bench, Runtime(device, None), False)
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
        curve = loss_curve(bench, Runtime(device, dtype), compiled)
        difference = float(((curve - exact).abs() / exact).mean())
        what = f"training: {name}, mean difference of the loss over {STEPS} steps, relative"
        checks.append(Check(what, difference, limit))
    return checks


def agreement(args: argparse.Namespace) -> bool:
    """Runs all comparisons and writes them; whether all passed."""
    machine = runtime.from_arguments(args)
    # Differences of 1e-4 are looked for, which the shortened products of TF32 would hide.
    torch.backends.cudnn.allow_tf32 = False
    facts = datasets.named("imagenet1k")
    dataset = datasets.Dataset("benchmark", args.classes, args.size, facts.mean, facts.std)
    with tempfile.TemporaryDirectory() as root:
        bench = Bench(args, machine, dataset, Path(root))
        checks = label_checks(bench) + view_checks(bench) + training_checks(bench)
    rows = [{**vars(check), "passed": check.passed} for check in checks]
    args.out.mkdir(parents=True, exist_ok=True)
    content = {**provenance(machine.device), "checks": rows}
    atomic_write(args.out / "agreement.json", to_json(content))
    print("\n".join(check_lines(rows)))
    return all(check.passed for check in checks)


def check_lines(checks: list[dict]) -> list[str]:
    """A line for each comparison, as it is in agreement.json."""
    lines = []
    for check in checks:
        verdict = "ok" if check["passed"] else "FAILED"
        limit = f"(limit {check['limit']:.0e})"
        lines.append(f"{verdict:7}{check['value']:.2e} {limit}  {check['name']}")
    return lines


def summary(out: Path) -> None:
    """Writes one JSON file and one table of everything that gpu_check.sh did."""
    lines = [line.split("\t") for line in (out / "steps.tsv").read_text().splitlines()]
    steps = [{"step": name, "result": what, "seconds": int(time)} for name, what, time in lines]
    content: dict = {"torch": str(torch.__version__), "steps": steps}
    text = [f"{step['step']:12}{step['result']:24}{step['seconds']:5} s" for step in steps]
    for name in ("agreement", "speed"):
        if (out / f"{name}.json").exists():
            content[name] = read_json(out / f"{name}.json")
    if "agreement" in content:
        text += ["", content["agreement"]["machine"]]
        text += check_lines(content["agreement"]["checks"])
    for name in ("speed.txt", "demo.txt"):
        if (out / name).exists():
            text += ["", (out / name).read_text().rstrip()]
    atomic_write(out / "gpu_check.json", to_json(content))
    atomic_write(out / "gpu_check.txt", ("\n".join(text) + "\n").encode())
    print("\n".join(text))


def main() -> None:
    args = parse_arguments()
    if args.summary:
        summary(args.out)
    elif not agreement(args):
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)

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
from collections.abc import Callable
from datetime import date

import torch

from benchmarks.speed import Bench, Meter, OurTraining, describe_machine
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
        value: the difference that was found.
        limit: the largest one that passes.
    """

    name: str
    value: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the difference is within the limit (NaN is not)."""
        return self.value <= self.limit


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what was expected."""
    return float((found - expected).norm() / expected.norm())


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
    checks = [
        Check("labels: 16 batches in one forward pass, fp32, largest difference", 0, 1e-4),
        Check("labels: the same forward passes again", 0, 0),
    ]
    checks[0].value = float((grouped - alone).abs().max())
    checks[1].value = float((labels(None, group) - grouped).abs().max())
    names = {"bf16": torch.bfloat16}
    if device.type == "cuda":
        names["fp16"] = torch.float16
    for name, dtype in names.items():
        found = labels(dtype, group)
        checks.append(Check(f"labels: {name} against fp32, relative", relative(found, alone), 0.05))
        checks.append(
            Check(f"labels: {name}, distortion at T = 20", distortion(alone, found), 5e-3)
        )
    return checks


def view_checks(bench: Bench) -> list[Check]:
    """Views rendered twice, in groups, and on the CPU."""
    device = bench.machine.device
    source, sizes = bench.resident(bench.folder(8))
    on_cpu, _ = dataclasses.replace(bench, machine=Runtime(torch.device("cpu"), None)).resident(
        bench.folder(8)
    )
    views = draw(bench.spec(), sizes, 1)
    batches = list(views.to(device))
    source.together = 8 * views.batch_size
    grouped = torch.cat(list(source.render(batches)))
    source.together = 1
    first, second = (torch.cat(list(source.render(batches))) for _ in range(2))
    reference = torch.cat(list(on_cpu.render(list(views))))
    grey = 255 * source.std[:, None, None]
    return [
        Check("views: replayed, largest difference", float((first - second).abs().max()), 0),
        Check("views: in groups, grey levels", float(((grouped - first) * grey).abs().max()), 1e-2),
        Check(
            "views: against the CPU, grey levels",
            float(((reference - first.cpu()) * grey.cpu()).abs().max()),
            1e-2,
        ),
    ]


def loss_curve(bench: Bench, machine: Runtime, compiled: bool) -> torch.Tensor:
    """The loss of each of the first steps of training."""
    training = OurTraining(dataclasses.replace(bench, machine=machine), bench.folder(8), compiled)
    sums: list[torch.Tensor] = []
    training.trainer.after_step = lambda so_far: sums.append(so_far.loss.clone())
    curves = []
    for number in range(-(-STEPS * bench.args.batch_size // len(training.labels))):
        sums.clear()
        training.epoch(number)
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
    return [
        Check(
            f"training: {name}, mean difference of the loss over {STEPS} steps, relative",
            float(
                ((loss_curve(bench, Runtime(device, dtype), compiled) - exact).abs() / exact).mean()
            ),
            limit,
        )
        for name, (dtype, compiled, limit) in variants.items()
    ]


GROUPS: tuple[Callable[[Bench], list[Check]], ...] = (label_checks, view_checks, training_checks)


def agreement(args: argparse.Namespace) -> bool:
    """Runs all comparisons and writes them; whether all passed."""
    machine = runtime.from_arguments(args)
    # Differences of 1e-4 are looked for, which the shortened products of TF32 would hide.
    torch.backends.cudnn.allow_tf32 = False
    facts = datasets.named("imagenet1k")
    dataset = datasets.Dataset("benchmark", args.classes, args.size, facts.mean, facts.std)
    checks: list[Check] = []
    with tempfile.TemporaryDirectory() as root:
        bench = Bench(args, machine, dataset, Path(root), Meter(machine.device), {})
        for group in GROUPS:
            checks += group(bench)
    rows = [{**vars(check), "passed": check.passed} for check in checks]
    header = {
        "command": " ".join(["python benchmarks/gpu_check.py", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "machine": describe_machine(machine.device),
        "torch": str(torch.__version__),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    atomic_write(args.out / "agreement.json", to_json({**header, "checks": rows}))
    for check in checks:
        verdict = "ok" if check.passed else "FAILED"
        print(f"{verdict:7}{check.value:.2e} (limit {check.limit:.0e})  {check.name}")
    return all(check.passed for check in checks)


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
        for check in content["agreement"]["checks"]:
            verdict = "ok" if check["passed"] else "FAILED"
            limit = f"(limit {check['limit']:.0e})"
            text.append(f"{verdict:7}{check['value']:.2e} {limit}  {check['name']}")
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

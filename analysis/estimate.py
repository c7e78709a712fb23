"""What a plan will take: runs, label sets, disk and time, before anything is started."""

import contextlib
import io
import statistics
from pathlib import Path

from matplotlib.ticker import EngFormatter

from analysis import checks
from analysis.plan import Plan
from analysis.runner import Task, machine_slots
from utils import runlog
from utils.cli import UserError
from utils.labels import codecs
from utils.labels.manifest import read_manifest

_KLT_FACTOR = 5  # bytes of fp16 over those of klt at 1000 classes: five to eight
_BYTES = EngFormatter("B", places=2)
_START_SECONDS = 1  # a run's, to start and to end: 0.8 on a CPU core, programs being imported


def duration(seconds: float) -> str:
    """ "90 s", "3.5 min", "12.0 h" or "2.5 days"."""
    for length, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def bytes_per_label(codec: dict, classes: int) -> float:
    """About how many bytes a label takes in a codec, given as in a manifest."""
    match codec:
        case {"name": "topk", "topk": k}:
            return k * (16 + (classes - 1).bit_length()) / 8
        case {"name": "quant", "bits": bits}:
            return classes * bits / 8
        case {"name": "klt", "bytes_per_label": count}:
            return count
        case {"name": "klt"}:
            return 2 * classes / _KLT_FACTOR
    return 2 * classes


def speed(tasks: list[Task]) -> float | None:
    """Images per second in the epochs that these runs have logged, None before the first."""
    logged = [
        line["images_per_second"]
        for task in tasks
        for line in runlog.RunFolder(task.done.parent).log_lines()
    ]
    return statistics.median(logged) if logged else None


def label_bytes(labels: list[Task], classes: int) -> float:
    """About how many bytes label sets take, each after the one it is made from."""
    counts: dict[Path, int] = {}
    total = 0.0
    for task in labels:
        args = checks.parse(task)
        count = args.slc * classes if args.slc else counts.get(args.label_dir)
        if count is None:  # all labels of a set that no task of the plan makes
            manifest = read_manifest(args.label_dir / "manifest.json")
            count = manifest["passes"] * manifest["images"]["count"]
        counts[task.done.parent] = count
        total += count * bytes_per_label(codecs.from_arguments(args), classes)
    return total


def count_views(task: Task, classes: int) -> int:
    """How many views a run trains on: images times epochs."""
    args, ipc = checks.parse(task), task.facts["ipc"]
    with contextlib.redirect_stdout(io.StringIO()):
        phases = checks.phases_of(args, ipc, classes)
    return ipc * classes * sum(epochs for _, epochs in phases)


def estimate(plan: Plan, labels: list[Task], runs: list[Task]) -> str:
    """Lines on runs, label sets, disk and time by student; raises UserError for wrong flags."""
    rates = plan.images_per_second or [None]
    rates = rates * len(plan.students) if len(rates) == 1 else rates
    if len(rates) != len(plan.students):
        raise UserError("--images-per-second: give one number, or one for each of --students")
    run_bytes, seconds, times = 0, [], []
    for student, given in zip(plan.students, rates, strict=True):
        tasks = [task for task in runs if task.facts["student"] == student]
        # None, for code of the user's own, counts as nothing.
        network = checks.network(student, plan.classes, plan.facts.input_size)
        weights = sum(weight.numel() for weight in network.parameters()) if network else 0
        run_bytes += len(tasks) * 4 * 4 * weights  # its own, Adam's two moments, the best, in fp32
        left = [task for task in tasks if not task.is_done()]
        views = sum(count_views(task, plan.classes) for task in left)
        known = f"time: {student} {views:,} views"
        if rate := given or speed(tasks):
            seconds.append(views / rate + _START_SECONDS * len(left))
            known += f" at {float(f'{rate:.3g}'):,g} images/s, {len(left)} starts"
            times.append(f"{known} = {duration(seconds[-1])}")
        else:
            advice = "--images-per-second X, as in log.jsonl of any run of this network"
            times.append(f"{known}; no epoch is measured yet: {advice}")
    if len(seconds) == len(plan.students):
        total, beside = sum(seconds), len(machine_slots(plan.jobs))
        at_once = f"{beside} at a time: {duration(total / beside)}"
        times.append(f"time in all: {duration(total)}; {at_once}")
    to_do, to_make = (sum(not task.is_done() for task in tasks) for tasks in (runs, labels))
    return "\n".join(
        [
            f"runs: {len(runs)}, {to_do} to do",
            f"label sets: {len(labels)}, {to_make} to make",
            f"disk: label sets {_BYTES(label_bytes(labels, plan.classes))} and headers, "
            f"runs {_BYTES(run_bytes)}",
            *times,
            "labelling and evaluation come on top",
        ]
    )

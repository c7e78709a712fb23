"""What a plan will take: runs, label sets, disk and time, before anything is started."""

import argparse
import contextlib
import io
import statistics
from pathlib import Path

from matplotlib.ticker import EngFormatter

from analysis import checks
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
        if task.done.parent.is_dir()
        for line in runlog.RunFolder(task.done.parent).log_lines()
    ]
    return statistics.median(logged) if logged else None


def run_bytes(student: str, classes: int, size: int) -> int:
    """Of a run's checkpoint (weights and Adam's two moments) and its best weights, in fp32.

    0 for code of the user's own, which is not run for an estimate.
    """
    network = checks.network(student, classes, size)
    return 4 * 4 * sum(weight.numel() for weight in network.parameters()) if network else 0


def label_bytes(task: Task, counts: dict[Path, int], classes: int) -> float:
    """About how many bytes a label set takes; `counts` has the labels of those before it."""
    args = checks.parse(task)
    if args.slc:
        count = args.slc * classes
    elif args.label_dir in counts:
        count = counts[args.label_dir]
    else:  # all labels of a set that no task of the plan makes
        manifest = read_manifest(args.label_dir / "manifest.json")
        count = manifest["passes"] * manifest["images"]["count"]
    counts[args.label_dir if hasattr(args, "teacher") else args.out_dir] = count
    return count * bytes_per_label(codecs.from_arguments(args), classes)


def estimate(plan: argparse.Namespace, labels: list[Task], runs: list[Task]) -> str:
    """Some lines: runs and label sets, disk, and the time that is left for each student.

    Args:
        plan: settings of the sweep; `images_per_second` holds one number, or one per student.
        classes: their number.
        labels, runs: its tasks.

    Raises:
        UserError: wrong flags or networks, or another count of speeds.
    """
    given = plan.images_per_second or []
    if len(given) not in (0, 1, len(plan.students)):
        raise UserError("--images-per-second: give one number, or one for each of --students")
    classes, size, counts = plan.classes, plan.facts.input_size, {}
    on_disk = sum(label_bytes(task, counts, classes) for task in labels)
    checkpoints = {name: run_bytes(name, classes, size) for name in plan.students}
    of_runs = sum(checkpoints[task.facts["student"]] for task in runs)
    left, left_labels = ([task for task in each if not task.is_done()] for each in (runs, labels))
    lines = [
        f"runs: {len(runs)}, {len(left)} to do",
        f"label sets: {len(labels)}, {len(left_labels)} to make",
        f"disk: label sets {_BYTES(on_disk)} and headers, runs {_BYTES(of_runs)}",
    ]
    seconds = []
    for position, student in enumerate(plan.students):
        to_do = [task for task in left if task.facts["student"] == student]
        views = sum(count_views(task, classes) for task in to_do)
        rate = given[position % len(given)] if given else None
        rate = rate or speed([task for task in runs if task.facts["student"] == student])
        known = f"time: {student} {views:,} views"
        if rate is None:
            lines.append(
                f"{known}; no epoch is measured yet: --images-per-second X, as in log.jsonl of any "
                "run of this network"
            )
            continue
        seconds.append(views / rate + _START_SECONDS * len(to_do))
        per_second = f"{float(f'{rate:.3g}'):,g} images/s"
        lines.append(f"{known} at {per_second}, {len(to_do)} starts = {duration(seconds[-1])}")
    if len(seconds) == len(plan.students):
        total, beside = sum(seconds), len(machine_slots(plan.jobs))
        in_all = f"time in all: {duration(total)}"
        lines.append(f"{in_all}; {beside} at a time: {duration(total / beside)}")
    return "\n".join([*lines, "labelling and evaluation come on top"])


def count_views(task: Task, classes: int) -> int:
    """How many views a run trains on: images times epochs."""
    args, ipc = checks.parse(task), task.facts["ipc"]
    with contextlib.redirect_stdout(io.StringIO()):
        phases = checks.phases_of(args, max((args.slc or ipc) // ipc, 1), classes)
    return ipc * classes * sum(epochs for _, epochs in phases)

"""Runs a whole comparison: methods x codecs x SLC x IPC x students x seeds, then table and plots.

The head of scripts/run_sweep.sh lists the flags, docs/analysis.md what a plan file holds. Missing
label sets are made; stored once per IPC, they are shared by all runs. Finished runs are skipped and
stopped ones continued, so the same command may be stopped and repeated at any time.
"""

import sys
from pathlib import Path

if not __package__:  # run as a plain script: imports start at the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import contextlib
import itertools
import re
import shlex

from analysis import checks, tables
from analysis.estimate import bytes_per_label, estimate
from analysis.plan import Plan, read_settings
from analysis.runner import ROOT, Task, machine_slots, run_all
from utils import cli, runlog
from utils.cli import UserError
from utils.files import lock, read_json

_RESULTS = ("best_top1", "best_top5", "best_epoch", "last_top1", "last_top5")
_RESULTS += ("label_bytes", "epochs", "seconds", "device")
# Flags of relabel/generate.py for views that have a label set of their own.
_VIEWS = {"views": "", "static": "--mix none --min-scale 1", "auto": "--recipe auto"}


def _words(*texts: str) -> list[str]:
    """The words of flags, as a shell splits them; raises UserError where it could not."""
    words = []
    for text in texts:
        try:
            words += shlex.split(text)
        except ValueError as error:
            raise UserError(f"{text}: {str(error).lower()}") from None
    return words


def affordable_slc(slc: int, classes: int, topk: int, stored: int) -> int:
    """Top-k labels per class in the bytes of `slc` fp16 labels, at most `stored`."""
    for_one = 2 * classes / bytes_per_label({"name": "topk", "topk": topk}, classes)
    return min(slc * int(for_one), stored)


def label_sets(plan: Plan, ipc: int, labels: str) -> dict[str, list[Task]]:
    """The label sets that a method is trained on, by what it reads (see Method.labels).

    By the codec's name, the tasks that make one: the first has a teacher label views, the second,
    if there is one, stores those labels in the codec.
    """
    if not labels:
        return {"": []}
    views = labels if labels in _VIEWS else "views"
    main = plan.label_dir.replace("{ipc}", str(ipc))
    folder = Path(main if views == "views" else f"{main}_{views}")

    def task(name: str, program: str, folder: Path, flags: list[str]) -> Task:
        command = [str(ROOT / program), *flags]
        return Task(f"labels_{name}_ipc{ipc}", command, folder / "manifest.json", plan.logs, {})

    amount = ipc if views == "static" else plan.stored_slc(ipc)
    flags = [*plan.data_flags(ipc), *_words(plan.relabel)]
    flags += ["--label-dir", str(folder), "--slc", str(amount), *_VIEWS[views].split()]
    generate = task(views, "relabel/generate.py", folder, flags)
    codecs = plan.codecs if labels == "views" else {}
    if labels == "topk":
        codecs = {f"top{plan.topk}": f"--codec topk --topk {plan.topk}"}
    sets = {}
    for codec, compress in (codecs or {"": ""}).items():
        sets[codec] = [generate]
        if compress:
            recoded = Path(f"{main}_{_slug(codec)}")
            flags = ["--label-dir", str(folder), "--out-dir", str(recoded), *_words(compress)]
            sets[codec].append(task(_slug(codec), "relabel/compress.py", recoded, flags))
    return sets


def label_tasks(plan: Plan) -> list[Task]:
    """The label sets to be made for the methods, each after the one it is made from.

    Without a teacher these are the recoded ones; raises UserError if one of the others is missing.
    """
    tasks = []
    reads = dict.fromkeys(method.labels for method in plan.methods.values() if method.labels)
    for ipc, labels in itertools.product(plan.ipc, reads):
        for generate, *recoded in label_sets(plan, ipc, labels).values():
            if plan.relabel:
                tasks.append(generate)
            elif not generate.done.exists():
                raise UserError(
                    f"no label set at {generate.done.parent}: name the teacher that is to make it, "
                    '--relabel "--teacher NAME --teacher-weights FILE"'
                )
            tasks += recoded
    return _once(tasks)


def run_tasks(plan: Plan) -> list[Task]:
    """All runs of the plan: seed by seed, so that what is done first is a whole comparison."""
    tasks = []
    amounts = [(ipc, slc) for ipc in plan.ipc for slc in plan.slcs(ipc)]
    axes = (plan.seeds, plan.students, amounts, plan.methods)
    for seed, student, (ipc, slc), name in itertools.product(*axes):
        labels = plan.methods[name].labels
        for codec, made in label_sets(plan, ipc, labels).items():
            counted = labels not in ("", "static")  # else an SLC changes nothing
            facts = {"method": name, "codec": codec, "slc": slc if counted else None}
            facts |= {"ipc": ipc, "student": student, "seed": seed}
            if not plan.codecs:
                del facts["codec"]
            tasks.append(_run_task(plan, facts, made))
    return _once(tasks)


def _run_task(plan: Plan, facts: dict, made: list[Task]) -> Task:
    """The run with these facts on the label set that the last of the tasks makes."""
    method, slc, ipc = plan.methods[facts["method"]], facts["slc"], facts["ipc"]
    student = re.sub(r"[^A-Za-z0-9]+", "-", facts["student"])
    parts = [_slug(facts["method"]), _slug(facts.get("codec", "")), f"slc{slc}" if slc else ""]
    name = "_".join(filter(None, [*parts, f"ipc{ipc}", student, f"seed{facts['seed']}"]))
    folder = Path(plan.out_dir, "runs", name)
    command = [str(ROOT / "validate/train.py"), *plan.data_flags(ipc)]
    command += ["--val-dir", plan.val_dir, "--output-dir", str(folder)]
    command += ["--model", facts["student"], "--seed", str(facts["seed"])]
    if method.labels == "topk":
        slc = affordable_slc(slc, plan.classes, plan.topk, plan.stored_slc(ipc))
    command += ["--slc", str(slc)] if slc else []
    command += ["--label-dir", str(made[-1].done.parent)] if made else []
    cells = [cell["flags"] for cell in plan.cells if in_cell(facts, cell)]
    command += _words(plan.flags, method.flags, *cells)
    return Task(name, command, folder / runlog.RESULT, plan.logs, facts)


def _once(tasks: list[Task]) -> list[Task]:
    """Each task once; raises UserError where two would share their name, and their folder."""
    named: dict[str, Task] = {}
    for task in tasks:
        if named.setdefault(task.name, task).command != task.command:
            raise UserError(f"two tasks would both be {task.name}: rename a method or a codec")
    return list(named.values())


def in_cell(facts: dict, cell: dict) -> bool:
    """Whether a run with these facts is in a cell of the plan, and gets its flags."""
    known = tables.with_labels_per_image(facts)
    return all(known.get(name) == value for name, value in cell.items() if name != "flags")


def _slug(name: str) -> str:
    """The name of a method or codec as a part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name)


def collect(tasks: list[Task]) -> list[dict]:
    """A row of results for each finished run: accuracy in percent, bytes, seconds."""
    rows = []
    for task in filter(Task.is_done, tasks):
        result = read_json(task.done)
        for which in ("best", "last"):
            result |= {f"{which}_{name}": value for name, value in result[which].items()}
        rows.append({"run": task.name, **task.facts, **{name: result[name] for name in _RESULTS}})
    return rows


def work(plan: Plan, labels: list[Task], runs: list[Task]) -> list[str]:
    """Checks the tasks, then makes what --only leaves of them; a line for each that failed."""
    print(f"checking {len(labels)} label sets and {len(runs)} runs", flush=True)
    unchecked, slots, failed = checks.check(runs + labels), machine_slots(plan.jobs), []
    # The tasks of a job array are side by side.
    alone = lock(Path(plan.out_dir), "running a sweep in")
    with alone if plan.task is None else contextlib.nullcontext():
        if plan.only != "runs":
            failed = run_all(labels, slots[:1], "label sets")
        if not failed and plan.only != "labels":
            checks.check(unchecked, label_sets_made=True)
            failed = run_all(runs, slots, "runs")
    return failed


def main() -> None:
    plan = read_settings(sys.argv[1:])
    labels, runs = label_tasks(plan), run_tasks(plan)
    if plan.estimate:
        print(estimate(plan, labels, runs))
        return
    for folder in (plan.data_dir, plan.val_dir, plan.out_dir, plan.label_dir):
        if "$" in folder:
            raise UserError(f"{folder}: set the variable in config.sh or in the environment")
    whole = plan.task is None
    if not whole and plan.task >= len(runs):
        raise UserError(f"--task {plan.task}: the plan has runs 0 to {len(runs) - 1}")
    if plan.only == "list":
        for position, task in enumerate(runs):
            state = "done" if task.is_done() else "to do"
            print(f"{position} {task.name} ({state}): python {shlex.join(task.command)}")
        return
    failed = []
    if plan.only != "collect":
        for cell in plan.cells:
            if not any(in_cell(task.facts, cell) for task in runs):
                print(f"no run of the plan is in the cell {cell}")
        failed = work(plan, labels, runs if whole else [runs[plan.task]])
    if plan.only == "collect" or (plan.only is None and whole):
        rows = collect(runs)
        print(f"{len(rows)} of {len(runs)} runs of the plan are finished")
        if rows:
            tables.report(rows, Path(plan.out_dir), plan.table)
        elif not failed:
            raise UserError(f"no run of the plan is finished in {plan.out_dir}")
    if failed:
        raise UserError(f"{len(failed)} failed, logs in {plan.logs}: {'; '.join(failed)}")


if __name__ == "__main__":
    cli.run(main)

"""Runs a whole comparison: methods x codecs x SLC x IPC x students x seeds, then table and plots.

The head of scripts/run_sweep.sh lists the flags, docs/analysis.md what a plan file holds. Missing
label sets are made; stored once per IPC, they are shared by all runs. Finished runs are skipped and
stopped ones continued, so the same command may be stopped and repeated at any time.
"""

import sys
from pathlib import Path

if not __package__:  # run as a plain script: imports start at the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import contextlib
import dataclasses
import functools
import itertools
import os
import re
import shlex
from collections.abc import Sequence

from analysis import checks, plan_file, tables
from analysis.estimate import bytes_per_label, estimate
from analysis.runner import ROOT, Task, machine_slots, run_all
from utils import cli, runlog
from utils.cli import UserError, bounded, did_you_mean
from utils.data import datasets, folders
from utils.files import lock, read_json
from validate.kinds import KINDS

_RESULTS = ("best_top1", "best_top5", "best_epoch", "last_top1", "last_top5")
_RESULTS += ("label_bytes", "epochs", "seconds", "device")
# Flags of relabel/generate.py for views that have a label set of their own.
_VIEWS = {"views": "", "static": "--mix none --min-scale 1", "auto": "--recipe auto"}


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to train a student.

    Attributes:
        flags: of validate/train.py.
        labels: the label set it reads: "views" (crops, as for HALD), "auto" (views as --recipe auto
            chooses them), "static" (whole images), "topk" (the views' labels, only their largest
            logits), or "" for none.
        pooled: whether it draws from a pool of more labels than it may store.
    """

    flags: str
    labels: str = "views"
    pooled: bool = False


_NAMED = {
    "auto": Method("--recipe auto", "auto"),
    "hald": Method("--schedule hald"),
    "balanced": Method("--schedule hald --soft-loss-scale T2"),
    "reset": Method("--schedule hald --reset-optimizer"),
    **{f"S{variant}": Method(f"--schedule S{variant}") for variant in range(1, 9)},
    "joint": Method("--schedule joint --soft-loss-scale T2"),
    "static": Method("--schedule static", "static"),
    "lpld": Method("--schedule soft --slc-from random", pooled=True),
    "lpqld": Method("--schedule soft --temperature 20 --temperature-end 4", "topk", pooled=True),
}


def known_methods() -> dict[str, Method]:
    """All methods by name: those above, and any other kind of epoch under its own name.

    Kinds of extensions/ are registered only when the entry script runs, hence a function.
    """
    kinds = {
        name: Method(f"--schedule {name}", "views" if kind.needs_labels else "")
        for name, kind in KINDS.items()
    }
    return kinds | _NAMED


class Plan(argparse.Namespace):
    """The settings of a sweep, by the names of their flags, and what follows from them.

    Of a plan file there are `codecs`, `cells` and `table`, too. `flags` follow -- or stand in the
    plan, `methods` are a Method by name, and `facts` those of the data set.
    """

    def slcs(self, ipc: int) -> list[int]:
        """The amounts of soft labels per class that are compared at an IPC."""
        return self.slc or [count * ipc for count in self.labels_per_image]

    def stored_slc(self, ipc: int) -> int:
        """Soft labels per class of the label set of the views at an IPC."""
        pooled = any(method.pooled for method in self.methods.values())
        return self.label_slc or max(self.slcs(ipc)) * (4 if pooled else 1)

    def images_dir(self, ipc: int) -> Path:
        """Folder of the distilled images of that IPC."""
        return Path(self.data_dir.replace("{ipc}", str(ipc)))

    def data_flags(self, ipc: int) -> list[str]:
        """The flags of relabel/generate.py and validate/train.py that say what the images are."""
        flags = ["--dataset", self.dataset, "--data-dir", str(self.images_dir(ipc))]
        for name in ("num_classes", "input_size", "mean", "std"):
            if (value := getattr(self, name)) is not None:
                values = value if isinstance(value, list) else [value]
                flags += ["--" + name.replace("_", "-"), *map(str, values)]
        return flags

    @functools.cached_property
    def classes(self) -> int:
        """Their number: known of the data set, or that of the distilled images' class folders."""
        return self.facts.num_classes or len(folders.scan(self.images_dir(self.ipc[0])).classes)

    @property
    def topk(self) -> int:
        """How many logits of a label lpqld stores."""
        return max(2, self.classes // 20)

    @property
    def logs(self) -> Path:
        """The folder with what the commands print, and which of them are done."""
        return Path(self.out_dir, "logs")

    def check(self) -> None:
        """Raises UserError where settings are missing or do not go together."""
        needed = ("dataset", "data_dir", "val_dir", "out_dir", "methods", "ipc", "students")
        if missing := [name for name in needed if not getattr(self, name)]:
            flags = ", ".join("--" + name.replace("_", "-") for name in missing)
            raise UserError(f"the plan lacks {flags}")
        if bool(self.slc) == bool(self.labels_per_image):
            raise UserError("--slc and --labels-per-image: give one of them")
        for folder in (self.data_dir, self.label_dir):
            if len(self.ipc) > 1 and folder and "{ipc}" not in folder:
                raise UserError(f"{folder} must contain {{ipc}} where there is more than one --ipc")
        for ipc, slc in itertools.product(self.ipc, self.slc or []):
            if slc % ipc:
                raise UserError(f"--slc {slc} is not a multiple of IPC {ipc}")
        if self.images_per_second and not self.estimate:
            raise UserError("--images-per-second goes with --estimate")


def read_settings(arguments: Sequence[str]) -> Plan:
    """The settings of the plan file, overridden by the flags; raises UserError for wrong ones."""
    of_plan = cli.Parser(add_help=False)
    add, count = of_plan.add_argument, {"type": bounded(int, 1), "metavar": "N"}
    datasets.add_arguments(of_plan, required=False)
    for flag in ("--data-dir", "--val-dir", "--out-dir", "--label-dir"):
        # No shell does it in a plan.
        add(flag, type=lambda text: os.path.expanduser(os.path.expandvars(text)))  # noqa: PTH111
    add("--relabel", type=os.path.expandvars, default="")
    add("--methods", nargs="+", help=", ".join(known_methods()))
    add("--students", nargs="+")
    for flag in ("--slc", "--labels-per-image", "--ipc"):
        add(flag, nargs="+", **count)
    add("--seeds", nargs="+", type=bounded(int, 0), metavar="N", default=[0, 1, 2])
    add("--label-slc", **count)
    of_plan.set_defaults(flags="", codecs={}, cells=[], table={})
    about = "bash scripts/run_sweep.sh --help says what the flags are."
    parser = cli.Parser(description=about, parents=[of_plan])
    add = parser.add_argument
    add("--plan", type=Path)
    add("--jobs", **count)
    add("--only", choices=("list", "labels", "runs", "collect"))
    add("--task", type=bounded(int, 0), metavar="N")
    add("--estimate", action="store_true")
    add("--images-per-second", nargs="+", type=bounded(float, 0.001), metavar="X")
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    plan = parser.parse_args(arguments[:cut], Plan())
    if plan.plan:
        flags, others = plan_file.read(plan.plan)
        of_plan.prog = str(plan.plan)  # named in what is wrong with it
        planned = of_plan.parse_args(flags, Plan(**others))
        for given, other in (("slc", "labels_per_image"), ("labels_per_image", "slc")):
            if getattr(plan, given):  # as a flag, which overrides the plan
                setattr(planned, other, None)
        plan = parser.parse_args(arguments[:cut], planned)
    plan.flags = shlex.join(arguments[cut + 1 :]) or plan.flags
    plan.check()
    plan.facts = datasets.from_arguments(plan)
    plan.methods = chosen_methods(plan.methods)
    plan.label_dir = plan.label_dir or f"{plan.out_dir}/labels/ipc{{ipc}}"
    return plan


def chosen_methods(chosen: list[str] | dict[str, dict[str, str] | None]) -> dict[str, Method]:
    """The methods of a plan by the names it gives them; raises UserError for an unknown one."""
    known, methods = known_methods(), {}
    for name, own in (chosen if isinstance(chosen, dict) else dict.fromkeys(chosen)).items():
        own = own or {}
        named = own.get("like") or str(name)
        if named not in known:
            raise UserError(
                f"unknown method {named!r}{did_you_mean(named, list(known))} (known: "
                f"{', '.join(known)}; in a plan of your own: {name}: {{like: hald, flags: ...}})"
            )
        flags = f"{known[named].flags} {own.get('flags') or ''}"
        methods[str(name)] = dataclasses.replace(known[named], flags=flags)
    return methods


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

    Without a teacher these are the recoded ones; raises UserError where one of the others is
    missing.
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
    if plan.only == "list":
        for position, task in enumerate(runs):
            state = "done" if task.is_done() else "to do"
            print(f"{position} {task.name} ({state}): python {shlex.join(task.command)}")
        return
    whole = plan.task is None
    if not whole and plan.task >= len(runs):
        raise UserError(f"--task {plan.task}: the plan has runs 0 to {len(runs) - 1}")
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

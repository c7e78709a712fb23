"""Runs a whole comparison: methods x codecs x SLC x IPC x students x seeds, then table and plots.

The head of scripts/run_sweep.sh lists the flags, docs/analysis.md what a plan file holds. Missing
label sets are made with the flags in `relabel`; stored once per IPC, they are shared by all runs.
Finished runs are skipped and stopped ones continued, so the same command may be stopped and
repeated at any time; a second plan in the same folder adds to the results.
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
from analysis.estimate import estimate
from analysis.runner import ROOT, Task, machine_slots, run_all
from utils import cli, runlog
from utils.cli import UserError, bounded, did_you_mean
from utils.data import datasets, folders
from utils.files import lock, read_json
from validate.kinds import KINDS

_FOLDERS = ("data_dir", "val_dir", "out_dir", "label_dir")
_scan = functools.cache(folders.scan)
_CUSTOM = ("num_classes", "input_size", "mean", "std")  # flags that describe a data set


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to train a student.

    Attributes:
        flags: flags of validate/train.py.
        labels: the label set it reads: "views" (crops, as for HALD), "auto" (views as --recipe auto
            chooses them), "static" (whole images), "topk" (the views' labels, only their largest
            logits), or "" for none.
        pooled: whether it draws from a pool of more labels than it may store.
    """

    flags: str
    labels: str = "views"
    pooled: bool = False

    @property
    def counts_views(self) -> bool:
        """Whether its labels are as many as the SLC says."""
        return self.labels in ("views", "auto", "topk")


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


def read_settings(arguments: Sequence[str]) -> argparse.Namespace:
    """The settings of a sweep: of the plan file, overridden by the flags.

    Besides the flags by their names they hold `codecs`, `cells` and `table` of the plan, `methods`
    as Method by name, `facts` of the data set, and `flags`, which follow -- or stand in the plan.

    Raises:
        UserError: some are missing or wrong.
    """
    parser = cli.Parser(description="bash scripts/run_sweep.sh --help says what the flags are.")
    add, count = parser.add_argument, {"type": bounded(int, 1), "metavar": "N"}
    add("--plan", type=Path)
    datasets.add_arguments(parser, required=False)
    for flag in ("--data-dir", "--val-dir", "--out-dir", "--label-dir", "--relabel"):
        add(flag)
    add("--methods", nargs="+", help=", ".join(known_methods()))
    add("--students", nargs="+")
    add("--slc", nargs="+", **count)
    add("--labels-per-image", nargs="+", **count)
    add("--ipc", nargs="+", **count)
    add("--seeds", nargs="+", type=bounded(int, 0), metavar="N", default=[0, 1, 2])
    add("--label-slc", **count)
    add("--jobs", **count)
    add("--only", choices=("list", "labels", "runs", "collect"))
    add("--task", type=bounded(int, 0), metavar="N")
    add("--estimate", action="store_true")
    add("--images-per-second", nargs="+", type=bounded(float, 0.001), metavar="X")
    parser.set_defaults(flags="", codecs={}, cells=[], table={})
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    settings = parser.parse_args(arguments[:cut])
    if settings.plan:
        flags_alone = ("plan", "jobs", "only", "task", "estimate", "images_per_second")
        names = [name for name in vars(settings) if name not in flags_alone]
        flags, others = plan_file.read(settings.plan, names)
        program, parser.prog = parser.prog, str(settings.plan)  # named in what is wrong with it
        defaults = vars(parser.parse_args(flags)) | others
        parser.prog = program
        for given, other in (("slc", "labels_per_image"), ("labels_per_image", "slc")):
            if getattr(settings, given):  # as a flag, which overrides the plan
                defaults[other] = None
        parser.set_defaults(**defaults)
        settings = parser.parse_args(arguments[:cut])
    if more := arguments[cut + 1 :]:
        settings.flags = shlex.join(more)
    check(settings)
    check_texts(settings)
    settings.facts = datasets.from_arguments(settings)
    settings.methods = chosen_methods(settings.methods)
    for name in (*_FOLDERS, "relabel"):
        text = os.path.expandvars(getattr(settings, name) or "")
        # No shell does it in a plan.
        setattr(settings, name, f"{Path.home()}/{text[2:]}" if text.startswith("~/") else text)
    return settings


def check(settings: argparse.Namespace) -> None:
    """Raises UserError where settings are missing or do not go together."""
    needed = ("dataset", "data_dir", "val_dir", "out_dir", "methods", "ipc", "students")
    needed = needed if settings.labels_per_image else (*needed, "slc")
    if missing := [name for name in needed if not getattr(settings, name)]:
        flags = ", ".join("--" + name.replace("_", "-") for name in missing)
        raise UserError(f"the plan lacks {flags}")
    for name in ("data_dir", "label_dir"):
        folder = getattr(settings, name)
        if len(settings.ipc) > 1 and folder and "{ipc}" not in folder:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} must contain {{ipc}} where there is more than one --ipc")
    if settings.images_per_second and not settings.estimate:
        raise UserError("--images-per-second goes with --estimate")
    if settings.slc and settings.labels_per_image:
        raise UserError("--slc and --labels-per-image: give one of them")
    for ipc, slc in itertools.product(settings.ipc, settings.slc or []):
        if slc % ipc:
            raise UserError(f"--slc {slc} is not a multiple of IPC {ipc}")


def check_texts(settings: argparse.Namespace) -> None:
    """Raises UserError for flags that are no words, as those with an odd quotation mark are."""
    texts = {"--relabel": settings.relabel or "", "flags": settings.flags}
    texts |= {f"codec {name!r}": flags for name, flags in settings.codecs.items()}
    texts |= {f"cell {position}": cell["flags"] for position, cell in enumerate(settings.cells, 1)}
    if isinstance(settings.methods, dict):
        texts |= {f"method {n!r}": own.get("flags", "") for n, own in settings.methods.items()}
    for what, flags in texts.items():
        try:
            shlex.split(flags)
        except ValueError as error:
            raise UserError(f"{what}: {flags}: {str(error).lower()}") from None


def chosen_methods(chosen: list[str] | dict[str, dict[str, str]]) -> dict[str, Method]:
    """The methods of a plan by the names it gives them; raises UserError for an unknown one."""
    known, methods = known_methods(), {}
    for name in chosen:
        own = chosen[name] if isinstance(chosen, dict) else {}
        named = own.get("like") or name
        if named not in known:
            unknown = f"{named!r}{did_you_mean(named, list(known))}"
            raise UserError(
                f"unknown method {unknown} (known: {', '.join(known)}); a name of your own says in "
                f"a plan what it is: {name}: {{like: hald, flags: ...}}"
            )
        like = known[named]
        methods[name] = dataclasses.replace(like, flags=f"{like.flags} {own.get('flags', '')}")
    return methods


def slcs(settings: argparse.Namespace, ipc: int) -> list[int]:
    """The amounts of soft labels per class that are compared at an IPC."""
    return settings.slc or [count * ipc for count in settings.labels_per_image]


def stored_slc(settings: argparse.Namespace, ipc: int) -> int:
    """Soft labels per class of the label set of the views at an IPC."""
    pooled = any(method.pooled for method in settings.methods.values())
    return settings.label_slc or max(slcs(settings, ipc)) * (4 if pooled else 1)


def data_flags(settings: argparse.Namespace, ipc: int) -> list[str]:
    """The flags of relabel/generate.py and validate/train.py that say what the images are."""
    flags = ["--dataset", settings.dataset, "--data-dir", str(images_dir(settings, ipc))]
    for name in _CUSTOM:
        if (value := getattr(settings, name)) is not None:
            values = value if isinstance(value, (list, tuple)) else [value]
            flags += ["--" + name.replace("_", "-"), *map(str, values)]
    return flags


def images_dir(settings: argparse.Namespace, ipc: int) -> Path:
    """Folder of the distilled images of that IPC."""
    return Path(settings.data_dir.replace("{ipc}", str(ipc)))


def count_classes(settings: argparse.Namespace, ipc: int) -> int:
    """Number of classes: known of the data set, or the class folders of the distilled images."""
    return settings.facts.num_classes or len(_scan(images_dir(settings, ipc)).classes)


def top_k(classes: int) -> int:
    """The k of lpqld's labels."""
    return max(2, classes // 20)


def affordable_slc(slc: int, classes: int, topk: int, stored: int) -> int:
    """Top-k labels per class in the bytes of `slc` fp16 labels, at most `stored`.

    An fp16 label takes 2 bytes per class; a top-k label 2 bytes and a class index per logit.
    """
    bits = topk * (16 + (classes - 1).bit_length())
    return min(slc * (16 * classes // bits), stored)


def label_dir(settings: argparse.Namespace, ipc: int, suffix: str = "") -> Path:
    """Folder of the views' label set of that IPC, or with a suffix of one beside it."""
    main = settings.label_dir or f"{settings.out_dir}/labels/ipc{{ipc}}"
    return Path(main.replace("{ipc}", str(ipc)) + suffix)


def label_sets(
    settings: argparse.Namespace, ipc: int, labels: str
) -> dict[str, tuple[Path | None, str]]:
    """The label sets that a method is trained on, by what it reads (see Method.labels).

    Returns:
        By the codec's name the folder (None for no labels) and the flags of relabel/compress.py
        that make it of the views' label set ("": relabel/generate.py makes it).
    """
    if not labels:
        return {"": (None, "")}
    if labels in ("static", "auto"):
        return {"": (label_dir(settings, ipc, f"_{labels}"), "")}
    codecs = settings.codecs or {"": ""}
    if labels == "topk":
        k = top_k(count_classes(settings, ipc))
        codecs = {f"top{k}": f"--codec topk --topk {k}"}
    return {
        codec: (label_dir(settings, ipc, f"_{_slug(codec)}" if flags else ""), flags)
        for codec, flags in codecs.items()
    }


def label_tasks(settings: argparse.Namespace) -> list[Task]:
    """The label sets to be made for the methods, each after those it is made from.

    Without a teacher these are the recoded ones: the others must be there.

    Raises:
        UserError: one is missing and no teacher is named, or two would have the same folder.
    """
    reads = sorted({method.labels for method in settings.methods.values()})
    tasks: dict[str, Task] = {}

    def add(name: str, program: str, out: Path, flags: list[str]) -> None:
        command = [str(ROOT / program), *flags]
        task = Task(f"labels_{name}", command, out / "manifest.json", logs(settings), {})
        if tasks.setdefault(task.name, task).command != command:
            raise UserError(f"two label sets of the plan are both {task.name}: rename a codec")

    for ipc in settings.ipc:
        views = label_dir(settings, ipc)
        generated = {}
        if "views" in reads or "topk" in reads:
            generated["views"] = views, ["--slc", str(stored_slc(settings, ipc))]
        if "static" in reads:
            whole = ["--slc", str(ipc), "--mix", "none", "--min-scale", "1"]
            generated["static"] = label_dir(settings, ipc, "_static"), whole
        if "auto" in reads:
            chosen = ["--slc", str(stored_slc(settings, ipc)), "--recipe", "auto"]
            generated["auto"] = label_dir(settings, ipc, "_auto"), chosen
        for name, (out, amount) in generated.items():
            if settings.relabel:
                flags = [*data_flags(settings, ipc), *shlex.split(settings.relabel)]
                flags += ["--label-dir", str(out), *amount]
                add(f"{name}_ipc{ipc}", "relabel/generate.py", out, flags)
            elif not (out / "manifest.json").exists():
                raise UserError(
                    f"no label set at {out}: name the teacher that is to make it, "
                    '--relabel "--teacher NAME --teacher-weights FILE"'
                )
        for labels in reads:
            for codec, (out, compress) in label_sets(settings, ipc, labels).items():
                if compress:
                    flags = ["--label-dir", str(views), "--out-dir", str(out)]
                    flags += shlex.split(compress)
                    add(f"{_slug(codec)}_ipc{ipc}", "relabel/compress.py", out, flags)
    return list(tasks.values())


def logs(settings: argparse.Namespace) -> Path:
    """The folder with what the commands print, and which of them are done."""
    return Path(settings.out_dir) / "logs"


def run_tasks(settings: argparse.Namespace) -> list[Task]:
    """All runs of the plan: seed by seed, so that what is done first is a whole comparison."""
    tasks: dict[str, Task] = {}
    amounts = [(ipc, slc) for ipc in settings.ipc for slc in slcs(settings, ipc)]
    axes = (settings.seeds, settings.students, amounts, settings.methods)
    for seed, student, (ipc, slc), name in itertools.product(*axes):
        method = settings.methods[name]
        for codec, (labels, _) in label_sets(settings, ipc, method.labels).items():
            facts = {"method": name, "codec": codec, "slc": slc if method.counts_views else None}
            facts |= {"ipc": ipc, "student": student, "seed": seed}
            if not settings.codecs:
                del facts["codec"]
            task = run_task(settings, facts, labels)
            if tasks.setdefault(task.name, task).command != task.command:
                other = tasks[task.name].facts["method"]
                raise UserError(f"methods {name!r} and {other!r} are both {_slug(name)}")
    return list(tasks.values())


def run_task(settings: argparse.Namespace, facts: dict, labels: Path | None) -> Task:
    """The run with these facts (see Task; without an SLC where that changes nothing) on a set."""
    method, slc = settings.methods[facts["method"]], facts["slc"]
    parts = [_slug(facts["method"]), _slug(facts.get("codec", "")), f"slc{slc}" if slc else ""]
    student = re.sub(r"[^A-Za-z0-9]+", "-", facts["student"])
    parts += [f"ipc{facts['ipc']}", student, f"seed{facts['seed']}"]
    name = "_".join(filter(None, parts))
    folder = Path(settings.out_dir) / "runs" / name
    command = [str(ROOT / "validate/train.py"), *data_flags(settings, facts["ipc"])]
    command += ["--val-dir", settings.val_dir, "--output-dir", str(folder)]
    command += ["--model", facts["student"], "--seed", str(facts["seed"])]
    if method.labels == "topk":
        classes, stored = count_classes(settings, facts["ipc"]), stored_slc(settings, facts["ipc"])
        slc = affordable_slc(slc, classes, top_k(classes), stored)
    if slc:
        command += ["--slc", str(slc)]
    if labels:
        command += ["--label-dir", str(labels)]
    cells = [cell["flags"] for cell in settings.cells if in_cell(facts, cell)]
    command += shlex.split(" ".join([settings.flags, method.flags, *cells]))
    return Task(name, command, folder / runlog.RESULT, logs(settings), facts)


def in_cell(facts: dict, cell: dict) -> bool:
    """Whether a run with these facts is in a cell of the plan, and gets its flags."""
    known = tables.with_labels_per_image(facts)
    return all(known.get(name) == value for name, value in cell.items() if name != "flags")


def _slug(name: str) -> str:
    """The name of a method or codec as a part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name)


def collect(tasks: list[Task]) -> list[dict]:
    """A row of results for each finished run: accuracy in percent, bytes, seconds."""
    finished = [(task, read_json(task.done)) for task in tasks if task.is_done()]
    return [
        {
            "run": task.name,
            **task.facts,
            "best_top1": result["best"]["top1"],
            "best_top5": result["best"]["top5"],
            "best_epoch": result["best"]["epoch"],
            "last_top1": result["last"]["top1"],
            "last_top5": result["last"]["top5"],
            **{name: result[name] for name in ("label_bytes", "epochs", "seconds", "device")},
        }
        for task, result in finished
    ]


def main() -> None:
    settings = read_settings(sys.argv[1:])
    out = Path(settings.out_dir)
    labels, runs = label_tasks(settings), run_tasks(settings)
    if settings.estimate:
        print(estimate(settings, count_classes(settings, settings.ipc[0]), labels, runs))
        return
    checks.check_folders(settings, _FOLDERS)
    if settings.task is not None and settings.task >= len(runs):
        raise UserError(f"--task {settings.task}: the plan has runs 0 to {len(runs) - 1}")
    chosen = runs if settings.task is None else [runs[settings.task]]
    if settings.only == "list":
        for position, task in enumerate(runs):
            state = "done" if task.is_done() else "to do"
            print(f"{position} {task.name} ({state}): python {shlex.join(task.command)}")
        return
    slots = machine_slots(settings.jobs)
    failed, unchecked = [], []
    if settings.only != "collect":
        print(f"checking {len(labels)} label sets and {len(chosen)} runs", flush=True)
        for cell in settings.cells:
            if not any(in_cell(task.facts, cell) for task in runs):
                print(f"no run of the plan is in the cell {cell}")
        unchecked = checks.check(chosen + labels)
    # The tasks of a job array are side by side, and collecting disturbs nobody.
    alone = settings.task is None and settings.only != "collect"
    with lock(out, "running a sweep in") if alone else contextlib.nullcontext():
        if settings.only in (None, "labels"):
            failed = run_all(labels, slots[:1], "label sets")
        if not failed and settings.only in (None, "runs"):
            checks.check(unchecked, label_sets_made=True)
            failed = run_all(chosen, slots, "runs")
    if settings.only == "collect" or (settings.only is None and settings.task is None):
        rows = collect(runs)
        print(f"{len(rows)} of {len(runs)} runs of the plan are finished")
        if rows:
            tables.report(rows, out, settings.table)
        elif not failed:
            raise UserError(f"no run of the plan is finished in {out}")
    if failed:
        raise UserError(f"{len(failed)} failed, logs in {logs(settings)}: " + "; ".join(failed))


if __name__ == "__main__":
    cli.run(main)

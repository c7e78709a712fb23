"""Runs a whole comparison: methods x SLC x IPC x students x seeds, then table and plots.

bash scripts/run_sweep.sh --plan PLAN.yaml [--jobs N]
bash scripts/run_sweep.sh --dataset digits --data-dir 'D/ipc{ipc}' --val-dir V --out-dir O
    --methods hard soft hald balanced --slc 5 10 --ipc 5 --students ConvNetW32 --seeds 0 1 2
    --relabel "--teacher ConvNetW32 --teacher-weights W --no-bssl" -- --temperature 4

A plan file (YAML) holds the same settings under the same names, `data_dir` for --data-dir, and
`flags`, the flags of validate/train.py for every run. `methods` is a list of names of METHODS, or
a mapping from the user's own names to {like: NAME, flags: "..."}. Missing label sets are made with
the flags in `relabel`; stored once per IPC, they are shared by all runs. Finished runs are skipped
and stopped ones continued, so the same command may be stopped and repeated at any time.
"""

import sys
from pathlib import Path

if not __package__:  # run as a plain script: imports start at the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import dataclasses
import itertools
import re
import shlex

import yaml

from analysis.runner import Task, machine_slots, run_all
from analysis.tables import markdown, plot
from utils import cli, runlog
from utils.cli import UserError, bounded, did_you_mean
from utils.files import atomic_write, read_json
from utils.results import write_csv

ROOT = Path(__file__).resolve().parents[1]
CSV, TABLE, BY_SLC, BY_BYTES = "results.csv", "table.md", "top1_slc.png", "top1_bytes.png"


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to train a student.

    Attributes:
        flags: flags of validate/train.py.
        labels: the label set it reads: "views" (crops, as for HALD), "static" (whole images),
            "topk" (the views' labels, only their largest logits), or "" for none.
    """

    flags: str
    labels: str = "views"


METHODS = {
    "hard": Method("--schedule hard", ""),
    "soft": Method("--schedule soft"),
    "hald": Method("--schedule hald"),
    "balanced": Method("--schedule hald --soft-loss-scale T2"),
    "reset": Method("--schedule hald --reset-optimizer"),
    **{f"S{number}": Method(f"--schedule S{number}") for number in range(1, 9)},
    "joint": Method("--schedule joint --soft-loss-scale T2"),
    "static": Method("--schedule static", "static"),
    "lpld": Method("--schedule soft --slc-from random"),
    "lpqld": Method("--schedule soft --temperature 20 --temperature-end 4", "topk"),
}
_MORE_THAN_USED = {"lpld", "lpqld"}  # draw from a pool of more labels than they may store


@dataclasses.dataclass
class Settings:
    """What a plan file or the flags say; see `parse_arguments`."""

    dataset: str = ""
    data_dir: str = ""
    val_dir: str = ""
    out_dir: str = ""
    label_dir: str = ""
    methods: dict[str, dict] = dataclasses.field(default_factory=dict)
    slc: list[int] = dataclasses.field(default_factory=list)
    ipc: list[int] = dataclasses.field(default_factory=list)
    students: list[str] = dataclasses.field(default_factory=list)
    seeds: list[int] = dataclasses.field(default_factory=lambda: [0, 1, 2])
    label_slc: int | None = None
    topk: int | None = None
    relabel: str = ""
    flags: str = ""


def parse_arguments() -> argparse.Namespace:
    """The command line; flags of validate/train.py follow --."""
    parser = cli.Parser(description="Run a comparison of methods, then table and plots.")
    parser.add_argument("--plan", type=Path, help="YAML with the settings below; flags override it")
    plan = parser.add_argument_group("plan")
    plan.add_argument("--dataset", help="as for validate/train.py")
    plan.add_argument("--data-dir", help="distilled images; {ipc} stands for the IPC")
    plan.add_argument("--val-dir", help="validation images")
    plan.add_argument("--out-dir", help="gets runs, logs, results.csv, table.md and plots")
    plan.add_argument(
        "--label-dir", help="label sets, {ipc} as above (default: labels/ipc{ipc} in --out-dir)"
    )
    plan.add_argument("--methods", nargs="+", help=", ".join(METHODS))
    plan.add_argument(
        "--slc", nargs="+", type=bounded(int, 1), metavar="N", help="soft labels per class"
    )
    plan.add_argument(
        "--ipc", nargs="+", type=bounded(int, 1), metavar="N", help="distilled images per class"
    )
    plan.add_argument("--students", nargs="+", metavar="NAME", help="networks to train")
    plan.add_argument(
        "--seeds",
        nargs="+",
        type=bounded(int, 0),
        metavar="N",
        help="of the students (default: 0 1 2)",
    )
    plan.add_argument(
        "--label-slc",
        type=bounded(int, 1),
        metavar="N",
        help="SLC of the label sets (default: the largest --slc, four times that where lpld and "
        "lpqld choose among more than they store)",
    )
    plan.add_argument(
        "--topk", type=bounded(int, 1), metavar="K", help="of lpqld (default: classes / 20, >= 2)"
    )
    plan.add_argument("--relabel", help="flags of relabel/generate.py for label sets to be made")
    parser.add_argument(
        "--jobs",
        type=bounded(int, 1),
        metavar="N",
        help="runs side by side (default: one per visible GPU, one on a CPU)",
    )
    parser.add_argument(
        "--only",
        choices=("list", "labels", "runs", "collect"),
        help="list the runs; or make only label sets, only runs, only table and plots",
    )
    parser.add_argument(
        "--task",
        type=bounded(int, 0),
        metavar="N",
        help="only run N of --only list, for job arrays",
    )
    arguments = sys.argv[1:]
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    args = parser.parse_args(arguments[:cut])
    args.flags = shlex.join(arguments[cut + 1 :]) or None
    return args


def read_plan(path: Path, names: list[str]) -> dict:
    """What a plan file says; raises UserError when it is none, or names other settings."""
    try:
        found = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} must hold settings by name")
    for name in found:
        if name not in names:
            raise UserError(f"{path}: unknown {name!r}{did_you_mean(str(name), names)}")
    return found


def read_settings(args: argparse.Namespace) -> Settings:
    """The plan file's settings, overridden by the flags; raises UserError when some are wrong."""
    names = [field.name for field in dataclasses.fields(Settings)]
    found = read_plan(args.plan, names) if args.plan else {}
    given = vars(args)
    found |= {name: given[name] for name in names if given.get(name) is not None}
    needed = ("dataset", "data_dir", "val_dir", "out_dir", "methods", "slc", "ipc", "students")
    if missing := [name for name in needed if not found.get(name)]:
        flags = ", ".join("--" + name.replace("_", "-") for name in missing)
        raise UserError(f"the plan lacks {flags}")
    if len(found["ipc"]) > 1 and "{ipc}" not in found["data_dir"]:
        raise UserError("--data-dir must contain {ipc} where there is more than one --ipc")
    methods = found["methods"]
    if not isinstance(methods, dict):
        methods = dict.fromkeys(methods)
    found["methods"] = {
        name: {"like": name, "flags": "", **(given or {})} for name, given in methods.items()
    }
    for method in found["methods"].values():
        if method["like"] not in METHODS:
            close = did_you_mean(method["like"], list(METHODS))
            raise UserError(
                f"unknown method {method['like']!r}{close} (known: {', '.join(METHODS)})"
            )
    settings = Settings(**found)
    for ipc in settings.ipc:
        if wrong := [slc for slc in settings.slc if slc % ipc]:
            raise UserError(f"--slc {wrong[0]} is not a multiple of IPC {ipc}")
    if settings.label_slc is None:
        pooled = _MORE_THAN_USED & {method["like"] for method in settings.methods.values()}
        settings.label_slc = max(settings.slc) * (4 if pooled else 1)
    return settings


def label_dir(settings: Settings, ipc: int, labels: str) -> Path:
    """Folder of the label set of that IPC for "views", "static" or "topk"."""
    main = settings.label_dir or f"{settings.out_dir}/labels/ipc{{ipc}}"
    suffix = {"views": "", "static": "_static", "topk": f"_top{top_k(settings, ipc)}"}[labels]
    return Path(main.format(ipc=ipc) + suffix)


def count_classes(settings: Settings, ipc: int) -> int:
    """Number of class folders of the distilled images."""
    folder = Path(settings.data_dir.format(ipc=ipc))
    if not folder.is_dir():
        raise UserError(f"image folder not found: {folder}")
    return sum(entry.is_dir() and entry.name[0] != "." for entry in folder.iterdir())


def top_k(settings: Settings, ipc: int) -> int:
    """The k of lpqld's labels."""
    return settings.topk or max(2, count_classes(settings, ipc) // 20)


def affordable_slc(slc: int, classes: int, topk: int, stored: int) -> int:
    """Top-k labels per class in the bytes of `slc` fp16 labels, at most `stored`.

    An fp16 label takes 2 bytes per class; a top-k label 2 bytes and a class index per logit.
    """
    bits = topk * (16 + (classes - 1).bit_length())
    return min(slc * (16 * classes // bits), stored)


def label_tasks(settings: Settings) -> list[Task]:
    """The label sets that the methods read, each after those it is made from."""
    kinds = {METHODS[method["like"]].labels for method in settings.methods.values()}
    tasks = []
    for ipc in settings.ipc:
        views = label_dir(settings, ipc, "views")
        generate = [
            *(str(ROOT / "relabel/generate.py"), "--dataset", settings.dataset),
            *("--data-dir", settings.data_dir.format(ipc=ipc), *shlex.split(settings.relabel)),
        ]
        commands = {}
        if kinds & {"views", "topk"}:
            amount = ["--slc", str(settings.label_slc)]
            commands["views"] = [*generate, "--label-dir", str(views), *amount]
        if "static" in kinds:
            static = ["--label-dir", str(label_dir(settings, ipc, "static")), "--slc", str(ipc)]
            commands["static"] = [*generate, *static, "--mix", "none", "--min-scale", "1"]
        if "topk" in kinds:
            out = str(label_dir(settings, ipc, "topk"))
            commands["topk"] = [
                *(str(ROOT / "relabel/compress.py"), "--label-dir", str(views), "--out-dir", out),
                *("--codec", "topk", "--topk", str(top_k(settings, ipc))),
            ]
        for kind, command in commands.items():
            done = label_dir(settings, ipc, kind) / "manifest.json"
            if kind != "topk" and not settings.relabel and not done.exists():
                raise UserError(
                    f"no label set at {done.parent}: name the teacher that is to make it, "
                    '--relabel "--teacher NAME --teacher-weights FILE"'
                )
            name = f"labels_{kind}_ipc{ipc}"
            tasks.append(Task(name, command, done, record_of(settings, name), {}))
    return tasks


def record_of(settings: Settings, name: str) -> Path:
    """Where the command of a task is kept."""
    return Path(settings.out_dir) / "logs" / f"{name}.command"


def run_task(settings: Settings, seed: int, student: str, ipc: int, slc: int, name: str) -> Task:
    """The run of the method of that name; its facts lack the SLC where that changes nothing."""
    method, amount, more = METHODS[settings.methods[name]["like"]], slc, []
    if method.labels in ("", "static"):
        amount = None
    elif method.labels == "topk":
        classes, k = count_classes(settings, ipc), top_k(settings, ipc)
        more = ["--slc", str(affordable_slc(slc, classes, k, settings.label_slc))]
    else:
        more = ["--slc", str(slc)]
    if method.labels:
        more += ["--label-dir", str(label_dir(settings, ipc, method.labels))]
    parts = [_slug(name), *([f"slc{amount}"] if amount else []), f"ipc{ipc}"]
    run = "_".join([*parts, re.sub(r"[^A-Za-z0-9]+", "-", student), f"seed{seed}"])
    folder = Path(settings.out_dir) / "runs" / run
    command = [
        *(str(ROOT / "validate/train.py"), "--dataset", settings.dataset),
        *("--data-dir", settings.data_dir.format(ipc=ipc), "--val-dir", settings.val_dir),
        *("--output-dir", str(folder), "--model", student, "--seed", str(seed), *more),
        *shlex.split(settings.flags),
        *shlex.split(method.flags),
        *shlex.split(settings.methods[name]["flags"]),
    ]
    facts = {"method": name, "slc": amount, "ipc": ipc, "student": student, "seed": seed}
    return Task(run, command, folder / runlog.RESULT, record_of(settings, run), facts)


def _slug(name: str) -> str:
    """The name of a method as a part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name)


def run_tasks(settings: Settings) -> list[Task]:
    """All runs of the plan: seed by seed, so that what is done first is a whole comparison."""
    tasks: dict[str, Task] = {}
    axes = (settings.seeds, settings.students, settings.ipc, settings.slc, settings.methods)
    for seed, student, ipc, slc, name in itertools.product(*axes):
        task = run_task(settings, seed, student, ipc, slc, name)
        if tasks.setdefault(task.name, task).command != task.command:
            other = tasks[task.name].facts["method"]
            raise UserError(f"methods {name!r} and {other!r} are both {_slug(name)}")
    return list(tasks.values())


def collect(tasks: list[Task]) -> list[dict]:
    """A row of results for each finished run: top-1 in percent, bytes, seconds."""
    rows = []
    for task in tasks:
        if not task.is_done():
            continue
        result = read_json(task.done)
        rows.append(
            {
                **task.facts,
                "best_top1": result["best"]["top1"],
                "best_epoch": result["best"]["epoch"],
                "last_top1": result["last"]["top1"],
                "label_bytes": result["label_bytes"],
                "epochs": result["epochs"],
                "seconds": result["seconds"],
                "device": result["device"],
            }
        )
    return rows


def report(tasks: list[Task], rows: list[dict], out: Path) -> None:
    """Writes results.csv, the table and both plots of the finished runs; prints the table."""
    out.mkdir(parents=True, exist_ok=True)
    write_csv(rows, out / CSV)
    table = markdown(rows)
    atomic_write(out / TABLE, table.encode())
    plot(rows, "slc", out / BY_SLC)
    plot(rows, "label_bytes", out / BY_BYTES)
    print(f"{table}{len(rows)} of {len(tasks)} runs: {out / CSV}, {TABLE}, {BY_SLC}, {BY_BYTES}")


def main() -> None:
    args = parse_arguments()
    settings = read_settings(args)
    out = Path(settings.out_dir)
    labels, runs = label_tasks(settings), run_tasks(settings)
    if args.task is not None:
        if args.task >= len(runs):
            raise UserError(f"--task {args.task}: the plan has runs 0 to {len(runs) - 1}")
        chosen = runs[args.task : args.task + 1]
    else:
        chosen = runs
    if args.only == "list":
        for number, task in enumerate(runs):
            state = "done" if task.is_done() else "to do"
            print(f"{number} {task.name} ({state}): python {shlex.join(task.command)}")
        return
    slots = machine_slots(args.jobs)
    failed = []
    if args.only in (None, "labels"):
        failed = run_all(labels, slots[:1], out / "logs", "label sets")
    if not failed and args.only in (None, "runs"):
        failed = run_all(chosen, slots, out / "logs", "runs")
    if args.only == "collect" or (args.only is None and args.task is None):
        rows = collect(runs)
        if rows:
            report(runs, rows, out)
        elif not failed:
            raise UserError(f"no run of the plan is finished in {out}")
    if failed:
        raise UserError(f"{len(failed)} failed, logs in {out / 'logs'}: " + "; ".join(failed))


if __name__ == "__main__":
    cli.run(main)

"""Runs a whole comparison: methods x codecs x SLC x IPC x students x seeds, then table and plots.

bash scripts/run_sweep.sh --plan PLAN.yaml [--jobs N]
bash scripts/run_sweep.sh --dataset digits --data-dir 'D/ipc{ipc}' --val-dir V --out-dir O
    --methods hard soft hald balanced --slc 5 10 --ipc 5 --students ConvNetW32 --seeds 0 1 2
    --relabel "--teacher ConvNetW32 --teacher-weights W --no-bssl" -- --temperature 4

A plan file (YAML) holds the same settings under the same names, `data_dir` for --data-dir, and
`flags`, the flags of validate/train.py for every run. `methods` is a list of names of METHODS, or
a mapping from the user's own names to {like: NAME, flags: "..."}. `codecs` maps names to flags of
relabel/compress.py ("": labels as they were made): methods that read labels of views are trained
on each. Missing label sets are made with the flags in `relabel`; stored once per IPC, they are
shared by all runs. Finished runs are skipped and stopped ones continued, so the same command may
be stopped and repeated at any time.
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
    **{f"S{variant}": Method(f"--schedule S{variant}") for variant in range(1, 9)},
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
    codecs: dict[str, str] = dataclasses.field(default_factory=dict)
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
    count = {"type": bounded(int, 1), "metavar": "N"}
    plan = parser.add_argument_group("plan")
    plan.add_argument("--dataset", help="as for validate/train.py")
    plan.add_argument("--data-dir", help="distilled images; {ipc} stands for the IPC")
    plan.add_argument("--val-dir", help="validation images")
    plan.add_argument("--out-dir", help="gets runs, logs, results.csv, table.md and plots")
    where = "label sets, {ipc} as above (default: labels/ipc{ipc} in --out-dir)"
    plan.add_argument("--label-dir", help=where)
    plan.add_argument("--methods", nargs="+", help=", ".join(METHODS))
    plan.add_argument("--slc", nargs="+", **count, help="soft labels per class")
    plan.add_argument("--ipc", nargs="+", **count, help="distilled images per class")
    plan.add_argument("--students", nargs="+", metavar="NAME", help="networks to train")
    seeds = "of the students (default: 0 1 2)"
    plan.add_argument("--seeds", nargs="+", type=bounded(int, 0), metavar="N", help=seeds)
    label_slc = (
        "SLC of the label sets (default: the largest --slc, four times that where lpld and lpqld "
        "choose among more than they store)"
    )
    plan.add_argument("--label-slc", **count, help=label_slc)
    plan.add_argument("--topk", **count, help="logits of lpqld (default: classes / 20, >= 2)")
    plan.add_argument("--relabel", help="flags of relabel/generate.py for label sets to be made")
    jobs = "runs side by side (default: one per visible GPU, one on a CPU)"
    parser.add_argument("--jobs", **count, help=jobs)
    only = "list the runs; or make only label sets, only runs, only table and plots"
    parser.add_argument("--only", choices=("list", "labels", "runs", "collect"), help=only)
    task = "only run N of --only list, for job arrays"
    parser.add_argument("--task", type=bounded(int, 0), metavar="N", help=task)
    arguments = sys.argv[1:]
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    args = parser.parse_args(arguments[:cut])
    args.flags = shlex.join(arguments[cut + 1 :]) or None
    return args


def read_plan(path: Path, names: list[str]) -> dict:
    """What a plan file says; raises UserError when it is none, or names other settings."""
    try:
        plan = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(plan, dict):
        raise UserError(f"{path} must hold settings by name")
    for name in plan:
        if name not in names:
            raise UserError(f"{path}: unknown {name!r}{did_you_mean(str(name), names)}")
    if not isinstance(plan.get("codecs") or {}, dict):
        raise UserError(f"{path}: codecs must be names, each with flags of relabel/compress.py")
    return plan


def read_settings(args: argparse.Namespace) -> Settings:
    """The plan file's settings, overridden by the flags; raises UserError when some are wrong."""
    names = [field.name for field in dataclasses.fields(Settings)]
    plan = read_plan(args.plan, names) if args.plan else {}
    given = vars(args)
    plan |= {name: given[name] for name in names if given.get(name) is not None}
    needed = ("dataset", "data_dir", "val_dir", "out_dir", "methods", "slc", "ipc", "students")
    if missing := [name for name in needed if not plan.get(name)]:
        flags = ", ".join("--" + name.replace("_", "-") for name in missing)
        raise UserError(f"the plan lacks {flags}")
    if len(plan["ipc"]) > 1 and "{ipc}" not in plan["data_dir"]:
        raise UserError("--data-dir must contain {ipc} where there is more than one --ipc")
    methods = plan["methods"]
    if not isinstance(methods, dict):
        methods = dict.fromkeys(methods)
    plan["methods"] = {
        name: {"like": name, "flags": "", **(own or {})} for name, own in methods.items()
    }
    for method in plan["methods"].values():
        if method["like"] not in METHODS:
            unknown = f"{method['like']!r}{did_you_mean(method['like'], list(METHODS))}"
            raise UserError(f"unknown method {unknown} (known: {', '.join(METHODS)})")
    plan["codecs"] = {str(name): flags or "" for name, flags in (plan.get("codecs") or {}).items()}
    settings = Settings(**plan)
    for ipc in settings.ipc:
        if wrong := [slc for slc in settings.slc if slc % ipc]:
            raise UserError(f"--slc {wrong[0]} is not a multiple of IPC {ipc}")
    if settings.label_slc is None:
        pooled = _MORE_THAN_USED & {method["like"] for method in settings.methods.values()}
        settings.label_slc = max(settings.slc) * (4 if pooled else 1)
    return settings


def label_dir(settings: Settings, ipc: int, suffix: str = "") -> Path:
    """Folder of the views' label set of that IPC, or with a suffix of one beside it."""
    main = settings.label_dir or f"{settings.out_dir}/labels/ipc{{ipc}}"
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


def codecs_of(settings: Settings, ipc: int, labels: str) -> dict[str, str]:
    """The codecs that a method is trained on, by what it reads (see Method.labels).

    Returns:
        Flags of relabel/compress.py by the codec's name; "" for labels as they were generated.
    """
    if labels == "topk":
        k = top_k(settings, ipc)
        return {f"top{k}": f"--codec topk --topk {k}"}
    return settings.codecs if labels == "views" and settings.codecs else {"": ""}


def label_tasks(settings: Settings) -> list[Task]:
    """The label sets that the methods read, each after those it is made from.

    Raises:
        UserError: one is missing and no teacher is named, or two would have the same folder.
    """
    reads = {METHODS[method["like"]].labels for method in settings.methods.values()}
    tasks: dict[str, Task] = {}

    def add(name: str, command: list[str], folder: Path) -> None:
        name = f"labels_{name}"
        task = Task(name, command, folder / "manifest.json", record_of(settings, name), {})
        if tasks.setdefault(name, task).command != command:
            raise UserError(f"two label sets of the plan are both {name}: rename a codec")

    for ipc in settings.ipc:
        generate = [str(ROOT / "relabel/generate.py"), "--dataset", settings.dataset]
        generate += ["--data-dir", settings.data_dir.format(ipc=ipc)]
        generate += shlex.split(settings.relabel)
        views, static = label_dir(settings, ipc), label_dir(settings, ipc, "_static")
        if reads & {"views", "topk"}:
            amount = ["--slc", str(settings.label_slc)]
            add(f"views_ipc{ipc}", [*generate, "--label-dir", str(views), *amount], views)
        if "static" in reads:
            whole = ["--slc", str(ipc), "--mix", "none", "--min-scale", "1"]
            add(f"static_ipc{ipc}", [*generate, "--label-dir", str(static), *whole], static)
    missing = [task.done.parent for task in tasks.values() if not task.done.exists()]
    if missing and not settings.relabel:
        raise UserError(
            f"no label set at {missing[0]}: name the teacher that is to make it, "
            '--relabel "--teacher NAME --teacher-weights FILE"'
        )
    for ipc, labels in itertools.product(settings.ipc, sorted(reads)):
        for codec, flags in codecs_of(settings, ipc, labels).items():
            if flags:
                views, out = label_dir(settings, ipc), label_dir(settings, ipc, f"_{_slug(codec)}")
                command = [str(ROOT / "relabel/compress.py"), "--label-dir", str(views)]
                command += ["--out-dir", str(out), *shlex.split(flags)]
                add(f"{_slug(codec)}_ipc{ipc}", command, out)
    return list(tasks.values())


def record_of(settings: Settings, name: str) -> Path:
    """Where the command of a task is kept."""
    return Path(settings.out_dir) / "logs" / f"{name}.command"


def run_task(
    settings: Settings, *, seed: int, student: str, ipc: int, slc: int, method: str, codec: str
) -> Task:
    """The run of that method of the plan, on one of `codecs_of` what it reads.

    Its facts lack the SLC where that changes nothing, and the codec where the plan names none.
    """
    like = METHODS[settings.methods[method]["like"]]
    amount = slc if like.labels in ("views", "topk") else None
    more = []
    if like.labels == "topk":
        classes, k = count_classes(settings, ipc), top_k(settings, ipc)
        more = ["--slc", str(affordable_slc(slc, classes, k, settings.label_slc))]
    elif like.labels == "views":
        more = ["--slc", str(slc)]
    if like.labels:
        compressed = codecs_of(settings, ipc, like.labels)[codec] != ""
        suffix = "_static" if like.labels == "static" else f"_{_slug(codec)}" * compressed
        more += ["--label-dir", str(label_dir(settings, ipc, suffix))]
    shown = {"codec": codec} if settings.codecs else {}
    parts = [_slug(method), *(_slug(name) for name in shown.values() if name)]
    parts += [f"slc{amount}"] if amount else []
    parts += [f"ipc{ipc}", re.sub(r"[^A-Za-z0-9]+", "-", student), f"seed{seed}"]
    run = "_".join(parts)
    folder = Path(settings.out_dir) / "runs" / run
    command = [str(ROOT / "validate/train.py"), "--dataset", settings.dataset]
    command += ["--data-dir", settings.data_dir.format(ipc=ipc), "--val-dir", settings.val_dir]
    command += ["--output-dir", str(folder), "--model", student, "--seed", str(seed), *more]
    for flags in (settings.flags, like.flags, settings.methods[method]["flags"]):
        command += shlex.split(flags)
    facts = {"method": method, **shown, "slc": amount, "ipc": ipc, "student": student, "seed": seed}
    return Task(run, command, folder / runlog.RESULT, record_of(settings, run), facts)


def _slug(name: str) -> str:
    """The name of a method or codec as a part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name)


def run_tasks(settings: Settings) -> list[Task]:
    """All runs of the plan: seed by seed, so that what is done first is a whole comparison."""
    tasks: dict[str, Task] = {}
    axes = (settings.seeds, settings.students, settings.ipc, settings.slc, settings.methods)
    for seed, student, ipc, slc, method in itertools.product(*axes):
        for codec in codecs_of(settings, ipc, METHODS[settings.methods[method]["like"]].labels):
            task = run_task(
                settings, seed=seed, student=student, ipc=ipc, slc=slc, method=method, codec=codec
            )
            if tasks.setdefault(task.name, task).command != task.command:
                other = tasks[task.name].facts["method"]
                raise UserError(f"methods {method!r} and {other!r} are both {_slug(method)}")
    return list(tasks.values())


def collect(tasks: list[Task]) -> list[dict]:
    """A row of results for each finished run: top-1 in percent, bytes, seconds."""
    finished = [(task.facts, read_json(task.done)) for task in tasks if task.is_done()]
    return [
        {
            **facts,
            "best_top1": result["best"]["top1"],
            "best_epoch": result["best"]["epoch"],
            "last_top1": result["last"]["top1"],
            "label_bytes": result["label_bytes"],
            "epochs": result["epochs"],
            "seconds": result["seconds"],
            "device": result["device"],
        }
        for facts, result in finished
    ]


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
    if args.task is not None and args.task >= len(runs):
        raise UserError(f"--task {args.task}: the plan has runs 0 to {len(runs) - 1}")
    chosen = runs if args.task is None else [runs[args.task]]
    if args.only == "list":
        for position, task in enumerate(runs):
            state = "done" if task.is_done() else "to do"
            print(f"{position} {task.name} ({state}): python {shlex.join(task.command)}")
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

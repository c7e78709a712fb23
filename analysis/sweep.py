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
import csv
import ctypes
import dataclasses
import datetime
import io
import itertools
import os
import platform
import re
import shlex
import signal
import statistics
import subprocess
import time
from collections.abc import Callable

import torch
import yaml
from matplotlib.figure import Figure

from analysis.compare import mean_std
from utils import cli, runlog
from utils.cli import UserError, bounded, did_you_mean
from utils.files import atomic_write, read_json

_POLL_SECONDS = 0.2
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


@dataclasses.dataclass(frozen=True)
class Task:
    """A command of the plan: a label set or a run.

    Attributes:
        name: of its log, and of its run folder.
        command: arguments after `python`.
        done: a file that is there once it has been done.
        record: keeps the command that did it.
        facts: method, slc, ipc, student and seed of a run.
    """

    name: str
    command: list[str]
    done: Path
    record: Path
    facts: dict

    def is_done(self) -> bool:
        """Whether it has been done with these flags; with others, its command is to say so."""
        recorded = self.record.read_text() if self.record.exists() else self.text()
        return self.done.exists() and recorded == self.text()

    def text(self) -> str:
        """The command, but for the place of this repository."""
        return shlex.join(self.command[1:]) + "\n"


def parse_arguments() -> argparse.Namespace:
    """The command line; flags of validate/train.py follow --."""
    parser = cli.Parser(description="Run a comparison of methods, then table and plots.")
    parser.add_argument("--plan", type=Path, help="YAML with the settings below; flags override it")
    plan = parser.add_argument_group("plan")
    plan.add_argument("--dataset")
    plan.add_argument("--data-dir", help="distilled images; {ipc} stands for the IPC")
    plan.add_argument("--val-dir")
    plan.add_argument("--out-dir", help="gets runs, logs, results.csv, table.md and plots")
    plan.add_argument(
        "--label-dir", help="label sets, {ipc} as above (default: labels/ipc{ipc} in --out-dir)"
    )
    plan.add_argument("--methods", nargs="+", help=", ".join(METHODS))
    plan.add_argument("--slc", nargs="+", type=bounded(int, 1), metavar="N")
    plan.add_argument("--ipc", nargs="+", type=bounded(int, 1), metavar="N")
    plan.add_argument("--students", nargs="+", metavar="NAME")
    plan.add_argument("--seeds", nargs="+", type=bounded(int, 0), metavar="N")
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


def read_settings(args: argparse.Namespace) -> Settings:
    """The plan file's settings, overridden by the flags; raises UserError when some are wrong."""
    names = [field.name for field in dataclasses.fields(Settings)]
    found = {}
    if args.plan is not None:
        try:
            found = yaml.safe_load(args.plan.read_text()) or {}
        except yaml.YAMLError as error:
            raise UserError(f"{args.plan} is not YAML: {' '.join(str(error).split())}") from None
        if not isinstance(found, dict):
            raise UserError(f"{args.plan} must hold settings by name")
        for name in found:
            if name not in names:
                raise UserError(f"{args.plan}: unknown {name!r}{did_you_mean(str(name), names)}")
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


def run_tasks(settings: Settings) -> list[Task]:
    """All runs of the plan: seed by seed, so that what is done first is a whole comparison."""
    tasks: dict[str, Task] = {}
    grid = [
        (seed, student, ipc, slc, name)
        for seed in settings.seeds
        for student in settings.students
        for ipc in settings.ipc
        for slc in settings.slc
        for name in settings.methods
    ]
    for seed, student, ipc, slc, name in grid:
        method = METHODS[settings.methods[name]["like"]]
        amount, more = slc, []
        if method.labels in ("", "static"):
            amount = None  # the same run whatever the SLC
        elif method.labels == "topk":
            classes, k = count_classes(settings, ipc), top_k(settings, ipc)
            more = ["--slc", str(affordable_slc(slc, classes, k, settings.label_slc))]
        else:
            more = ["--slc", str(slc)]
        if method.labels:
            more += ["--label-dir", str(label_dir(settings, ipc, method.labels))]
        slug = re.sub(r"[^A-Za-z0-9.]+", "-", name)
        parts = [slug, *([f"slc{amount}"] if amount else []), f"ipc{ipc}"]
        parts += [re.sub(r"[^A-Za-z0-9]+", "-", student), f"seed{seed}"]
        run = "_".join(parts)
        folder = Path(settings.out_dir) / "runs" / run
        task = Task(
            run,
            [
                *(str(ROOT / "validate/train.py"), "--dataset", settings.dataset),
                *("--data-dir", settings.data_dir.format(ipc=ipc), "--val-dir", settings.val_dir),
                *("--output-dir", str(folder), "--model", student, "--seed", str(seed), *more),
                *shlex.split(settings.flags),
                *shlex.split(method.flags),
                *shlex.split(settings.methods[name]["flags"]),
            ],
            folder / runlog.RESULT,
            record_of(settings, run),
            {"method": name, "slc": amount, "ipc": ipc, "student": student, "seed": seed},
        )
        if tasks.setdefault(run, task).command != task.command:
            raise UserError(f"methods {name!r} and {tasks[run].facts['method']!r} are both {slug}")
    return list(tasks.values())


def machine_slots(jobs: int | None) -> list[dict[str, str]]:
    """Environments of the runs side by side: a GPU each in turn, or a share of the cores each."""
    gpus = torch.cuda.device_count()
    if gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus))))
        names = itertools.cycle(visible.split(","))
        return [{"CUDA_VISIBLE_DEVICES": next(names)} for _ in range(jobs or gpus)]
    if "OMP_NUM_THREADS" in os.environ or not jobs:
        return [{}] * (jobs or 1)
    return [{"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // jobs))}] * jobs


def _die_with_parent() -> None:
    """In a new process: SIGTERM when the planner ends, however it ends (Linux)."""
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


class Worker:
    """Starts tasks in one slot of the machine, one at a time."""

    def __init__(self, environment: dict[str, str], logs: Path):
        self.environment, self.logs = environment, logs
        self.task: Task | None = None

    def start(self, task: Task) -> None:
        """Starts a task; what it prints goes to its log."""
        self.task = task
        with (self.logs / f"{task.name}.log").open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, *task.command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment},
                preexec_fn=_die_with_parent,
            )

    def finished(self) -> bool:
        """Whether it has ended."""
        return self.process.poll() is not None

    def last_words(self) -> str:
        """The last line of the task's log."""
        text = (self.logs / f"{self.task.name}.log").read_text(errors="replace")
        lines = [line for line in re.split(r"[\r\n]+", text) if line.strip()]
        return lines[-1] if lines else "no output"

    def stop(self) -> None:
        """Ends the task, which saves first; the same command continues."""
        self.process.terminate()
        self.process.wait()


def run_all(tasks: list[Task], slots: list[dict[str, str]], logs: Path, what: str) -> list[str]:
    """Runs the tasks that are not done, as many at a time as there are slots.

    Returns:
        A line for each task that failed; the others were not kept from running.
    """
    logs.mkdir(parents=True, exist_ok=True)
    waiting = [task for task in tasks if not task.is_done()]
    workers = [Worker(slot, logs) for slot in slots]
    failed = []
    bar = cli.progress(total=len(tasks), initial=len(tasks) - len(waiting), desc=what, unit="run")
    try:
        while waiting or any(worker.task for worker in workers):
            for worker in workers:
                if worker.task and worker.finished():
                    if worker.process.returncode:
                        failed.append(f"{worker.task.name}: {worker.last_words()}")
                    else:
                        atomic_write(worker.task.record, worker.task.text().encode())
                    bar.update()
                    worker.task = None
                if not worker.task and waiting:
                    worker.start(waiting.pop(0))
            running = [describe(worker.task) for worker in workers if worker.task]
            text = ", ".join(running) + f", {len(failed)} failed" * bool(failed)
            bar.set_postfix_str(text, refresh=False)
            bar.update(0)
            time.sleep(_POLL_SECONDS)
    finally:
        for worker in workers:
            if worker.task:
                worker.stop()
        bar.close()
    return failed


def describe(task: Task) -> str:
    """Its name, and the epoch that a run has reached."""
    log = task.done.with_name(runlog.LOG)
    epoch = log.read_bytes().count(b"\n") if log.exists() else 0
    return f"{task.name} (epoch {epoch})" if task.facts else task.name


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


def provenance(command: str) -> str:
    """When, on what machine and by which command something is measured; for `write_csv`."""
    machine = f"{len(os.sched_getaffinity(0))}-core {platform.machine()}"
    if torch.cuda.is_available():
        machine = torch.cuda.get_device_name()
    return f"{datetime.date.today()}; {machine}; torch {torch.__version__}; {command}"


def this_command() -> str:
    """The command line of the running entry script."""
    return shlex.join(["python", f"analysis/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def write_csv(rows: list[dict], path: Path, about: str = "") -> None:
    """The rows as comma-separated values under a header, and under a comment where there is one."""
    text = io.StringIO()
    if about:
        text.write(f"# {about}\n")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(path, text.getvalue().encode())


def read_csv(path: Path) -> list[dict]:
    """Rows that `write_csv` wrote; numbers as numbers, an empty SLC as None."""
    kinds: dict[str, Callable] = dict.fromkeys(("best_top1", "last_top1", "seconds"), float)
    kinds |= dict.fromkeys(("ipc", "seed", "best_epoch", "label_bytes", "epochs"), int)
    kinds["slc"] = lambda text: int(text) if text else None
    with path.open(newline="") as file:
        return [
            {name: kinds.get(name, str)(value) for name, value in row.items()}
            for row in csv.DictReader(line for line in file if not line.startswith("#"))
        ]


def grouped(rows: list[dict]) -> dict[tuple, list[dict]]:
    """Rows by (student, ipc, method, slc): what differs within a group is the seed."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        key = (row["student"], row["ipc"], row["method"], row["slc"])
        groups.setdefault(key, []).append(row)
    return groups


def markdown(rows: list[dict]) -> str:
    """The table: mean ± sample standard deviation over seeds of best and last top-1."""
    lines = [
        "| student | IPC | method | SLC | label bytes | best top-1 (%) | last top-1 (%) | seeds |",
        "|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for (student, ipc, method, slc), group in grouped(rows).items():
        best, last = (mean_std([row[name] for row in group]) for name in ("best_top1", "last_top1"))
        size = round(statistics.mean(row["label_bytes"] for row in group))
        lines.append(
            f"| {student} | {ipc} | {method} | {slc or '–'} | {size:,} | {best} | {last} "
            f"| {len(group)} |"
        )
    return "\n".join(lines) + "\n"


def _point(group: list[dict]) -> tuple[float, float]:
    """Mean and sample standard deviation of a group's last top-1."""
    values = [row["last_top1"] for row in group]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def plot(rows: list[dict], against: str, path: Path) -> None:
    """Last top-1 against "slc" or "label_bytes": a panel per student and IPC, a line per method.

    Methods whose labels do not depend on the SLC are level lines with their spread shaded when
    drawn against SLC; so is, against bytes, what needs none.
    """
    groups = grouped(rows)
    panels = list(dict.fromkeys(key[:2] for key in groups))
    methods = list(dict.fromkeys(key[2] for key in groups))
    figure = Figure(figsize=(max(7.5, 6.2 * len(panels)), 5.2), layout="constrained")
    for axes, panel in zip(
        figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True
    ):
        for place, method in enumerate(methods):
            style = {"color": f"C{place % 10}", "marker": "osD^vP*X<>"[place % 10]}
            points = [
                (group[0][against] or 0, *_point(group))
                for key, group in groups.items()
                if key[:2] == panel and key[2] == method
            ]
            if not points:
                continue
            if all(x == 0 for x, _, _ in points):
                _, mean, spread = points[0]
                stores = any(row["label_bytes"] for row in rows if row["method"] == method)
                note = "one label per image" if stores else "no soft label"
                axes.axhline(mean, color=style["color"], ls="--", label=f"{method} ({note})")
                axes.axhspan(mean - spread, mean + spread, color=style["color"], alpha=0.1, lw=0)
                continue
            # Side by side, so that error bars of neighbours can be told apart.
            shift = 1.012 ** (place - len(methods) / 2)
            xs, means, spreads = zip(*sorted(points), strict=True)
            shifted = [x * shift for x in xs]
            axes.errorbar(shifted, means, spreads, capsize=3, lw=1.2, ms=5, label=method, **style)
        axes.set_xscale("log", base=2 if against == "slc" else 10)
        amounts = sorted({row[against] for row in rows if row[against]})
        if against == "slc":
            axes.set_xticks(amounts, [str(amount) for amount in amounts])
            axes.set_xlabel("soft labels per class (SLC; storage of so many fp16 labels)")
        else:
            low, high = min(amounts, default=1), max(amounts, default=1)
            axes.set_xlim(low / 1.3, high * 1.3)
            ticks = _round_ticks(low, high)
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.set_xlabel("soft labels on disk (bytes)")
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.set_title(f"{panel[0]}, {panel[1]} images per class", fontsize=10)
    seeds = max(len(group) for group in groups.values())
    figure.axes[0].set_ylabel("last validation top-1 (%)")
    note = "points at the same place are drawn side by side"
    figure.suptitle(f"mean ± standard deviation over {seeds} seeds; {note}", fontsize=10)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right", fontsize=8)
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=120))


def _round_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten, around the range."""
    ticks = [digit * 10**power for power in range(16) for digit in (1, 2, 5)]
    return [tick for tick in ticks if low / 1.3 <= tick <= high * 1.3] or [low]


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

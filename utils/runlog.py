"""The run folder: arguments, a line per epoch, checkpoint, result and curves."""

import contextlib
import json
import subprocess
from pathlib import Path

import yaml

from utils.cli import UserError
from utils.files import (
    atomic_write,
    is_unused,
    load_tensors,
    lock,
    read_json,
    save_png,
    save_tensors,
    to_json,
)
from utils.labels import first_difference
from utils.loggers import Logger, Opener
from utils.runtime import versions

ARGUMENTS, LOG, CHECKPOINT, BEST = "args.yaml", "log.jsonl", "checkpoint.pt", "best.pt"
RESULT, CURVES = "result.json", "curves.png"


class RunFolder:
    """One training run on disk; the same settings continue it, others are refused."""

    def __init__(self, path: Path, settings: dict, others: dict):
        """Prepares a run; nothing is written before `begin`.

        Args:
            path: the folder.
            settings: what decides the result; must agree with an earlier start of this run.
            others: further arguments, recorded only.

        Raises:
            UserError: the folder holds something else, or a run with other settings.
        """
        self.path, self.settings, self.others = Path(path), settings, others
        self.openers: list[Opener] = []
        self.loggers: list[Logger] = []
        recorded = self.path / ARGUMENTS
        if recorded.exists():
            try:
                earlier = yaml.safe_load(recorded.read_text())["settings"]
            except (yaml.YAMLError, KeyError, TypeError):
                raise UserError(f"{recorded} is damaged; choose another --output-dir") from None
            if difference := first_difference(settings, earlier):
                raise UserError(
                    f"{self.path} holds a run with other settings ({difference}); choose another "
                    "--output-dir or the same settings"
                )
        elif not is_unused(self.path):
            raise UserError(f"{self.path} is not empty and not a run; choose another --output-dir")

    def result(self) -> dict | None:
        """The result of a finished run, else None."""
        path = self.path / RESULT
        return read_json(path) if path.exists() else None

    @property
    def started(self) -> bool:
        """Whether there is something to continue."""
        return (self.path / ARGUMENTS).exists()

    @property
    def has_checkpoint(self) -> bool:
        """Whether a checkpoint has been written."""
        return (self.path / CHECKPOINT).exists()

    def checkpoint(self) -> dict | None:
        """The last checkpoint, else None."""
        path = self.path / CHECKPOINT
        return load_tensors(path, "checkpoint") if self.has_checkpoint else None

    def locked(self) -> contextlib.AbstractContextManager:
        """Keeps a second process out of the folder; raises UserError when one has it."""
        return lock(self.path, "training in")

    def begin(self, epochs_done: int) -> None:
        """Records the arguments, and drops log lines after the checkpoint."""
        record = {
            "settings": self.settings,
            "others": self.others,
            "versions": versions(),
            "git_commit": git_commit(),
        }
        if not self.started:
            atomic_write(self.path / ARGUMENTS, yaml.safe_dump(record, sort_keys=False).encode())
        kept = [line for line in self.log_lines() if line["epoch"] <= epochs_done]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        atomic_write(self.path / LOG, text.encode())
        self.loggers = [start(self.path, self.settings, epochs_done) for start in self.openers]

    def log(self, line: dict) -> None:
        """Appends one epoch to log.jsonl, and tells the loggers."""
        with (self.path / LOG).open("a") as file:
            file.write(json.dumps(line) + "\n")
        for logger in self.loggers:
            logger(line)

    def log_lines(self) -> list[dict]:
        """The epochs logged so far; a line that was cut off by a kill is left out."""
        path = self.path / LOG
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        try:
            return [json.loads(line) for line in lines if line.endswith("\n")]
        except ValueError as error:
            raise UserError(f"{path} is damaged ({error}); move it away to go on") from None

    def save(self, name: str, state: dict) -> None:
        """Writes CHECKPOINT or BEST."""
        save_tensors(self.path / name, state)

    def finish(self, result: dict) -> None:
        """Draws the curves and writes the result, which marks the run as done."""
        plot_curves(self.log_lines(), result, self.path / CURVES)
        atomic_write(self.path / RESULT, to_json(result))


def git_commit() -> str | None:
    """The commit of this code, with "+" when files differ from it; None outside a git clone."""
    root = Path(__file__).resolve().parents[1]
    try:
        commit, changes = (
            subprocess.run(
                ["git", "-C", str(root), *command], capture_output=True, text=True, check=True
            ).stdout.strip()
            for command in (
                ["rev-parse", "HEAD"],
                ["status", "--porcelain", "--untracked-files=no"],
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + "+" * bool(changes)


def shade_phases(axes, kinds: list[str]) -> None:
    """Shades the phases, by the kind of their epochs, behind a plot over epochs."""
    colours = {"soft": "#cfe3f5", "hard": "#f9dcc4", "joint": "#d8f0d3", "static": "#e6dbf2"}
    start = 0
    for end in range(1, len(kinds) + 1):
        if end == len(kinds) or kinds[end] != kinds[start]:
            axes.axvspan(start, end, color=colours[kinds[start]], lw=0, zorder=0)
            start = end
    handles = [
        axes.fill_between([], [], color=colours[kind], label=f"{kind} labels")
        for kind in dict.fromkeys(kinds)
    ]
    axes.legend(handles=handles + axes.get_lines(), loc="best", fontsize=8)
    axes.set_xlim(0, len(kinds))


def plot_curves(lines: list[dict], result: dict, path: Path) -> None:
    """Draws accuracy and training loss over epochs, phases shaded, as PNG."""
    from matplotlib.figure import Figure

    epochs = [line["epoch"] for line in lines]
    kinds = [line["kind"] for line in lines]
    evaluated = [line for line in lines if "val_top1" in line]
    figure = Figure(figsize=(8, 6), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True)
    validated = [line["epoch"] for line in evaluated]
    upper.plot(validated, [line["val_top1"] for line in evaluated], "k.-", label="validation")
    upper.plot(epochs, [line["train_top1"] for line in lines], "C7", lw=0.8, label="training views")
    upper.set_ylabel("top-1 accuracy (%)")
    upper.set_title(
        f"{result['model']} on {result['dataset']}: best {result['best']['top1']:.2f} %, "
        f"last {result['last']['top1']:.2f} %"
    )
    for kind, style in (("soft", "C0"), ("hard", "C1"), ("joint", "C2"), ("static", "C4")):
        values = [line["loss"] if line["kind"] == kind else float("nan") for line in lines]
        if kind in kinds:
            lower.plot(epochs, values, style, label=f"{kind}-label loss")
    lower.set_yscale("log")
    lower.set_ylabel("training loss")
    lower.set_xlabel("epoch")
    for axes in (upper, lower):
        shade_phases(axes, kinds)
    save_png(figure, path)

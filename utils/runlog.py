"""The run folder: arguments, a line per epoch, checkpoint, result and curves."""

import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from utils import hardware
from utils.cli import UserError
from utils.files import (
    atomic_write,
    is_unused,
    load_tensors,
    read_json,
    save_figure,
    to_json,
)
from utils.hardware import Gpu
from utils.loggers import Logger, Opener
from utils.runtime import versions

ARGUMENTS, LOG, CHECKPOINT, BEST = "args.yaml", "log.jsonl", "checkpoint.pt", "best.pt"
RESULT, CURVES = "result.json", "curves.png"
_OTHER_COLOUR = "tab:gray"


class RunFolder:
    """One training run on disk; nothing is written before `begin`."""

    def __init__(self, path: Path):
        """The run in a folder; raises UserError where the folder holds something else."""
        self.path = Path(path)
        self.loggers: list[Logger] = []
        self.gpu: Gpu | None = None
        if self.settings() is None and not is_unused(self.path):
            raise UserError(f"{self.path} is not empty and not a run; choose another --output-dir")

    def settings(self) -> dict | None:
        """The settings that the run was begun with; None before that.

        Raises:
            UserError: their file is damaged.
        """
        path = self.path / ARGUMENTS
        if not path.exists():
            return None
        try:
            return yaml.safe_load(path.read_text())["settings"]
        except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError):
            raise UserError(f"{path} is damaged; choose another --output-dir") from None

    def result(self) -> dict | None:
        """The result of a finished run, else None."""
        path = self.path / RESULT
        if not path.exists():
            return None
        return _with(("best", "last", "label_bytes", "seconds"), path, read_json)

    def checkpoint(self) -> dict | None:
        """The last checkpoint, else None."""
        path = self.path / CHECKPOINT
        if not path.exists():
            return None
        needed = ("model", "optimizer", "scaler", "random_states", "reached")
        return _with(needed, path, lambda path: load_tensors(path, "checkpoint"))

    def begin(self, settings: dict, epochs_done: int, openers: Sequence[Opener] = ()) -> None:
        """Records a new run's settings, drops log lines after the checkpoint, opens loggers."""
        self.gpu = Gpu()
        record = {"settings": settings, "versions": versions(), **git_commit()}
        if self.settings() is None:
            atomic_write(self.path / ARGUMENTS, yaml.safe_dump(record, sort_keys=False).encode())
        kept = [line for line in self.log_lines() if line["epoch"] <= epochs_done]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        atomic_write(self.path / LOG, text.encode())
        self.loggers = [start(self.path, settings, epochs_done) for start in openers]

    def log(self, line: dict) -> None:
        """Appends one epoch to log.jsonl, with its energy where known, and tells the loggers."""
        if (energy := self.gpu.watt_hours()) is not None:
            line = {**line, "energy_wh": round(energy, 4)}
        with (self.path / LOG).open("a") as file:
            file.write(json.dumps(line) + "\n")
        for logger in self.loggers:
            logger(line)

    def log_lines(self) -> list[dict]:
        """The epochs logged so far; a line that was cut off by a kill is left out."""
        path = self.path / LOG
        try:
            lines = path.read_text().splitlines(keepends=True) if path.exists() else []
            read = [json.loads(line) for line in lines if line.endswith("\n")]
            if not all(isinstance(line, dict) and "epoch" in line for line in read):
                raise ValueError("a line is no epoch")
            return read
        except ValueError as error:
            raise UserError(f"{path} is damaged ({error}); move it away to go on") from None

    def finish(self, result: dict) -> None:
        """Writes the result, which marks the run as done, with hours, energy, machine and code."""
        about = {"hours": round(result["seconds"] / 3600, 4)}
        energy = [line.get("energy_wh") for line in self.log_lines()]
        if energy and None not in energy:
            about["energy_kwh"] = round(sum(energy) / 1000, 6)
        about |= {"machine": hardware.facts(), **git_commit()}
        atomic_write(self.path / RESULT, to_json({**result, **about}))

    def draw_curves(self, result: dict, colours: dict[str, str]) -> None:
        """Draws the curves of a finished run; see `plot_curves`."""
        save_figure(plot_curves(self.log_lines(), result, colours), self.path / CURVES)


def _with(fields: Sequence[str], path: Path, read: Callable[[Path], object]) -> dict:
    """What a file holds; raises UserError where one of these fields is missing."""
    content = read(path)
    missing = [field for field in fields if not isinstance(content, dict) or field not in content]
    if missing:
        raise UserError(f"{path} is not what training wrote: it has no {missing[0]!r}")
    return content


def describe(result: dict) -> str:
    """One line: best and last top-1, label bytes, seconds."""
    best, last = result["best"], result["last"]
    return (
        f"top-1 best {best['top1']:.2f} % (epoch {best['epoch']}), last {last['top1']:.2f} %; "
        f"{result['label_bytes']:,} label bytes, {result['seconds']:.0f} s"
    )


def git_commit() -> dict[str, str | bool | None]:
    """The commit of this code, and whether files differ from it; None outside a git clone."""
    root = Path(__file__).resolve().parents[1]
    try:
        commit, changes = (
            subprocess.run(
                ["git", "-C", str(root), *command], capture_output=True, text=True, check=True
            ).stdout.strip()
            for command in (
                ["rev-parse", "HEAD"],
                ["status", "--porcelain", "--", "*.py", "*.yaml"],
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return {"git_commit": None, "git_dirty": None}
    return {"git_commit": commit, "git_dirty": bool(changes)}


def shade_phases(axes, kinds: list[str], colours: dict[str, str]) -> None:
    """Shades the phases behind a plot over epochs.

    Args:
        axes: matplotlib's.
        kinds: the kind of every epoch.
        colours: of the kinds; one that is missing is grey.
    """
    shades = {kind: {"color": colours.get(kind, _OTHER_COLOUR), "alpha": 0.2} for kind in kinds}
    start = 0
    for end in range(1, len(kinds) + 1):
        if end == len(kinds) or kinds[end] != kinds[start]:
            axes.axvspan(start, end, **shades[kinds[start]], lw=0, zorder=0)
            start = end
    handles = [
        axes.fill_between([], [], **shade, label=f"{kind} labels") for kind, shade in shades.items()
    ]
    axes.legend(handles=handles + axes.get_lines(), loc="best", fontsize=8)
    axes.set_xlim(0, len(kinds))
    axes.xaxis.get_major_locator().set_params(integer=True)


def plot_curves(lines: list[dict], result: dict, colours: dict[str, str]):
    """A matplotlib Figure: accuracy and training loss over epochs, phases shaded.

    Args:
        lines: of the log.
        result: of the run.
        colours: see `shade_phases`.
    """
    from matplotlib.figure import Figure

    epochs = [line["epoch"] for line in lines]
    kinds = [line["kind"] for line in lines]
    evaluated = [line for line in lines if "val_top1" in line]
    figure = Figure(figsize=(8, 6), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True)
    validated = [line["epoch"] for line in evaluated]
    upper.plot(validated, [line["val_top1"] for line in evaluated], "k.-", label="validation")
    # Markers, as a line alone does not show a phase of one epoch.
    seen = [line["train_top1"] for line in lines]
    upper.plot(epochs, seen, "C7.-", lw=0.8, ms=3, label="training views")
    upper.set_ylabel("top-1 accuracy (%)")
    upper.set_title(
        f"{result['model']} on {result['dataset']}: best {result['best']['top1']:.2f} %, "
        f"last {result['last']['top1']:.2f} %"
    )
    for kind in dict.fromkeys(kinds):
        values = [line["loss"] if line["kind"] == kind else float("nan") for line in lines]
        colour = colours.get(kind, _OTHER_COLOUR)
        lower.plot(epochs, values, ".-", color=colour, ms=5, label=f"{kind}-label loss")
    lower.set_yscale("log")
    lower.set_ylabel("training loss")
    lower.set_xlabel("epoch")
    for axes in (upper, lower):
        shade_phases(axes, kinds, colours)
    return figure

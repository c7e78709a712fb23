"""The run folder: arguments, a line per epoch, checkpoint, result and curves."""

import itertools
import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from utils import hardware
from utils.cli import UserError
from utils.files import atomic_write, is_unused, load_tensors, read_json, save_figure, to_json
from utils.hardware import Gpu
from utils.loggers import Logger, Opener
from utils.runtime import versions

ARGUMENTS, LOG, CHECKPOINT, BEST = "args.yaml", "log.jsonl", "checkpoint.pt", "best.pt"
RESULT, CURVES = "result.json", "curves.png"
_OTHER_COLOUR = "tab:gray"


class RunFolder:
    """One training run on disk; nothing is written before `begin`."""

    def __init__(self, path: Path, openers: Sequence[Opener] = ()):
        """The run in a folder; raises UserError where the folder holds something else."""
        self.path, self.openers = Path(path), openers
        self.loggers: list[Logger] = []
        self.gpu: Gpu | None = None
        if self.settings() is None and not is_unused(self.path):
            raise UserError(f"{self.path} is not empty and not a run; choose another folder")

    def settings(self) -> dict | None:
        """The settings that the run was begun with, None before; raises UserError if damaged."""
        path = self.path / ARGUMENTS
        try:
            return yaml.safe_load(path.read_text())["settings"] if path.exists() else None
        except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError):
            raise UserError(f"{path} is damaged; choose another folder") from None

    def result(self) -> dict | None:
        """The result of a finished run, else None."""
        return self._read(RESULT, read_json, "best", "last", "label_bytes", "seconds")

    def checkpoint(self) -> dict | None:
        """The last checkpoint, else None."""
        fields = ("model", "optimizer", "scaler", "random_states", "reached")
        return self._read(CHECKPOINT, lambda path: load_tensors(path, "checkpoint"), *fields)

    def _read(self, name: str, read: Callable, *fields: str) -> dict | None:
        """What a file holds, None where there is none; raises UserError if it lacks a field."""
        path = self.path / name
        if not path.exists():
            return None
        content = read(path)
        for field in fields:
            if not isinstance(content, dict) or field not in content:
                raise UserError(f"{path} is not what training wrote: it has no {field!r}")
        return content

    def begin(self, settings: dict, epochs_done: int) -> None:
        """Records a new run's settings, drops log lines after the checkpoint, opens loggers."""
        self.gpu = Gpu()
        record = {"settings": settings, "versions": versions(), **git_commit()}
        if self.settings() is None:
            atomic_write(self.path / ARGUMENTS, yaml.safe_dump(record, sort_keys=False).encode())
        kept = [line for line in self.log_lines() if line["epoch"] <= epochs_done]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        atomic_write(self.path / LOG, text.encode())
        self.loggers = [start(self.path, settings, epochs_done) for start in self.openers]

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


def describe(result: dict) -> str:
    """One line: best and last top-1, label bytes, seconds."""
    best, last = result["best"], result["last"]
    scores = f"top-1 best {best['top1']:.2f} % (epoch {best['epoch']}), last {last['top1']:.2f} %"
    return f"{scores}; {result['label_bytes']:,} label bytes, {result['seconds']:.0f} s"


def git_commit() -> dict[str, str | bool | None]:
    """The commit of this code, and whether files differ from it; None outside a git clone."""
    command = ["git", "-C", str(Path(__file__).resolve().parents[1]), "status"]
    command += ["--porcelain=v2", "--branch", "--", "*.py", "*.yaml"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return {"git_commit": None, "git_dirty": None}
    commit, *lines = done.stdout.splitlines()  # "# branch.oid COMMIT", more of #, changed files
    changed = any(not line.startswith("#") for line in lines)
    return {"git_commit": commit.split()[-1], "git_dirty": changed}


def shade_phases(axes, kinds: list[str], colours: dict[str, str]) -> None:
    """Shades the phases behind matplotlib's axes over epochs, of which `kinds` has every one's."""
    shades = {kind: {"color": colours.get(kind, _OTHER_COLOUR), "alpha": 0.2} for kind in kinds}
    start = 0
    for kind, phase in itertools.groupby(kinds):
        end = start + len([*phase])
        axes.axvspan(start, end, **shades[kind], lw=0, zorder=0)
        start = end
    handles = [
        axes.fill_between([], [], **shade, label=f"{kind} labels") for kind, shade in shades.items()
    ]
    axes.legend(handles=handles + axes.get_lines(), loc="best", fontsize=8)
    axes.set_xlim(0, len(kinds))
    axes.xaxis.get_major_locator().set_params(integer=True)


def plot_curves(lines: list[dict], result: dict, colours: dict[str, str]):
    """A matplotlib Figure of a log and a result: accuracy and training loss, phases shaded."""
    from matplotlib.figure import Figure

    epochs, kinds = [line["epoch"] for line in lines], [line["kind"] for line in lines]
    evaluated = [(line["epoch"], line["val_top1"]) for line in lines if "val_top1" in line]
    figure = Figure(figsize=(8, 6), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True)
    upper.plot(*zip(*evaluated, strict=True), "k.-", label="validation")
    # Markers, as a line alone does not show a phase of one epoch.
    seen = [line["train_top1"] for line in lines]
    upper.plot(epochs, seen, "C7.-", lw=0.8, ms=3, label="training views")
    scores = ", ".join(f"{name} {result[name]['top1']:.2f} %" for name in ("best", "last"))
    title = f"{result['model']} on {result['dataset']}: {scores}"
    upper.set(ylabel="top-1 accuracy (%)", title=title)
    for kind in dict.fromkeys(kinds):
        values = [line["loss"] if line["kind"] == kind else float("nan") for line in lines]
        colour = colours.get(kind, _OTHER_COLOUR)
        lower.plot(epochs, values, ".-", color=colour, ms=5, label=f"{kind}-label loss")
    lower.set(yscale="log", ylabel="training loss", xlabel="epoch")
    for axes in (upper, lower):
        shade_phases(axes, kinds, colours)
    return figure

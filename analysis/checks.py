"""What can be known to be wrong with a plan before its first command starts."""

import argparse
import contextlib
import dataclasses
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

import models
from analysis.runner import Task
from relabel import compress, generate
from utils import recipe, runlog, runtime
from utils.cli import UserError
from utils.data import datasets, folders
from validate import schedule, settings

_PARSERS = {
    "train.py": settings.parse_arguments,
    "generate.py": generate.parse_arguments,
    "compress.py": compress.parse_arguments,
}
# What the programs advise, and what the writer of a plan is to do.
_IN_A_PLAN = {
    "choose another --output-dir": "choose another --out-dir",
    "epochs: give --label-dir": "epochs: say `like: soft`, as its method reads no labels",
}


def check_folders(plan: argparse.Namespace, names: Sequence[str]) -> None:
    """Raises UserError where a path of the plan names a variable that is not set."""
    for name in names:
        if "$" in (path := getattr(plan, name)):
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} {path}: set the variable in config.sh or in the environment")


def check(tasks: list[Task], label_sets_made: bool = False) -> list[Task]:
    """Raises UserError, naming the task, for what would stop one of those that are not done.

    Returns the runs whose label set is yet to be made, of which what depends on it has not been
    looked at; if all sets have been made, that is an error.
    """
    opened: dict[tuple, settings.Materials] = {}
    later, labelling, of_auto = [], [], set()
    for task in tasks:
        if task.is_done():
            continue
        with _naming(task):
            args = parse(task)
            if not task.facts:
                if hasattr(args, "teacher"):
                    _check_labelling(args)
                    labelling.append(args)
                continue
            if (args.model, args.seed) != (task.facts["student"], task.facts["seed"]) or (
                args.output_dir != task.done.parent
            ):
                raise UserError(
                    "--model, --seed and --output-dir are the sweep's own: give --students, "
                    "--seeds and --out-dir"
                )
            facts = datasets.from_arguments(args)
            made = label_sets_made or args.label_dir is None
            made = made or (args.label_dir / "manifest.json").exists()
            wanted = (facts, args.data_dir, args.val_dir, args.label_dir if made else None)
            if wanted not in opened:
                opened[wanted] = settings.Materials.open(*wanted)
            materials = opened[wanted]
            counts, ipc = {*materials.folder.counts()}, task.facts["ipc"]
            if len(counts) == 1 and counts != {ipc}:
                raise UserError(f"--ipc {ipc}: {args.data_dir} has {min(counts)} images per class")
            network(args.model, materials.dataset.num_classes, materials.dataset.input_size)
            if made:
                _check_run(args, materials)
                if args.recipe != "auto" and recipe.views_of_auto(materials.labels):
                    of_auto.add(args.label_dir)
            else:
                phases_of(args, passes=1, classes=materials.dataset.num_classes)
                later.append(task)
    for args in labelling:
        generate.tell_of_bssl(args)
    for label_dir in sorted(of_auto):
        print(f"{label_dir} labels views that --recipe auto chose; other methods take them, too")
    return later


def parse(task: Task) -> argparse.Namespace:
    """The arguments of a task, read as its program reads them."""
    return _PARSERS[Path(task.command[0]).name](task.command[1:])


def phases_of(args: argparse.Namespace, passes: int, classes: int) -> list[schedule.Phase]:
    """The phases of a run on so many labels per image; raises UserError for a wrong schedule."""
    args = recipe.training_flags(args, None, classes)
    return settings.phases_of(args, passes, classes)


def _check_labelling(args: argparse.Namespace) -> None:
    """Raises UserError where files that relabel/generate.py reads, or networks, are missing."""
    dataset = datasets.from_arguments(args)
    folder = folders.scan(args.data_dir, dataset.num_classes)
    generate.count_passes(args, folder)
    for name in map(models.without_suffix, args.teacher):
        network(name, len(folder.classes), dataset.input_size, "--teacher")
    if missing := [file for file in args.teacher_weights or [] if not file.is_file()]:
        raise UserError(f"--teacher-weights: no file {missing[0]}")


def network(
    name: str, num_classes: int, input_size: int, flag: str = "--students"
) -> nn.Module | None:
    """A network without memory for its weights; None for code of the user's own, which is not run.

    Raises:
        UserError: it is unknown; begins with the flag.
    """
    if ":" in name:
        return None
    try:
        with torch.device("meta"):
            return models.build(name, num_classes, input_size)
    except ValueError as error:
        raise UserError(f"{flag}: {error}") from None


def _check_run(args: argparse.Namespace, materials: settings.Materials) -> None:
    """Raises UserError for settings that clash, with each other or with a run in their folder."""
    machine = runtime.Runtime(torch.device("cpu"), None)
    wanted = settings.resolve(args, materials, machine)
    run = runlog.RunFolder(args.output_dir)
    if recorded := run.settings():
        earlier = settings.Settings.from_record(recorded, run.path)
        # On which machine the plan is checked is no difference.
        wanted = dataclasses.replace(
            wanted, processes=earlier.processes, precision=earlier.precision
        )
        if difference := wanted.difference(earlier):
            raise UserError(
                f"{run.path} holds a run with other settings ({difference}): give the method "
                "another name, choose another --out-dir, or the same settings"
            )


@contextlib.contextmanager
def _naming(task: Task) -> Iterator[None]:
    """Keeps what is printed to itself, and puts the task's name before what is wrong with it."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            yield
    except UserError as error:
        what = str(error)
        for advice, in_a_plan in _IN_A_PLAN.items():
            what = what.replace(advice, in_a_plan)
        raise UserError(f"{task.name}: {what}") from None
    except SystemExit:  # of its parser, which has printed "PROGRAM: why"
        why = said.getvalue().strip().partition(": ")[2]
        raise UserError(f"{task.name}: {why}") from None

"""What can be known to be wrong with a plan before its first command starts."""

import argparse
import contextlib
import dataclasses
import functools
import io
from pathlib import Path

import torch
from torch import nn

import models
from analysis.runner import Task
from relabel import compress, generate
from utils import recipe, runlog, runtime
from utils.cli import UserError, naming
from utils.data import datasets, folders
from validate import schedule, settings

_PARSERS = {
    "train.py": settings.parse_arguments,
    "generate.py": generate.parse_arguments,
    "compress.py": compress.parse_arguments,
}


def check(tasks: list[Task], label_sets_made: bool = False) -> list[Task]:
    """Raises UserError, naming the task, for what would stop one of those that are not done.

    Prints once what they would say of their settings. Returns the runs whose label set is yet to be
    made, of which what depends on it has not been looked at; if all have been made, none.
    """
    open_once = functools.cache(settings.Materials.open)
    later, said = [], io.StringIO()
    for task in tasks:
        if task.is_done():
            continue
        with naming(task.name), contextlib.redirect_stdout(said):
            args = parse(task)
            if hasattr(args, "teacher"):
                _check_labelling(args)
            if task.facts:
                labels = args.label_dir
                made = label_sets_made or labels is None or (labels / "manifest.json").exists()
                used = (args.data_dir, args.val_dir, labels if made else None)
                materials = open_once(datasets.from_arguments(args), *used)
                _check_run(task, args, materials, made)
                later += [] if made else [task]
    for line in dict.fromkeys(said.getvalue().splitlines()):
        print(line)
    return later


def parse(task: Task) -> argparse.Namespace:
    """The arguments of a task, read as its program reads them."""
    return _PARSERS[Path(task.command[0]).name](task.command[1:])


def phases_of(args: argparse.Namespace, ipc: int, classes: int) -> list[schedule.Phase]:
    """The phases of a run; raises UserError for a wrong schedule."""
    passes = max((args.slc or ipc) // ipc, 1)
    return settings.phases_of(recipe.training_flags(args, None, classes), passes, classes)


def network(name: str, num_classes: int, input_size: int) -> nn.Module | None:
    """A network without weights; None for code of the user's own; UserError for an unknown one."""
    if ":" in name:
        return None
    try:
        with torch.device("meta"):
            return models.build(name, num_classes, input_size)
    except ValueError as error:
        raise UserError(str(error)) from None


def _check_labelling(args: argparse.Namespace) -> None:
    """Raises UserError where files that relabel/generate.py reads, or networks, are missing."""
    dataset = datasets.from_arguments(args)
    folder = folders.scan(args.data_dir, dataset.num_classes)
    generate.count_passes(args, folder)
    for name in map(models.without_suffix, args.teacher):
        network(name, len(folder.classes), dataset.input_size)
    if missing := [file for file in args.teacher_weights or [] if not file.is_file()]:
        raise UserError(f"--teacher-weights: no file {missing[0]}")
    generate.tell_of_bssl(args)


def _check_run(
    task: Task, args: argparse.Namespace, materials: settings.Materials, made: bool
) -> None:
    """Raises UserError for settings that clash, with each other or with a run in their folder."""
    counts, dataset = {*materials.folder.counts()}, materials.dataset
    own = (task.facts["student"], task.facts["seed"], task.done.parent)
    if (args.model, args.seed, args.output_dir) != own:
        flags = "--students, --seeds and --out-dir"
        raise UserError(f"--model, --seed and --output-dir are the sweep's own: give {flags}")
    if len(counts) == 1 and counts != {task.facts["ipc"]}:
        has = f"{args.data_dir} has {min(counts)} images per class"
        raise UserError(f"--ipc {task.facts['ipc']}: {has}")
    network(args.model, dataset.num_classes, dataset.input_size)
    if not made:  # all but the schedule depends on the labels
        phases_of(args, task.facts["ipc"], dataset.num_classes)
        return
    wanted = settings.resolve(args, materials, runtime.Runtime(torch.device("cpu"), None))
    run = runlog.RunFolder(args.output_dir)
    if recorded := run.settings():
        earlier = settings.Settings.from_record(recorded, run.path)
        # On which machine the plan is checked is no difference.
        here = {"processes": earlier.processes, "precision": earlier.precision}
        dataclasses.replace(wanted, **here).check_continues(earlier, run.path)

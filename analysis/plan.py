"""The settings of a sweep, from flags and a plan file, as docs/analysis.md describes them."""

import argparse
import dataclasses
import functools
import itertools
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

import yaml

from analysis.tables import FACTS
from utils import cli
from utils.cli import UserError, bounded, did_you_mean
from utils.data import datasets, folders
from validate.kinds import KINDS

_FACTS = (*FACTS, "labels_per_image")
# What those settings of a plan file must be that are no flags.
_FORMS = {
    "flags": "text, as on a command line",
    "codecs": "names with flags of relabel/compress.py, {klt: --codec klt}",
    "methods": "names, each empty or with {like: METHOD, flags: FLAGS}",
    "cells": f"a list, [{{ipc: 5, flags: --lr 1}}]: flags of validate/train.py for the runs with "
    f"all these values (of {', '.join(_FACTS)}, seed)",
    "table": f"{{rows: [...], columns: [...]}} of {', '.join(_FACTS)}",
}


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to train a student, by `flags` of validate/train.py.

    `labels` are the set that it reads: "views" (crops, as for HALD), "auto" (views as --recipe auto
    chooses them), "static" (whole images), "topk" (the views' labels, only their largest logits),
    or "" for none; `pooled` if it draws from a pool of more labels than it may store.
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
    """All methods by name: those above, and any other kind of epoch under its own name."""
    kinds = {  # of extensions/, too, once the entry script runs
        name: Method(f"--schedule {name}", "views" if kind.needs_labels else "")
        for name, kind in KINDS.items()
    }
    return kinds | _NAMED


class Plan(argparse.Namespace):
    """The settings of a sweep, by the names of their flags, and what follows from them.

    Of a plan file there are `codecs`, `cells` and `table`, too. `flags` follow -- or stand in the
    file, `methods` are a Method by name, `facts` those of the data set, and `logs` is the folder
    with what the commands print, and which of them are done.
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
    parser = cli.Parser(description="bash scripts/run_sweep.sh --help says what the flags are.")
    add, count = parser.add_argument, {"type": bounded(int, 1), "metavar": "N"}
    datasets.add_arguments(parser, required=False)
    for flag in ("--data-dir", "--val-dir", "--out-dir", "--label-dir"):
        # No shell does it in a file.
        add(flag, type=lambda text: os.path.expanduser(os.path.expandvars(text)))  # noqa: PTH111
    add("--relabel", type=os.path.expandvars, default="")
    add("--methods", nargs="+", help=", ".join(known_methods()))
    add("--students", nargs="+")
    for flag in ("--slc", "--labels-per-image", "--ipc"):
        add(flag, nargs="+", **count)
    add("--seeds", nargs="+", type=bounded(int, 0), metavar="N", default=[0, 1, 2])
    add("--label-slc", **count)
    parser.set_defaults(flags="", codecs={}, cells=[], table={})
    of_a_file = list(vars(parser.parse_args([])))  # not the flags below
    add("--plan", type=Path)
    add("--jobs", **count)
    add("--only", choices=("list", "labels", "runs", "collect"))
    add("--task", type=bounded(int, 0), metavar="N")
    add("--estimate", action="store_true")
    add("--images-per-second", nargs="+", type=bounded(float, 0.001), metavar="X")
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    plan = parser.parse_args(arguments[:cut], Plan())
    if plan.plan:
        with cli.naming(plan.plan):
            flags, others = read_file(plan.plan, of_a_file)
            planned = parser.parse_args(flags, Plan(**others))
        if plan.slc or plan.labels_per_image:  # either overrides both
            planned.slc = planned.labels_per_image = None
        plan = parser.parse_args(arguments[:cut], planned)
    plan.flags = shlex.join(arguments[cut + 1 :]) or plan.flags
    plan.check()
    plan.facts = datasets.from_arguments(plan)
    plan.methods = chosen_methods(plan.methods)
    plan.logs = Path(plan.out_dir, "logs")
    plan.label_dir = plan.label_dir or f"{plan.out_dir}/labels/ipc{{ipc}}"
    return plan


def chosen_methods(chosen: list[str] | dict[str, dict[str, str] | None]) -> dict[str, Method]:
    """The methods of a plan by the names it gives them; raises UserError for an unknown one."""
    known, methods = known_methods(), {}
    own_settings = chosen if isinstance(chosen, dict) else dict.fromkeys(chosen)
    for name, own in own_settings.items():
        own = own or {}
        named = own.get("like") or name
        if named not in known:
            raise UserError(
                f"unknown method {named!r}{did_you_mean(named, list(known))} (known: "
                f"{', '.join(known)}; in a plan of your own: {name}: {{like: hald, flags: ...}})"
            )
        flags = f"{known[named].flags} {own.get('flags') or ''}"
        methods[name] = dataclasses.replace(known[named], flags=flags)
    return methods


def read_file(path: Path, known: Sequence[str]) -> tuple[list[str], dict]:
    """The settings of a plan file by their `known` names; raises UserError for what is none.

    Returns those that are flags, as on a command line, whose parser is to check them; and by name
    the others.
    """
    try:
        settings = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise UserError("it must hold settings by name")
    flags, others = [], {}
    for name, value in settings.items():
        if name not in known:
            raise UserError(f"unknown {name!r}{did_you_mean(str(name), known)}")
        flag = "--" + name.replace("_", "-")
        if value is None:
            continue
        if name in _FORMS and not (name == "methods" and isinstance(value, str | list)):
            entries = [value]
            if name in ("codecs", "methods") and isinstance(value, dict):
                value = {str(key): own for key, own in value.items()}
                entries = [{key: own} for key, own in value.items()]
            for entry in entries:
                if not _has_form(name, entry):
                    raise UserError(f"{name} must be {_FORMS[name]}, not {entry}")
            others[name] = value
        elif isinstance(value, list):
            flags += [flag, *map(str, value)]
        else:  # a single value may itself begin with dashes, as that of `relabel` does
            flags.append(f"{flag}={value}")
    return flags, others


def _has_form(name: str, value: object) -> bool:
    """Whether a setting, or an entry of one, is what `_FORMS` says."""
    match name, value:
        case "flags", str():
            return True
        case "codecs" | "texts", dict():
            return all(isinstance(text, str | None) for text in value.values())
        case "methods", dict():
            return all(own is None or _has_form("method", own) for own in value.values())
        case "method", dict():
            return {*value} <= {"like", "flags"} and _has_form("texts", value)
        case "cells", list():
            return all(_has_form("cell", cell) for cell in value)
        case "cell", {"flags": str(), **facts}:
            return {*facts} <= {*_FACTS, "seed"}
        case "table", {"rows": [*rows], "columns": [*columns], **others}:
            return not others and all(fact in _FACTS for fact in rows + columns)
    return False

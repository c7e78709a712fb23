"""What a plan file of a sweep says; docs/analysis.md describes it."""

from collections.abc import Collection
from pathlib import Path

import yaml

from utils.cli import UserError, did_you_mean

_OTHERS = ("flags", "codecs", "cells", "table")  # settings that are no flags
_CELL = ("method", "codec", "ipc", "slc", "labels_per_image", "student", "seed")


def read(path: Path, names: Collection[str]) -> tuple[list[str], dict]:
    """The settings of a plan.

    Args:
        path: the file.
        names: of all settings.

    Returns:
        Those that are flags, as they would stand on the command line, whose parser is to check
        them; and by name the others: `flags`, `codecs`, `cells`, `table`, `methods` with flags.

    Raises:
        UserError: it is no plan, or has unknown names or values of another kind.
    """
    try:
        plan = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(plan, dict):
        raise UserError(f"{path} must hold settings by name")
    _check_names(plan, names, f"{path}: unknown")
    plan = {name: value for name, value in plan.items() if value is not None}
    others = {name: plan.pop(name) for name in _OTHERS if name in plan}
    if isinstance(plan.get("methods"), dict):
        others["methods"] = {
            str(name): _method({} if own is None else own, f"{path}: method {name!r}")
            for name, own in plan.pop("methods").items()
        }
    if not isinstance(others.get("flags", ""), str):
        raise UserError(f"{path}: flags must be text, as on a command line")
    if "codecs" in others:
        what = f"{path}: codecs must be names, each with flags of relabel/compress.py"
        others["codecs"] = _texts(others["codecs"], what)
    _check_cells(others.get("cells", []), path)
    _check_table(others.get("table", {}), path)
    flags = []
    for name, value in plan.items():
        flag = "--" + name.replace("_", "-")
        # A single value may itself begin with dashes, as that of `relabel` does.
        flags += [flag, *map(str, value)] if isinstance(value, list) else [f"{flag}={value}"]
    return flags, others


def _check_names(entries: dict, names: Collection[str], what: str) -> None:
    for name in entries:
        if name not in names:
            raise UserError(f"{what} {name!r}{did_you_mean(str(name), [*names])}")


def _texts(entries: object, what: str) -> dict[str, str]:
    """Texts by name, "" for nothing; raises UserError(what) for anything else."""
    if not isinstance(entries, dict) or not all(
        isinstance(text, str | None) for text in entries.values()
    ):
        raise UserError(what)
    return {str(name): text or "" for name, text in entries.items()}


def _method(own: object, what: str) -> dict[str, str]:
    texts = _texts(own, f"{what} must be empty or {{like: METHOD, flags: FLAGS}}")
    _check_names(texts, ("like", "flags"), f"{what} has an unknown")
    return texts


def _check_cells(cells: object, path: Path) -> None:
    for cell in cells if isinstance(cells, list) else [cells]:
        known = isinstance(cell, dict) and {*cell} <= {*_CELL, "flags"}
        if not known or not isinstance(cell.get("flags"), str):
            raise UserError(
                f"{path}: cells must be a list of {{{', '.join(_CELL)}, flags}}: flags of "
                "validate/train.py for the runs that have all these values"
            )


def _check_table(table: object, path: Path) -> None:
    facts = _CELL[:-1]
    known = isinstance(table, dict) and {*table} in ({"rows", "columns"}, set())
    if (
        not known
        or not all(isinstance(of, list) for of in table.values())
        or not all(name in facts for of in table.values() for name in of)
    ):
        raise UserError(f"{path}: table must have rows and columns, lists of {', '.join(facts)}")

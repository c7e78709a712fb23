"""What a plan file of a sweep says; docs/analysis.md describes it."""

from collections.abc import Collection
from pathlib import Path

import yaml

from utils.cli import UserError

_FACTS = ("method", "codec", "ipc", "slc", "labels_per_image", "student")
# What settings must be that are no flags.
_FORMS = {
    "flags": "text, as on a command line",
    "codecs": "names, each with flags of relabel/compress.py",
    "methods": "names, each empty or with {like: METHOD, flags: FLAGS}",
    "cells": f"a list of {{{', '.join(_FACTS)}, seed, flags}}: flags of validate/train.py for the "
    "runs that have all these values",
    "table": f"rows and columns, each a list of {', '.join(_FACTS)}",
}


def read(path: Path) -> tuple[list[str], dict]:
    """The settings of a plan; raises UserError for what is none.

    Returns those that are flags, as they would stand on a command line, whose parser is to check
    them; and by name the others.
    """
    try:
        plan = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(plan, dict):
        raise UserError(f"{path} must hold settings by name")
    flags, others = [], {}
    for name, value in plan.items():
        if value is None:
            continue
        flag = "--" + str(name).replace("_", "-")
        if name in _FORMS and not (name == "methods" and isinstance(value, str | list)):
            if not _has_form(name, value):
                raise UserError(f"{path}: {name} must be {_FORMS[name]}")
            others[name] = value
        elif isinstance(value, list):
            flags += [flag, *map(str, value)]
        else:  # a single value may itself begin with dashes, as that of `relabel` does
            flags.append(f"{flag}={value}")
    return flags, others


def _has_form(name: str, value: object) -> bool:
    """Whether a setting is what `_FORMS` says."""
    match name, value:
        case "flags", str():
            return True
        case "codecs", dict():
            return _are_texts(value)
        case "methods", dict():
            return all(own is None or _are_texts(own, ("like", "flags")) for own in value.values())
        case "cells", list():
            return all(
                isinstance(cell, dict)
                and {*cell} <= {*_FACTS, "seed", "flags"}
                and isinstance(cell.get("flags"), str)
                for cell in value
            )
        case "table", {"rows": [*rows], "columns": [*columns], **others}:
            return not others and all(fact in _FACTS for fact in rows + columns)
    return False


def _are_texts(entries: object, names: Collection[str] = ()) -> bool:
    """Whether these are texts, or nothing, by name: by any, or by those of `names`."""
    return isinstance(entries, dict) and all(
        isinstance(text, str | None) and (name in names or not names)
        for name, text in entries.items()
    )

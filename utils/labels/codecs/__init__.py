"""Codecs: how the logits of a label set become bytes and come back.

A codec encodes centred logits to compact codes, a row of small integers per label; packs the
codes of a pass to bytes and unpacks them again; and expands the codes of single batches to logits.
Codes are what stays in memory, so the expanded labels of a whole set never need to. It is one class
that derives from `Codec`, here or in extensions/; docs/label-format.md describes the payloads.
"""

import argparse
from pathlib import Path
from typing import Any

from utils import extensions
from utils.cli import UserError
from utils.labels.arrays import read_npz
from utils.labels.codecs import klt, plain  # noqa: F401 - their classes add themselves to CODECS
from utils.labels.codecs.base import CODECS, Codec, flag


def find(parameters: dict[str, Any]) -> tuple[type[Codec], dict[str, Any]]:
    """Class and options of a manifest's "codec" entry; raises UserError when it is unknown."""
    options = dict(parameters)
    name = options.pop("name", None)
    if name not in CODECS:
        extensions.load()  # which an entry script has done already
    if name not in CODECS:
        raise UserError(f"codec {name!r} is unknown to this version (known: {', '.join(CODECS)})")
    return CODECS[name], options


def from_manifest(manifest: dict, fitted: Path) -> Codec:
    """The codec of a label set, whose fitted part, where there is one, is the file `fitted`."""
    kind, options = find(manifest["codec"])
    if kind.fitted:
        options["arrays"] = read_npz(fitted)
    return kind(manifest["num_classes"], **options)


def add_arguments(parser: argparse._ActionsContainer, default: str | None = None) -> None:
    """Adds --codec and the flags that belong to one codec each."""
    required = {"required": True} if default is None else {"default": default}
    parser.add_argument("--codec", choices=sorted(CODECS), help="how labels are stored", **required)
    for kind in CODECS.values():
        for option, keywords in kind.flags.items():
            about = f"{kind.name}: {keywords['help']}"
            parser.add_argument(flag(option), **{**keywords, "help": about})


def from_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The manifest's "codec" entry that the flags ask for; raises UserError when they clash."""
    owners = {option: kind.name for kind in CODECS.values() for option in kind.flags}
    given = {key: value for key, value in vars(args).items() if key in owners and value is not None}
    for option in given:
        if (owner := owners[option]) != args.codec:
            raise UserError(f"{flag(option)} belongs to codec {owner}, not to {args.codec}")
    kind = CODECS[args.codec]
    if kind.default is not None:
        if len(given) > 1:
            raise UserError(" is not allowed with ".join(map(flag, given)))
    elif missing := [option for option in kind.flags if option not in given]:
        raise UserError(f"--codec {args.codec} needs {flag(missing[0])}")
    return {"name": args.codec, **(given or kind.default or {})}

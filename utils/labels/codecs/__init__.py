"""Codecs: how the logits of a label set become bytes and come back.

A codec encodes centred logits to compact codes, a row of small integers per label; packs the
codes of a pass to bytes and unpacks them again; and expands the codes of single batches to logits.
Codes are what stays in memory, so the expanded labels of a whole set never need to. The payloads
are described in docs/label-format.md; all numbers are little-endian.

  fp16   every logit as half precision: 2 bytes x classes per label
  topk   the largest logits only
  quant  a few bits per logit between the smallest and the largest of its label
  klt    the difference from the class mean in a fitted basis, rounded, entropy coded

A codec is one class that derives from `Codec`, here or in a file of extensions/.
"""

import argparse
from typing import Any

import numpy as np

from utils import extensions
from utils.cli import UserError
from utils.labels.codecs import klt, plain  # noqa: F401 - their classes add themselves to CODECS
from utils.labels.codecs.base import CODECS, Codec, flag


def find(parameters: dict[str, Any]) -> tuple[type[Codec], dict[str, Any]]:
    """Class and options of a manifest's "codec" entry; raises UserError when it is unknown."""
    name = parameters.get("name")
    if name not in CODECS:
        extensions.load()  # which an entry script has done already
    if name not in CODECS:
        raise UserError(f"codec {name!r} is unknown to this version (known: {', '.join(CODECS)})")
    return CODECS[name], {key: value for key, value in parameters.items() if key != "name"}


def from_manifest(parameters: dict, num_classes: int, arrays: dict[str, np.ndarray]) -> Codec:
    """The codec that a manifest's "codec" entry and the arrays of codec.npz describe."""
    kind, options = find(parameters)
    if not kind.fitted:
        return kind(num_classes, **options)
    if not arrays:
        raise UserError(f"codec.npz, the fitted part of codec {kind.name}, is missing")
    return kind(num_classes, arrays=arrays, **options)


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
    given = {}
    for kind in CODECS.values():
        for option in kind.flags:
            value = getattr(args, option)
            if value is not None and kind.name != args.codec:
                raise UserError(f"{flag(option)} belongs to codec {kind.name}, not to {args.codec}")
            if value is not None:
                given[option] = value
    return {"name": args.codec, **CODECS[args.codec].options_from(given)}

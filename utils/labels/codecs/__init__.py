"""Codecs: how the logits of a label set become bytes and come back.

A codec encodes centred logits to compact codes, a row of small integers per label; packs the
codes of a pass to bytes and unpacks them again; and expands the codes of single batches to logits.
Codes are what stays in memory, so the expanded labels of a whole set never need to. The payloads
are described in the docstrings of the four codecs; all numbers are little-endian.

  fp16   every logit as half precision: 2 bytes x classes per label
  topk   the largest logits only
  quant  a few bits per logit between the smallest and the largest of its label
  klt    the difference from the class mean in a fitted basis, rounded, entropy coded
"""

import argparse
from typing import Any

import numpy as np
import torch

from utils.cli import UserError, bounded
from utils.data.views import Mixture
from utils.labels.codecs.base import Codec
from utils.labels.codecs.klt import DEFAULT_DISTORTION, Klt
from utils.labels.codecs.plain import Fp16, Quant, TopK

CODECS = {codec.name: codec for codec in (Fp16, TopK, Quant, Klt)}


def from_manifest(parameters: dict, num_classes: int, arrays: dict[str, np.ndarray]) -> Codec:
    """The codec that a manifest's "codec" entry and the arrays of codec.npz describe."""
    name = parameters.get("name")
    if name not in CODECS:
        raise UserError(f"codec {name!r} is unknown to this version (known: {', '.join(CODECS)})")
    options = {key: value for key, value in parameters.items() if key != "name"}
    if not CODECS[name].fitted:
        return CODECS[name](num_classes, **options)
    if not arrays:
        raise UserError(f"codec.npz, the fitted part of codec {name}, is missing")
    return CODECS[name](num_classes, options, arrays)


def needs_fit(parameters: dict) -> bool:
    """Whether the codec of a manifest's "codec" entry has a part that is fitted to the labels."""
    return parameters["name"] in CODECS and CODECS[parameters["name"]].fitted


def fit(
    parameters: dict,
    samples: list[tuple[torch.Tensor, Mixture]],
    num_classes: int,
    labels: int,
    pass_labels: int,
) -> Codec:
    """The codec of a manifest's "codec" entry, fitted to the first labels of a set (Klt.fit)."""
    options = {key: value for key, value in parameters.items() if key != "name"}
    return CODECS[parameters["name"]].fit(
        samples, num_classes, labels, pass_labels=pass_labels, **options
    )


def add_arguments(parser: argparse._ActionsContainer, default: str | None = None) -> None:
    """Adds --codec and the flags that belong to one codec each."""
    required = {"required": True} if default is None else {"default": default}
    parser.add_argument("--codec", choices=sorted(CODECS), help="how labels are stored", **required)
    target = parser.add_mutually_exclusive_group()
    target.add_argument(
        "--bytes-per-label",
        type=bounded(float, 0.1),
        metavar="N",
        help="klt: budget for the logits, basis and class means included",
    )
    target.add_argument(
        "--distortion",
        type=bounded(float, 1e-6, 1),
        metavar="X",
        help="klt: share of the label's information lost at temperature 20 "
        f"(default without a budget: {DEFAULT_DISTORTION})",
    )
    parser.add_argument("--topk", type=bounded(int, 1), metavar="K", help="topk: logits kept")
    parser.add_argument(
        "--bits", type=bounded(int, 1, 8), metavar="N", help="quant: bits per class"
    )


def from_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The manifest's "codec" entry that the flags ask for; raises UserError when they clash."""
    owners = {"topk": "topk", "bits": "quant", "bytes_per_label": "klt", "distortion": "klt"}
    given = {name: getattr(args, name) for name in owners if getattr(args, name) is not None}
    for name in given:
        if owners[name] != args.codec:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} belongs to codec {owners[name]}, not to {args.codec}")
    for name in CODECS[args.codec].options:
        if name not in given:
            raise UserError(f"--codec {args.codec} needs --{name}")
    if args.codec == "klt" and not given:
        given = {"distortion": DEFAULT_DISTORTION}
    return {"name": args.codec, **given}

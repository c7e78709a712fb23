"""Checkpoints: state dicts in those of all kinds of training scripts, the facts in our own."""

import dataclasses
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from utils.cli import UserError
from utils.data.datasets import Dataset

_USUAL_KEYS = ("state_dict", "model", "net", "network", "model_state_dict", "model_state")
_PREFIXES = ("module.", "_orig_mod.")
_AVERAGED = re.compile("(?<![a-z])ema(?![a-z])", re.IGNORECASE)


def own_facts(content: object, path: Path) -> Dataset | None:
    """The data set of a checkpoint that validate/train.py wrote; None for other code's.

    Args:
        content: of the file.
        path: of the file, for messages.

    Raises:
        UserError: a checkpoint of ours without one of the fields that describe its network, or
            with another kind of value in it.
    """
    if not isinstance(content, dict) or content.get("format") != "hald-student":
        return None
    facts = content.get("dataset")
    names = {field.name for field in dataclasses.fields(Dataset)}
    described = isinstance(facts, dict) and {*facts} == names
    count = facts["num_classes"] if described else None
    fits = {
        "dataset": described
        and isinstance(facts["name"], str)
        and all(isinstance(facts[name], int) for name in ("num_classes", "input_size"))
        and all(_is_list(facts[name], float) and len(facts[name]) == 3 for name in ("mean", "std")),
        "network": isinstance(content.get("network"), str),
        "classes": _is_list(content.get("classes"), str) and len(content["classes"]) == count,
        "precision": content.get("precision") in ("fp16", "bf16", "off"),
        "model": isinstance(state := content.get("model"), dict)
        and all(isinstance(key, str) for key in state)
        and any(isinstance(value, torch.Tensor) for value in state.values()),
    }
    if wrong := [field for field, right in fits.items() if not right]:
        state = "not what that writes" if wrong[0] in content else "missing"
        raise UserError(
            f"{path} is no whole checkpoint of validate/train.py: {wrong[0]} is {state}"
        )
    return Dataset(**facts)


def _is_list(value: object, kind: type) -> bool:
    """Whether it is a list or tuple of values of a type."""
    return isinstance(value, list | tuple) and all(isinstance(each, kind) for each in value)


def unwrap_state(
    content: object, path: Path, ema: bool = False, hint: str = ""
) -> dict[str, torch.Tensor]:
    """The network in a checkpoint: the one dict of tensors in it, wherever training scripts put it.

    Args:
        content: of the file.
        path: of the file, for messages.
        ema: take the averaged weights, those under a key with the word "ema", not the others.
        hint: what to do where a file holds averaged weights that were not asked for.

    Returns:
        The state dict, without the prefixes of DistributedDataParallel and torch.compile, nor
        the counter of torch's AveragedModel.

    Raises:
        UserError: no such dict, or several.
    """
    states = dict(_find_states(content, ""))
    averaged = {key for key in states if _AVERAGED.search(key)}
    chosen = [key for key in states if (key in averaged) == ema]
    usual = [key for key in chosen if key.split(".")[-1] in _USUAL_KEYS]
    if len(chosen) > 1 and len(usual) == 1:
        chosen = usual
    if len(chosen) != 1:
        keys = ", ".join(map(repr, content)) if isinstance(content, dict) else "no dict at all"
        which = f"several networks ({', '.join(chosen)})" if chosen else "no state dict"
        hint = f"; {hint}" if hint and averaged and not ema else ""
        keys = textwrap.shorten(keys, 200, placeholder=" ...")
        raise UserError(f"{path} holds {which}; its top-level keys: {keys}{hint}")
    state = {key: value for key, value in states[chosen[0]].items() if key != "n_averaged"}
    while prefix := next((p for p in _PREFIXES if all(key.startswith(p) for key in state)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _find_states(content: object, key: str) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Dicts of tensors by their keys, at most two dicts deep; not those of an optimiser."""
    if not isinstance(content, dict) or not content:
        return
    if all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in content.items()):
        yield key, content
    elif key.count(".") < 2:
        for name, value in content.items():
            if not re.search("optim|sched|scaler", str(name)):
                yield from _find_states(value, f"{key}.{name}" if key else str(name))


def load_state(model: nn.Module, state: dict[str, torch.Tensor], what: str, name: str) -> None:
    """Loads a state dict; raises UserError with one line that names the first misfit."""
    own = model.state_dict()
    for key, value in own.items():
        if key in state and state[key].shape != value.shape:
            raise UserError(
                f"{what} do not fit {name} for this data set: {key} is {tuple(state[key].shape)}, "
                f"expected {tuple(value.shape)} (other number of classes or input size?)"
            )
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    if missing or unexpected:
        counts = f"{len(missing)} tensors missing, {len(unexpected)} unexpected"
        raise UserError(f"{what} do not fit {name}: {counts} (first: {(missing + unexpected)[0]})")
    model.load_state_dict(state, strict=False)

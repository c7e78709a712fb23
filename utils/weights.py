"""Checkpoints: state dicts in those of all kinds of training scripts, the facts in our own."""

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

    Raises UserError where a field that describes its network is missing, or of another kind.
    """
    if not isinstance(content, dict) or content.get("format") != "hald-student":
        return None
    facts, state, channels = content.get("dataset"), content.get("model"), [float] * 3
    numbers = {"num_classes": int, "input_size": int, "mean": channels, "std": channels}
    described = _types(facts) == {"name": str, **numbers}
    fits = {
        "dataset": described,
        "network": _types(content.get("network")) is str,
        "classes": described and _types(content.get("classes")) == [str] * facts["num_classes"],
        "precision": content.get("precision") in ("fp16", "bf16", "off"),
        "model": isinstance(state, dict)
        and {*map(type, state)} == {str}
        and any(isinstance(value, torch.Tensor) for value in state.values()),
    }
    for field, right in fits.items():
        if not right:
            how = "not what that writes" if field in content else "missing"
            raise UserError(f"{path} is no checkpoint of validate/train.py: {field} is {how}")
    return Dataset(**facts)


def _types(value: object) -> object:
    """The types in a value, as they lie in dicts, lists and tuples, which count as lists."""
    if isinstance(value, dict):
        return {key: _types(each) for key, each in value.items()}
    return [*map(_types, value)] if isinstance(value, list | tuple) else type(value)


def unwrap_state(
    content: object, path: Path, ema: bool = False, hint: str = ""
) -> dict[str, torch.Tensor]:
    """The network in a checkpoint: the one dict of tensors in it, wherever training scripts put it.

    Without the prefixes of DistributedDataParallel and torch.compile, nor the counter of torch's
    AveragedModel. With `ema` the averaged weights are taken, those under a key with the word "ema",
    else the others; `hint` says what to do where averaged ones were not asked for. Raises UserError
    where there is no such dict, or several.
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
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # whose first line says no more than the network's class
        misfit = f"{str(error).splitlines()[1].strip()} (other number of classes or input size?)"
        raise UserError(f"{what} do not fit {name} for this data set: {misfit}") from None
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    if missing or unexpected:
        counts = f"{len(missing)} tensors missing, {len(unexpected)} unexpected"
        raise UserError(f"{what} do not fit {name}: {counts} (first: {(missing + unexpected)[0]})")

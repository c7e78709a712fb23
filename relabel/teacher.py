"""Teachers: loading pretrained networks and labelling batches of views with them."""

import dataclasses
import os
import urllib.error
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

import models
from utils.cli import UserError
from utils.data.datasets import Dataset, folder_names
from utils.files import load_tensors, sha256_state
from utils.runtime import Runtime, check_outputs
from utils.weights import load_state, unwrap_state


@dataclasses.dataclass
class Teacher:
    """A pretrained network in evaluation mode.

    Attributes:
        name: as given to --teacher.
        model: the network, its parameters without gradients.
        sha256: of its state dict, for the manifest.
    """

    name: str
    model: nn.Module
    sha256: str


def load_teacher(
    name: str, weights: Path | None, dataset: Dataset, runtime: Runtime, ema: bool = False
) -> Teacher:
    """Builds a network and loads its weights, the averaged ones of a file where `ema` asks for it.

    Weights come from `weights`; else from `default_weights`; else, for a `package.module:factory`,
    from the factory itself; else, for ImageNet-1K, from torchvision. Those of a file may have the
    published small networks' keys, and its name a suffix behind the network's ("ResNet18_best").

    Raises:
        UserError: unknown name, no weights to be had, or weights that do not fit.
    """
    weights = weights or default_weights(name, dataset)
    network = models.without_suffix(name) if weights else name
    try:
        model = models.build(network, dataset.num_classes, dataset.input_size)
    except ValueError as error:
        raise UserError(f"--teacher: {error}") from None
    found = _find_weights(name, weights, dataset, ema)
    if found is not None:
        state, source = found
        state = models.under_our_names(model, state)
        load_state(model, state, f"teacher weights {source}", network)
    model.requires_grad_(False).eval()
    model.to(runtime.device, memory_format=torch.channels_last)
    check_outputs(model, dataset, runtime.device, f"teacher {name}")
    return Teacher(name, model, sha256_state(model.state_dict()))


def default_weights(name: str, dataset: Dataset) -> Path | None:
    """$Main_Data_Path/<dataset>/<name>.pth if it is there, else $Main_Data_Path/<name>.pth."""
    data_path = os.environ.get("Main_Data_Path")  # noqa: SIM112 - config.sh's published name
    if not data_path:
        return None
    folders = [*folder_names(dataset.name), ""]
    files = [Path(data_path) / folder / f"{name}.pth" for folder in folders]
    return next((file for file in files if file.is_file()), None)


def _find_weights(
    name: str, weights: Path | None, dataset: Dataset, ema: bool
) -> tuple[dict[str, torch.Tensor], str] | None:
    """The state dict and where it came from; None when the factory brings its own weights."""
    if weights is not None:
        content = load_tensors(weights, "teacher weights")
        return unwrap_state(content, weights, ema), str(weights)
    if ":" in name and not name.startswith("timm:"):
        return None
    reason = f"there are no public weights for {dataset.name}"
    if dataset.name == "imagenet1k":
        try:
            return models.torchvision_weights(name), "torchvision"
        except ValueError as error:
            reason = str(error)
        except (urllib.error.URLError, OSError) as error:
            reason = f"download failed ({error})"
    raise UserError(
        f"no weights for teacher {name}: {reason}; give a file with --teacher-weights, or put it "
        f"at $Main_Data_Path/{dataset.name}/{name}.pth"
    )


def use_batch_statistics(model: nn.Module) -> int:
    """Switches BSSL on: BatchNorm normalises by the current batch and updates no statistics.

    Everything else, dropout among it, stays in evaluation mode. Returns how many layers it found.
    """
    norms = [each for each in model.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.train()
        norm.track_running_stats = False
    return len(norms)


class _PerBatchStatistics(TorchFunctionMode):
    """Inside it, BatchNorm in training mode takes its statistics from every `batch_size` rows.

    It catches the function that all kinds of BatchNorm layers call, so networks need no change.
    """

    def __init__(self, batch_size: int, views: int):
        super().__init__()
        self.batch_size, self.views = batch_size, views

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (F.batch_norm, torch.batch_norm):
            rows = args[0] if args else kwargs.pop("input")
            # The sixth argument of both functions says whether to use the batch's statistics.
            if args[5] if len(args) > 5 else kwargs.get("training", False):
                if len(rows) != self.views:
                    raise _OtherRowsError
                parts = rows.split(self.batch_size)
                return torch.cat([function(part, *args[1:], **kwargs) for part in parts])
            return function(rows, *args[1:], **kwargs)
        return function(*args, **kwargs)


class _OtherRowsError(Exception):
    """A BatchNorm layer's rows are not the views, so they cannot be told apart by batches."""


class Ensemble:
    """One or several teachers, labelling by the weighted mean of their logits."""

    def __init__(self, teachers: list[Teacher], shares: list[float] | None, runtime: Runtime):
        shares = shares or [1.0] * len(teachers)
        self.teachers, self.runtime = teachers, runtime
        self.shares = [share / sum(shares) for share in shares]

    @torch.inference_mode()
    def logits(self, views: torch.Tensor, batch_size: int | None = None) -> torch.Tensor:
        """Labels views in one forward pass.

        Args:
            views: rendered, float32 [N, 3, S, S], of one or several batches.
            batch_size: under BSSL, the views per batch: each batch has its own statistics, as if
                it were labelled alone; None: all views are one batch.

        Returns:
            float32 [N, C] on the views' device.
        """
        total = torch.zeros((), device=views.device)
        for teacher, share in zip(self.teachers, self.shares, strict=True):
            with self.runtime.autocast():
                logits = _forward(teacher.model, views, batch_size or len(views))
            total = total + share * logits.float()
        return total


def _forward(model: nn.Module, views: torch.Tensor, batch_size: int) -> torch.Tensor:
    if len(views) <= batch_size:
        return model(views)
    try:
        with _PerBatchStatistics(batch_size, len(views)):
            return model(views)
    except _OtherRowsError:
        return torch.cat([model(batch) for batch in views.split(batch_size)])

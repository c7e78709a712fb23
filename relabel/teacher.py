"""Teachers: loading pretrained networks and labelling batches of views with them."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import yaml
from torch import nn
from torch.overrides import TorchFunctionMode

import models
from utils.cli import UserError
from utils.data.datasets import Dataset, folder_names
from utils.data.folders import same_classes
from utils.data.images import ResidentImages, StreamingImages
from utils.data.views import Views
from utils.files import load_tensors, sha256_state
from utils.graphs import Graphs
from utils.runtime import Runtime, check_outputs
from utils.weights import load_state, own_facts, unwrap_state

_SUBSETS = yaml.safe_load(Path(__file__).with_name("imagenet_subsets.yaml").read_text())
_IMAGENET_CLASSES = 1000


@dataclasses.dataclass
class Teacher:
    """A pretrained network in evaluation mode, its parameters without gradients."""

    name: str  # as given to --teacher
    model: nn.Module
    sha256: str  # of its state dict, for the manifest


class Subset(NamedTuple):
    """Classes of a data set among a teacher's."""

    total: int  # number of the teacher's classes
    rows: list[int]  # the position of each class of the data set among them
    names: list[str]  # what the teacher may call these classes: WordNet ids, or as listed
    listed: bool  # whether every teacher has all of them; else weights of either number will do


def find_subset(dataset: Dataset, classes: Sequence[str], listing: Path | None) -> Subset | None:
    """Where a data set's classes are among a teacher's, or None where they are all of them.

    `classes` names the class folders: imagenette's and imagewoof's by WordNet ids, or numbers in
    their order. `listing` has a line for each class of the teacher, which begins with the WordNet
    id or whatever else the class folder is called. Raises UserError for a class that the list or
    the data set does not have, or has twice.
    """
    if listing is not None:
        lines = listing.read_text(errors="replace").splitlines()
        names = [line.split()[0] for line in lines if line.strip()]
        row_of = {name: row for row, name in enumerate(names)}
        total, source = len(names), f"--teacher-classes {listing}"
        if twice := [name for row, name in enumerate(names) if row_of[name] != row]:
            raise UserError(f"{source} lists {twice[0]} more than once, so its row is not known")
    elif dataset.name in _SUBSETS:
        total, source, row_of = _IMAGENET_CLASSES, dataset.name, _SUBSETS[dataset.name]
        if all(name.removeprefix("new").isdecimal() for name in classes):
            return Subset(total, [*row_of.values()], [*row_of], listed=False)
    else:
        return None
    if unknown := [name for name in classes if name not in row_of]:
        raise UserError(f"class folder {unknown[0]} is none of the classes of {source}")
    return Subset(total, [row_of[name] for name in classes], [*classes], listing is not None)


class SomeClasses(nn.Module):
    """A network with only a subset of its outputs."""

    def __init__(self, network: nn.Module, subset: Subset):
        super().__init__()
        self.network, self.total = network, subset.total
        self.register_buffer("rows", torch.tensor(subset.rows))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """[B, 3, S, S] -> [B, rows]."""
        return self.network(pixels)[:, self.rows]


def load_teacher(
    name: str,
    weights: Path | None,
    dataset: Dataset,
    runtime: Runtime,
    ema: bool = False,
    classes: Sequence[str] = (),
    listing: Path | None = None,
) -> Teacher:
    """Builds a network and loads its weights, the averaged ones of a file where `ema` asks for it.

    They come from `weights`; else from `default_weights`; else, for a `package.module:factory`,
    from the factory itself; else, for ImageNet-1K and its subsets, from torchvision. Those of a
    file may have the published small networks' keys, and its name a suffix behind the network's
    ("ResNet18_best"). Weights with an output for each of a teacher's classes label by the rows
    that `find_subset` gives. Says when a checkpoint of ours was trained with other facts. Raises
    UserError for an unknown name, no weights to be had or other ones, and another list of classes.
    """
    subset = find_subset(dataset, classes, listing)
    path = weights or default_weights(name, dataset)
    network = models.without_suffix(name) if path else name
    content = load_tensors(path, "teacher weights") if path else None
    if facts := own_facts(content, path):
        _check_classes(content["classes"], classes, subset, path)
        if other := _differences(facts, dataset):
            print(f"teacher {name} was trained with {other}")
    outputs = subset.total if subset and subset.listed else dataset.num_classes
    try:
        model = models.build(network, outputs, dataset.input_size)
        state = _find_state(name, content, path, dataset, ema)
        if state is not None:
            if subset and _needs_outputs(model, state, subset.total):
                outputs = subset.total
                model = models.build(network, outputs, dataset.input_size)
            state = models.under_our_names(model, state)
            load_state(model, state, f"teacher weights {path or 'torchvision'}", network)
    except ValueError as error:
        raise UserError(f"--teacher: {error}") from None
    if subset and outputs == subset.total:
        model = SomeClasses(model, subset)
        print(f"teacher {name}: {len(subset.rows)} of its {outputs} classes")
    model.requires_grad_(False).eval()
    model.to(runtime.device, memory_format=torch.channels_last)
    check_outputs(model, dataset, runtime.device, f"teacher {name}")
    return Teacher(name, model, sha256_state(model.state_dict()))


def default_weights(name: str, dataset: Dataset) -> Path | None:
    """$Main_Data_Path/<dataset>/<name>.pth if it is there, else $Main_Data_Path/<name>.pth."""
    data_path = os.environ.get("Main_Data_Path")  # noqa: SIM112 - config.sh's published name
    folders = [*folder_names(dataset.name), ""] if data_path else []
    files = [Path(data_path) / folder / f"{name}.pth" for folder in folders]
    return next((file for file in files if file.is_file()), None)


def training_facts(
    names: list[str], files: list[Path] | None, dataset: Dataset
) -> dict[str, Any] | None:
    """The facts that teachers were trained with, as a dict, where `dataset` leaves any open.

    Those in `files`, or else where `default_weights` finds them by their names. None where
    nothing is open, or none of them is a checkpoint of validate/train.py. Raises UserError for
    teachers of different input sizes, means or standard deviations.
    """
    if None not in (dataset.input_size, dataset.mean, dataset.std):
        return None
    paths = files or filter(None, [default_weights(name, dataset) for name in names])
    facts = {path: own_facts(load_tensors(path, "teacher weights"), path) for path in paths}
    known = [(path, each) for path, each in facts.items() if each]
    for path, each in known[1:]:
        if other := _differences(known[0][1], each):
            raise UserError(
                f"the teachers were trained with different facts: {known[0][0]} with {other} in "
                f"{path}; give --input-size, --mean and --std"
            )
    return vars(known[0][1]) if known else None


def _differences(first: Dataset, second: Dataset) -> str:
    """ "mean 0.5 0.5 0.5, not 0.4 0.4 0.4" of what decides a network's input, or ""."""

    def text(value: int | Sequence[float]) -> str:
        return " ".join(map(str, value)) if isinstance(value, Sequence) else str(value)

    found = []
    for name in ("input_size", "mean", "std"):
        one, other = (text(getattr(side, name)) for side in (first, second))
        if one != other:
            found.append(f"{name.replace('_', ' ')} {one}, not {other}")
    return ", ".join(found)


def _check_classes(
    theirs: list[str], ours: Sequence[str], subset: Subset | None, path: Path
) -> None:
    """Raises UserError where a teacher and the images share class names, but not the class list.

    Of names that have nothing in common, none can be said to be in another order.
    """
    if subset and len(theirs) == subset.total:
        theirs, ours = [theirs[row] for row in subset.rows], subset.names
    if not {*theirs} & {*ours} or same_classes(theirs, [*ours]):
        return
    what = f"{len(theirs)} classes, not {len(ours)}"
    if len(theirs) == len(ours):
        row = next(row for row, name in enumerate(theirs) if name != ours[row])
        what = f"class {row} is {theirs[row]!r} there, {ours[row]!r} among the images"
    raise UserError(
        f"teacher weights {path} are of another class list than the images ({what}): name the "
        "class folders as those it was trained on; if they are a part of these, list these in "
        "--teacher-classes"
    )


def _needs_outputs(model: nn.Module, state: dict[str, torch.Tensor], total: int) -> bool:
    """Whether a state dict is that of a network with `total` outputs, and this one has others."""
    own = model.state_dict()
    shapes = [(own[key].shape, value.shape) for key, value in state.items() if key in own]
    return any(mine != theirs and theirs[:1] == (total,) for mine, theirs in shapes)


def _find_state(
    name: str, content: object, path: Path | None, dataset: Dataset, ema: bool
) -> dict[str, torch.Tensor] | None:
    """A state dict, from the file or torchvision; None for a factory, which brings its own."""
    if path is not None:
        return unwrap_state(content, path, ema, "--teacher-ema takes the averaged weights")
    if ema:
        raise UserError(
            f"--teacher-ema takes the averaged weights of a file, and there is none for teacher "
            f"{name}: give it with --teacher-weights"
        )
    if ":" in name and not name.startswith("timm:"):
        return None
    reason = f"there are no public weights for {dataset.name}"
    if dataset.name == "imagenet1k" or dataset.name in _SUBSETS:
        try:
            return models.torchvision_weights(name)
        except ValueError as error:
            reason = str(error)
        except OSError as error:
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
        # The sixth argument of both functions says whether to use the batch's statistics.
        training = args[5] if len(args) > 5 else kwargs.get("training", False)
        if function not in (F.batch_norm, torch.batch_norm) or not training:
            return function(*args, **kwargs)
        rows = args[0] if args else kwargs.pop("input")
        if len(rows) != self.views:
            raise _OtherRowsError
        parts = rows.split(self.batch_size)
        return torch.cat([function(part, *args[1:], **kwargs) for part in parts])


class _OtherRowsError(Exception):
    """A BatchNorm layer's rows are not the views, so they cannot be told apart by batches."""


class Ensemble:
    """One or several teachers, labelling by the weighted mean of their logits."""

    def __init__(
        self,
        teachers: list[Teacher],
        shares: list[float] | None,
        runtime: Runtime,
        graph: bool = False,
    ):
        """Shares are relative weights, None equal ones; `graph`: labels by CUDA graphs on a GPU."""
        shares = shares or [1.0] * len(teachers)
        self.teachers, self.runtime = teachers, runtime
        self.shares = [share / sum(shares) for share in shares]
        what = "labelling with " + ", ".join(teacher.name for teacher in teachers)
        on_gpu = runtime.device.type == "cuda"
        self.graphs = Graphs(runtime.device, what) if graph and on_gpu else None

    @torch.inference_mode()
    def logits(self, views: torch.Tensor, batch_size: int | None = None) -> torch.Tensor:
        """Labels rendered views, float32 [N, 3, S, S], in one forward pass: float32 [N, C].

        Under BSSL every batch of `batch_size` has its own statistics, as if it were labelled
        alone; on a GPU a CUDA graph labels them, so BSSL must have been switched on before. None:
        all views are one batch, and no graph labels them.
        """
        size = batch_size or len(views)
        if self.graphs and batch_size:
            mean = self.graphs.run(size, lambda pixels: self._mean(pixels, size), views)
            return mean.clone()  # the next run overwrites it
        return self._mean(views, size)

    def _mean(self, views: torch.Tensor, batch_size: int) -> torch.Tensor:
        total = torch.zeros((), device=views.device)
        for teacher, share in zip(self.teachers, self.shares, strict=True):
            with self.runtime.autocast():
                logits = _forward(teacher.model, views, batch_size)
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


def label_views(
    teachers: Ensemble, source: ResidentImages | StreamingImages, parts: Sequence[Views]
) -> Iterator[tuple[Views, torch.Tensor]]:
    """Every batch of these views, on the teachers' device, with its logits, float32 [B, C]."""
    batches = [batch for views in parts for batch in views.to(teachers.runtime.device)]
    for batch, pixels in zip(batches, source.render(batches), strict=True):
        yield batch, teachers.logits(pixels)

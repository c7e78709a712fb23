"""The kinds of epoch, a class each: on which batches an epoch trains, and with which loss.

A subclass of `Kind` registers itself in `KINDS`; docs/extending.md adds one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.cli import UserError
from utils.data.views import Mixture, Views, draw, raws
from utils.labels import LabelSet
from utils.runtime import Runtime, send
from validate import schedule

if TYPE_CHECKING:
    from validate.settings import Materials, Settings

KINDS: dict[str, type[Kind]] = {}
_MOVES = 16  # the purpose of what is drawn here, see utils.data.views.raws


class Batch(NamedTuple):
    """What one forward and backward pass takes: tensors on the device, of fixed shapes."""

    pixels: Tensor  # float32 [B, 3, S, S], the network's input
    own: Tensor  # int64 [B], the classes of the images
    partner: Tensor  # int64 [B], those of the images mixed in
    lam: Tensor  # float32 [B], the share of the own image
    teacher: Tensor | None = None  # float32 [B, C] logits, where there are any

    @property
    def mixture(self) -> Mixture:
        """The hard labels in the views."""
        return Mixture(own=self.own, partner=self.partner, lam=self.lam)

    def split(self, views: int) -> Iterator[Batch]:
        """The same in batches of so many views; the last one may have fewer."""
        for start in range(0, len(self.pixels), views):
            rows = slice(start, start + views)
            yield Batch(*(None if tensor is None else tensor[rows] for tensor in self))


class TrainingData:
    """What all kinds of epoch draw their batches from, on one of torchrun's ranks."""

    def __init__(self, settings: Settings, materials: Materials, source, machine: Runtime):
        """`source` renders views of the distilled images, see utils.data.images."""
        self.settings, self.source, self.machine = settings, source, machine
        self.sizes = materials.sizes
        self.labels = materials.labels.to(machine.device) if materials.labels else None
        self.hard_labels = materials.folder.labels.to(machine.device)
        # T, and what multiplies the soft loss. Filled for each epoch, never rebound, so that a
        # captured step sees them.
        self.temperature = torch.ones((), device=machine.device)
        self.soft_weight = torch.ones((), device=machine.device)
        self._thread = ThreadPoolExecutor(1)
        self._drawn: dict[int, Future[Views]] = {}  # by epoch

    def begin_epoch(self, epoch: int) -> None:
        """Sets what changes with the epoch, counted from 0."""
        settings = self.settings
        first = settings.temperature
        last = settings.temperature_end or first
        temperature = schedule.temperature(epoch, len(settings.kinds), first, last)
        self.temperature.fill_(temperature)
        # T2 keeps gradients as large as those of hard labels (arXiv 1503.02531).
        self.soft_weight.fill_(temperature**2 if settings.soft_loss_scale == "T2" else 1)

    def stored_batches(self, epoch: int) -> list[int]:
        """This rank's label batches of an epoch that draws from the pool."""
        settings, labels = self.settings, self.labels
        keep = settings.passes * labels.batches_per_pass
        drawn = schedule.drawn_from_pool(
            phases=settings.phases,
            epoch=epoch,
            per_epoch=self.machine.divisible(math.ceil(len(self.sizes) / settings.batch_size)),
            pool=schedule.label_batches(len(labels), keep, settings.slc_from, settings.seed),
            drawing={name for name, kind in KINDS.items() if kind.draws_from_pool},
            seed=settings.seed,
        )
        return self.machine.share(drawn)

    def moves(self, epoch: int, views: int) -> Tensor:
        """How this rank moves its views, by up to a sixteenth of the side: int64 [views, 3]."""
        world, most = self.machine.world, self.source.size // 16
        numbers = raws(self.settings.seed, _MOVES, epoch, views * world)[self.machine.rank :: world]
        steps = [numbers >> np.uint64(bits) & np.uint64(0xFFFF) for bits in (0, 16)]
        down, right = ((step % np.uint64(2 * most + 1)).view(np.int64) - most for step in steps)
        mirrored = (numbers >> np.uint64(63)).view(np.int64)
        drawn = torch.from_numpy(np.stack([down, right, mirrored], axis=1))
        return send(drawn, self.machine.device)

    def fresh_views(self, epoch: int) -> list[Views]:
        """This rank's batches of freshly drawn views, one view of every image over all ranks."""
        settings, wanted = self.settings, [epoch]
        kinds = settings.kinds
        if self.machine.device.type == "cuda" and kinds[epoch + 1 : epoch + 2] == [kinds[epoch]]:
            wanted.append(epoch + 1)  # the GPU would wait some 60 ms for the views of 10,000 images
        for each in wanted:
            if each not in self._drawn:
                facts = (settings.view_spec, self.sizes, settings.seed, each + 1)
                self._drawn[each] = self._thread.submit(draw, *facts)
        return self.machine.share(list(self._drawn.pop(epoch).result().to(self.machine.device)))

    def groups(self, batches: Sequence[Views]) -> Iterator[tuple[Views, Batch]]:
        """Batches joined, as a GPU launches as many kernels for many views as for a few."""
        groups = in_groups(batches, self.source.together)
        for views, pixels in zip(groups, self.source.render(groups), strict=True):
            yield views, Batch(pixels, *views.mixture(self.hard_labels, self.source.size))

    def render(self, batches: Sequence[Views]) -> Iterator[Batch]:
        """Batches of these views, without a teacher."""
        for views, group in self.groups(batches):
            yield from group.split(views.batch_size)

    def render_stored(self, indices: Sequence[int], moves: Tensor | None = None) -> Iterator[Batch]:
        """Stored batches with the teacher's labels, their views as it saw them or moved one by one.

        `moves` has a row for each view, see `move`, or more.
        """
        remaining, done = iter(indices), 0
        for views, group in self.groups([self.labels.views(index) for index in indices]):
            of_group = [*itertools.islice(remaining, len(views))]
            group = group._replace(teacher=self.labels.logits(of_group, group.mixture))
            if moves is not None:
                moved = move(group.pixels, moves[done : done + len(group.pixels)])
                group = group._replace(pixels=moved)
                done += len(group.pixels)
            yield from group.split(views.batch_size)


def in_groups(batches: Iterable[Views], most: int) -> list[Views]:
    """Neighbouring batches joined, up to `most` views; a batch that is not whole ends a group."""
    groups: list[list[Views]] = []
    room = 0
    for views in batches:
        count = len(views.index)
        if count > room:
            groups.append([])
            room = max(most, count)
        groups[-1].append(views)
        room = 0 if count % views.batch_size else room - count
    return [Views.joined(group) for group in groups]


class Kind:
    """A kind of epoch. Subclasses set the class attributes, and define what they do otherwise."""

    name: ClassVar[str]  # in schedules, logs and plots
    colour: ClassVar[str]  # in plots, as matplotlib takes it
    needs_labels: ClassVar[bool] = True  # a label set
    draws_from_pool: ClassVar[bool] = False  # of stored label batches, see stored_batches
    flags: ClassVar[tuple[str, ...]] = ()  # settings that only some kinds use, this one among them

    def __init_subclass__(cls):
        if cls.name in (*KINDS, *schedule.NAMES) or not cls.name.isidentifier():
            where = f"{cls.__module__}.{cls.__qualname__}"
            raise UserError(f"{where}: the kind's name {cls.name!r} is taken, or is not one word")
        KINDS[cls.name] = cls

    @classmethod
    def check(cls, settings: Settings, labels: LabelSet | None) -> None:
        """Raises UserError for what it cannot train on."""

    def __init__(self, data: TrainingData):
        self.data, self.settings = data, data.settings

    def batches(self, epoch: int) -> Iterator[Batch]:
        """What an epoch, counted from 0, trains on; a function of the settings and the epoch."""
        if self.draws_from_pool:
            return self.data.render_stored(self.data.stored_batches(epoch))
        return self.data.render(self.data.fresh_views(epoch))

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """float32 [], the mean over a batch; soft where a teacher has labelled it, else hard.

        Tensor arithmetic alone: reading a value would make the host wait for the GPU.
        """
        if batch.teacher is None:
            return hard_loss(logits, batch.mixture, self.settings.label_smoothing)
        return soft_loss(logits, batch.teacher, self.data.temperature) * self.data.soft_weight


def colours() -> dict[str, str]:
    """The kinds' colours in plots, by name."""
    return {name: kind.colour for name, kind in KINDS.items()}


class Soft(Kind):
    """Stored views with the teacher's labels for them."""

    name = "soft"
    colour = "tab:blue"
    draws_from_pool = True
    flags = ("temperature_end", "slc_from")


class Moved(Soft):
    """Stored views moved anew each time, half of them mirrored, as they are soon known by heart."""

    name = "moved"
    colour = "tab:cyan"

    def batches(self, epoch: int) -> Iterator[Batch]:
        # Of a moved view the teacher would say nearly the same.
        stored = self.data.stored_batches(epoch)
        moves = self.data.moves(epoch, len(stored) * self.settings.batch_size)
        return self.data.render_stored(stored, moves)


class Hard(Kind):
    """Fresh views with the classes of their images."""

    name = "hard"
    colour = "tab:orange"
    needs_labels = False
    flags = ("hard_batch_size",)


class Joint(Soft):
    """Stored views with hard_share * hard loss + (1 - hard_share) * soft loss."""

    name = "joint"
    colour = "tab:green"
    flags = ("temperature_end", "slc_from", "hard_share")

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        share = self.settings.hard_share
        hard = hard_loss(logits, batch.mixture, self.settings.label_smoothing)
        return share * hard + (1 - share) * super().loss(logits, batch)


class Static(Kind):
    """Fresh views with one soft label per whole image (arXiv 2406.10485), mixed as the images."""

    name = "static"
    colour = "tab:purple"
    flags = ("temperature_end", "hard_batch_size")

    @classmethod
    def check(cls, settings: Settings, labels: LabelSet | None) -> None:
        if settings.slc_from == "random":
            raise UserError("static epochs: --slc-from random would leave images without a label")
        if labels.spec.mix != "none":
            what = f"static epochs need one label per image, but {labels.path} labels mixed views"
            raise UserError(f"{what}; label whole images: --mix none --min-scale 1")

    def __init__(self, data: TrainingData):
        super().__init__(data)
        self.image_logits = data.labels.image_logits(data.settings.passes)

    def batches(self, epoch: int) -> Iterator[Batch]:
        for views, group in self.data.groups(self.data.fresh_views(epoch)):
            teacher = self.image_logits[views.index]
            if (partner := views.partner()) is not None:
                temperature = self.data.temperature
                teacher = mixed_logits(teacher, teacher[partner], group.lam, temperature)
            yield from group._replace(teacher=teacher).split(views.batch_size)


def move(pixels: Tensor, moves: Tensor) -> Tensor:
    """Images [B, 3, S, S], their borders repeated, moved and then mirrored.

    `moves` is int64 [B, 3]: by how many pixels down and right, and 1 for mirrored.
    """
    size = pixels.shape[-1]
    down, right, mirrored = (moves[:, column, None] for column in range(3))
    at = torch.arange(size, device=pixels.device)
    rows, columns = ((at - by).clamp(0, size - 1) for by in (down, right))
    columns = torch.where(mirrored > 0, columns.flip(1), columns)
    each = torch.arange(len(pixels), device=pixels.device)[:, None, None]
    return pixels[each, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def soft_loss(student: Tensor, teacher: Tensor, temperature: Tensor | float) -> Tensor:
    """KL(softmax(teacher / T) || softmax(student / T)) of [B, C] logits, mean over B, no T^2."""
    student, teacher = (F.log_softmax(each / temperature, dim=1) for each in (student, teacher))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def hard_loss(logits: Tensor, mixture: Mixture, smoothing: float) -> Tensor:
    """Cross-entropy of [B, C] logits against both classes of each view, weighted by lambda.

    The target is 1 - s + s / C for a class, with smoothing s, and s / C elsewhere.
    """
    # The target is the mixture of both, so one softmax does; a GPU launches half as many kernels.
    views, classes = logits.shape
    log_probabilities = F.log_softmax(logits, dim=1)
    shown = torch.stack([mixture.own, mixture.partner], dim=1)
    shares = torch.stack([mixture.lam, 1 - mixture.lam], dim=1)
    of_shown = (shares * log_probabilities.gather(1, shown)).sum()
    spread = smoothing / (views * classes)
    return torch.sub(of_shown * ((smoothing - 1) / views), log_probabilities.sum(), alpha=spread)


def mixed_logits(own: Tensor, partner: Tensor, lam: Tensor, temperature: Tensor) -> Tensor:
    """[B, C] logits whose probabilities at T are those of both others, mixed by `lam` [B]."""
    shares = torch.stack([lam, 1 - lam]).log()[:, :, None]
    log_probabilities = torch.log_softmax(torch.stack([own, partner]) / temperature, dim=2)
    return temperature * torch.logsumexp(shares + log_probabilities, dim=0)

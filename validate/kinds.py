"""The kinds of epoch, a class each: on which batches an epoch trains, and with which loss.

A subclass of `Kind` registers itself: schedules, checks of flags, plots, logs and sweeps read
`KINDS`. docs/extending.md adds one.
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
    """What one forward and backward pass takes: tensors on the device, of fixed shapes.

    Attributes:
        pixels: float32 [B, 3, S, S], the network's input.
        own, partner: int64 [B], the two classes in each view.
        lam: float32 [B], the share of the own image.
        teacher: float32 [B, C] logits; None where the loss needs none.
    """

    pixels: torch.Tensor
    own: torch.Tensor
    partner: torch.Tensor
    lam: torch.Tensor
    teacher: torch.Tensor | None = None

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
    """What all kinds of epoch draw their batches from, on one of torchrun's ranks.

    Attributes:
        settings: of the run.
        source: renders views of the distilled images, see utils.data.images.
        labels: the label set on the device, or None.
        temperature, soft_weight: float32 [], of the epoch under way: T, and what multiplies the
            soft loss. Filled for each epoch, never rebound, so that a captured step sees them.
    """

    def __init__(self, settings: Settings, materials: Materials, source, machine: Runtime):
        self.settings, self.source, self.machine = settings, source, machine
        self.sizes = materials.sizes
        self.labels = materials.labels.to(machine.device) if materials.labels else None
        self.hard_labels = materials.folder.labels.to(machine.device)
        self.temperature = torch.ones((), device=machine.device)
        self.soft_weight = torch.ones((), device=machine.device)
        self._thread = ThreadPoolExecutor(1)
        self._drawn: dict[int, Future[Views]] = {}  # of the next epoch

    def begin_epoch(self, epoch: int) -> None:
        """Sets what changes with the epoch, counted from 0."""
        settings = self.settings
        last = settings.temperature_end or settings.temperature
        epochs = len(settings.kinds)
        temperature = schedule.temperature(epoch, epochs, settings.temperature, last)
        self.temperature.fill_(temperature)
        self.soft_weight.fill_(temperature**2 if settings.soft_loss_scale == "T2" else 1)

    def stored_batches(self, epoch: int) -> list[int]:
        """This rank's label batches of an epoch that draws from the pool."""
        settings = self.settings
        drawn = schedule.drawn_from_pool(
            phases=settings.phases,
            epoch=epoch,
            per_epoch=self.machine.divisible(math.ceil(len(self.sizes) / settings.batch_size)),
            pool=settings.label_batches(self.labels),
            drawing={name for name, kind in KINDS.items() if kind.draws_from_pool},
            seed=settings.seed,
        )
        return self.machine.share(drawn)

    def moves(self, epoch: int, views: int) -> torch.Tensor:
        """How so many views of an epoch are moved on this rank: int64 [views, 3].

        Down and right, each by up to a sixteenth of the side, and 1 for mirrored.
        """
        world, most = self.machine.world, self.source.size // 16
        numbers = raws(self.settings.seed, _MOVES, epoch, views * world)[self.machine.rank :: world]
        steps = [numbers >> np.uint64(bits) & np.uint64(0xFFFF) for bits in (0, 16)]
        down, right = ((step % np.uint64(2 * most + 1)).view(np.int64) - most for step in steps)
        mirrored = (numbers >> np.uint64(63)).view(np.int64)
        drawn = torch.from_numpy(np.stack([down, right, mirrored], axis=1))
        return send(drawn, self.machine.device)

    def fresh_views(self, epoch: int) -> list[Views]:
        """This rank's batches of freshly drawn views, one view of every image over all ranks."""
        drawn, kinds = self._drawn.pop(epoch, None) or self._draw(epoch), self.settings.kinds
        if self.machine.device.type == "cuda" and kinds[epoch + 1 : epoch + 2] == [kinds[epoch]]:
            # The GPU would wait some 60 ms for the views of 10,000 images.
            self._drawn[epoch + 1] = self._draw(epoch + 1)
        return self.machine.share(list(drawn.result().to(self.machine.device)))

    def _draw(self, epoch: int) -> Future[Views]:
        settings = self.settings
        return self._thread.submit(draw, settings.view_spec, self.sizes, settings.seed, epoch + 1)

    def groups(self, batches: Sequence[Views]) -> Iterator[tuple[Views, Batch]]:
        """The views of as many batches as are best made together, and what training takes of them.

        A GPU launches as many kernels for a group as for a batch, and has more to do in each.
        """
        groups = in_groups(batches, self.source.together)
        for views, pixels in zip(groups, self.source.render(groups), strict=True):
            yield views, Batch(pixels, *views.mixture(self.hard_labels, self.source.size))

    def render(self, batches: Sequence[Views]) -> Iterator[Batch]:
        """Batches of these views, without a teacher."""
        for views, group in self.groups(batches):
            yield from group.split(views.batch_size)

    def render_stored(
        self, batch_indices: Sequence[int], moves: torch.Tensor | None = None
    ) -> Iterator[Batch]:
        """Batches of stored views, as the teacher saw them or moved, with its labels for them.

        Args:
            batch_indices: which of the stored batches.
            moves: of their views one by one, or of more of them; see `move`.
        """
        stored = [self.labels.views(index) for index in batch_indices]
        remaining, done = iter(batch_indices), 0
        for views, group in self.groups(stored):
            indices = [*itertools.islice(remaining, len(views))]
            group = group._replace(teacher=self.labels.logits(indices, group.mixture))
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
    """A kind of epoch. Subclasses set the class attributes and define `batches` and `loss`.

    Class attributes:
        name: in schedules, logs and plots.
        colour: of its phases and its loss in plots, as matplotlib takes it.
        needs_labels: whether it needs a label set.
        draws_from_pool: whether its epochs draw from the pool of stored label batches.
        flags: names of the settings that mean something only for some kinds, this one among them.
    """

    name: ClassVar[str]
    colour: ClassVar[str]
    needs_labels: ClassVar[bool] = True
    draws_from_pool: ClassVar[bool] = False
    flags: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls):
        if cls.name in (*KINDS, *schedule.NAMES) or not cls.name.isidentifier():
            raise UserError(
                f"{cls.__module__}.{cls.__qualname__}: the name {cls.name!r} of a kind of epoch is "
                "taken, or is not one word"
            )
        KINDS[cls.name] = cls

    @classmethod
    def check(cls, settings: Settings, labels: LabelSet | None) -> None:
        """Raises UserError for what it cannot train on."""

    def __init__(self, data: TrainingData):
        self.data, self.settings = data, data.settings

    def batches(self, epoch: int) -> Iterator[Batch]:
        """What an epoch, counted from 0, trains on; a function of the settings and the epoch."""
        raise NotImplementedError

    def loss(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """float32 [], the mean loss of a batch.

        Tensor arithmetic alone: reading a value would make the host wait for the GPU.

        Args:
            logits: float32 [B, C], the student's.
            batch: what it saw.
        """
        raise NotImplementedError

    def soft_loss(self, logits: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """`soft_loss` at the temperature and with the weight of the epoch."""
        return soft_loss(logits, teacher, self.data.temperature) * self.data.soft_weight

    def hard_loss(self, logits: torch.Tensor, mixture: Mixture) -> torch.Tensor:
        """`hard_loss` with the smoothing of the run."""
        return hard_loss(logits, mixture, self.settings.label_smoothing)


def colours() -> dict[str, str]:
    """The kinds' colours in plots, by name."""
    return {name: kind.colour for name, kind in KINDS.items()}


class Soft(Kind):
    """Stored views with the teacher's labels for them."""

    name = "soft"
    colour = "tab:blue"
    draws_from_pool = True
    flags = ("temperature_end", "slc_from")

    def batches(self, epoch: int) -> Iterator[Batch]:
        return self.data.render_stored(self.data.stored_batches(epoch))

    def loss(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        return self.soft_loss(logits, batch.teacher)


class Moved(Soft):
    """Stored views, each time moved anew and every other one mirrored, with their soft labels.

    With one label per image a view comes back every epoch and is soon known by heart. Of a moved
    one the teacher would say nearly the same.
    """

    name = "moved"
    colour = "tab:cyan"

    def batches(self, epoch: int) -> Iterator[Batch]:
        stored = self.data.stored_batches(epoch)
        moves = self.data.moves(epoch, len(stored) * self.settings.batch_size)
        return self.data.render_stored(stored, moves)


class Hard(Kind):
    """Fresh views with the classes of their images."""

    name = "hard"
    colour = "tab:orange"
    needs_labels = False
    flags = ("hard_batch_size",)

    def batches(self, epoch: int) -> Iterator[Batch]:
        return self.data.render(self.data.fresh_views(epoch))

    def loss(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        return self.hard_loss(logits, batch.mixture)


class Joint(Soft):
    """Stored views with hard_share * hard loss + (1 - hard_share) * soft loss."""

    name = "joint"
    colour = "tab:green"
    flags = ("temperature_end", "slc_from", "hard_share")

    def loss(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        share = self.settings.hard_share
        hard = self.hard_loss(logits, batch.mixture)
        return share * hard + (1 - share) * super().loss(logits, batch)


class Static(Kind):
    """Fresh views with one soft label per whole image (arXiv 2406.10485).

    A mixed view gets the mixture of its two images' probabilities.
    """

    name = "static"
    colour = "tab:purple"
    flags = ("temperature_end", "hard_batch_size")

    @classmethod
    def check(cls, settings: Settings, labels: LabelSet | None) -> None:
        if settings.slc_from == "random":
            raise UserError(
                "--slc-from random would leave images without a label for static epochs"
            )
        if labels.spec.mix != "none":
            raise UserError(
                f"static epochs need one label per image, but {labels.path} labels "
                f"{labels.spec.mix} views; make a set of whole images: relabel/generate.py "
                "--mix none --min-scale 1"
            )

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

    def loss(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        return self.soft_loss(logits, batch.teacher)


def move(pixels: torch.Tensor, moves: torch.Tensor) -> torch.Tensor:
    """Each image moved down and right by so many pixels, its border repeated, then mirrored.

    Args:
        pixels: [B, 3, S, S].
        moves: int64 [B, 3]: down, right, and 1 for mirrored.
    """
    size = pixels.shape[-1]
    down, right, mirrored = (moves[:, column, None] for column in range(3))
    at = torch.arange(size, device=pixels.device)
    rows, columns = ((at - by).clamp(0, size - 1) for by in (down, right))
    columns = torch.where(mirrored > 0, columns.flip(1), columns)
    each = torch.arange(len(pixels), device=pixels.device)[:, None, None]
    return pixels[each, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def soft_loss(
    student: torch.Tensor, teacher: torch.Tensor, temperature: torch.Tensor | float
) -> torch.Tensor:
    """KL(softmax(teacher / T) || softmax(student / T)), mean over the batch, without T^2.

    Args:
        student, teacher: float32 [B, C] logits.
        temperature: T.
    """
    return F.kl_div(
        F.log_softmax(student / temperature, dim=1),
        F.log_softmax(teacher / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )


def hard_loss(logits: torch.Tensor, mixture: Mixture, smoothing: float) -> torch.Tensor:
    """Cross-entropy with label smoothing against both classes of each view, weighted by lambda.

    Args:
        logits: float32 [B, C].
        mixture: the classes in each view.
        smoothing: s; the target is 1 - s + s / C for the class and s / C elsewhere.
    """
    # The target is the mixture of both, so one softmax does; a GPU launches half as many kernels.
    views, classes = logits.shape
    log_probabilities = F.log_softmax(logits, dim=1)
    shown = torch.stack([mixture.own, mixture.partner], dim=1)
    shares = torch.stack([mixture.lam, 1 - mixture.lam], dim=1)
    of_shown = (shares * log_probabilities.gather(1, shown)).sum()
    spread = smoothing / (views * classes)
    return torch.sub(of_shown * ((smoothing - 1) / views), log_probabilities.sum(), alpha=spread)


def mixed_logits(
    own: torch.Tensor,
    partner: torch.Tensor,
    lam: torch.Tensor,
    temperature: torch.Tensor | float,
) -> torch.Tensor:
    """Logits whose probabilities at T are lam * those of `own` + (1 - lam) * those of `partner`.

    `own` and `partner` are float32 [B, C], `lam` float32 [B].
    """
    shares = torch.stack([lam, 1 - lam]).log()[:, :, None]
    log_probabilities = torch.log_softmax(torch.stack([own, partner]) / temperature, dim=2)
    return temperature * torch.logsumexp(shares + log_probabilities, dim=0)

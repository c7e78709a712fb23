"""Local-view semantic drift of a label set, in numbers: how far soft labels of crops go astray."""

import dataclasses
import heapq

import numpy as np
import torch

from utils import cli
from utils.data.views import Views
from utils.labels import LabelSet

AREA_EDGES = (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclasses.dataclass(order=True)
class Drifted:
    """A view whose soft label puts another class first.

    Attributes:
        gap: probability of the first class minus that of the image's own, at temperature 1.
        number, row: the pass, and the view's place in it.
        image: which image the view mainly shows.
        area: the crop's share of that image.
        expected: the image's class.
        top: the three most probable classes and their probabilities.
        own: the probability of the image's class.
    """

    gap: float
    number: int
    row: int
    image: int
    area: float
    expected: int
    top: list[tuple[int, float]]
    own: float


@dataclasses.dataclass
class Drift:
    """What drifts in a label set.

    A mixed view counts for the image that covers most of it; `none` counts the views whose first
    class is that of neither image.

    Attributes:
        spread: float64 [images], an estimate of Tr(Sigma), the trace of the covariance of an
            image's soft labels (probabilities at temperature 1); NaN with one label per image.
        views, astray: int64 [images], views that mainly show the image, and those of them whose
            first class is not the image's.
        by_area: int64 [10, 2], views and views astray by the crop's share of the image.
        own_by_area: float64 [10], mean probability of the image's class.
        none: views that the teacher takes for no image in them.
        worst: the views with the largest gaps, at most one per image, the largest first.
    """

    spread: np.ndarray
    views: np.ndarray
    astray: np.ndarray
    by_area: np.ndarray
    own_by_area: np.ndarray
    none: int
    worst: list[Drifted]


@dataclasses.dataclass
class Shown:
    """What each view of a pass mainly shows; tensors with one entry per view.

    Attributes:
        image: int64, the image that covers most of the view.
        area: float64, its crop's share of the image.
        classes: int64 [N, 2], the class of that image and of the other.
    """

    image: torch.Tensor
    area: torch.Tensor
    classes: torch.Tensor


def shown(labels: LabelSet, views: Views) -> Shown:
    """What each of these views mainly shows."""
    mixture = labels.mixture(views)
    sizes = torch.from_numpy(labels.sizes[views.index]).double()
    area = views.box[:, 2:].double().prod(1) / sizes.prod(1)
    image, classes = views.index, torch.stack([mixture.own, mixture.partner], 1)
    partner = views.partner()
    if partner is not None:
        other = ~mixture.own_covers_most()
        image = torch.where(other, image[partner], image)
        area = torch.where(other, area[partner], area)
        classes = torch.where(other[:, None], classes.flip(1), classes)
    return Shown(image, area, classes)


def measure(labels: LabelSet, worst: int) -> Drift:
    """Reads a label set once, two passes in memory as codes, and a chunk of labels expanded.

    Tr(Sigma) of an image is estimated by half the mean squared distance between its soft labels of
    successive passes, which has the right expectation and needs no sums over the whole set.

    Args:
        labels: the set.
        worst: how many drifting views to keep.
    """
    count = labels.manifest["images"]["count"]
    spread = torch.zeros(count, dtype=torch.float64)
    views_of, astray_of = (torch.zeros(count, dtype=torch.int64) for _ in range(2))
    by_area, own_by_area, none = torch.zeros(10, 2, dtype=torch.int64), torch.zeros(10).double(), 0
    found: dict[int, Drifted] = {}
    before = None
    for number in cli.progress(range(labels.passes), desc="report", unit="pass"):
        views, codes = labels.load_pass(number)
        seen = shown(labels, views)
        bins = (seen.area * 10).long().clamp(0, 9)
        start = 0
        for logits, _ in labels.expanded(views, codes):
            soft = logits.softmax(1)
            rows = slice(start, start + len(soft))
            start += len(soft)
            first, classes = soft.argmax(1), seen.classes[rows]
            own = soft.gather(1, classes[:, :1])[:, 0]
            astray = first != classes[:, 0]
            none += int((astray & (first != classes[:, 1])).sum())
            views_of.index_add_(0, seen.image[rows], torch.ones_like(first))
            astray_of.index_add_(0, seen.image[rows], astray.long())
            by_area.index_add_(0, bins[rows], torch.stack([torch.ones_like(first), astray], 1))
            own_by_area.index_add_(0, bins[rows], own.double())
            if before is not None:
                spread[views.index[rows]] += squared_distance(
                    labels, soft, views.index[rows], before
                )
            _keep_worst(found, worst, number, rows, soft, own, astray, seen)
        before = (views, codes, views.index.argsort())
    spread = spread / (2 * (labels.passes - 1)) if labels.passes > 1 else spread * float("nan")
    own_by_area /= by_area[:, 0].clamp(min=1)
    ranked = sorted(found.values(), reverse=True)[:worst]
    arrays = (each.numpy() for each in (spread, views_of, astray_of, by_area, own_by_area))
    return Drift(*arrays, none, ranked)


def squared_distance(labels: LabelSet, soft: torch.Tensor, index: torch.Tensor, before):
    """float64 [n]: squared distance of soft labels to those of the same images in another pass."""
    views, codes, place = before
    rows = place[index]
    mixture = labels.mixture(views).rows(rows)
    other = labels.codec.expand(tuple(code[rows] for code in codes), mixture).softmax(1)
    return (soft - other).double().square().sum(1)


def _keep_worst(
    found: dict[int, Drifted],
    worst: int,
    number: int,
    rows: slice,
    soft: torch.Tensor,
    own: torch.Tensor,
    astray: torch.Tensor,
    seen: Shown,
) -> None:
    """Adds views of a chunk to the worst ones so far, one per image."""
    gap = torch.where(astray, soft.amax(1) - own, torch.zeros_like(own))
    for row in gap.topk(min(4 * worst, len(gap))).indices.tolist():
        place = rows.start + row
        image = int(seen.image[place])
        if gap[row] == 0 or (image in found and found[image].gap >= gap[row]):
            continue
        top = soft[row].topk(min(3, soft.shape[1]))
        found[image] = Drifted(
            float(gap[row]),
            number,
            place,
            image,
            float(seen.area[place]),
            int(seen.classes[place, 0]),
            list(zip(top.indices.tolist(), top.values.tolist(), strict=True)),
            float(own[row]),
        )
    if len(found) > 4 * worst:
        keep = heapq.nlargest(worst, found.values())
        found.clear()
        found.update({view.image: view for view in keep})

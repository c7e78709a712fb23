"""Local-view semantic drift of a label set: how far soft labels of crops go astray."""

import dataclasses

import numpy as np
import torch

from utils import cli
from utils.data.views import Views
from utils.labels import LabelSet


@dataclasses.dataclass(order=True)
class Drifted:
    """A view whose soft label puts another class first.

    Attributes:
        gap: probability of the first class minus that of the image's own, at temperature 1.
        pass_index, row: the pass, and the view's row in it.
        image: which image the view mainly shows.
        area: the crop's share of that image.
        expected: the image's class.
        top: the three most probable classes and their probabilities.
        own: the probability of the image's class.
    """

    gap: float
    pass_index: int
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


def shown(labels: LabelSet, views: Views) -> tuple[torch.Tensor, ...]:
    """What each view mainly shows: four tensors with one entry per view.

    The image that covers most of it (int64), its crop's share of that image (float64), that
    image's class (int64), and the class of the other image in the view (int64).
    """
    mixture = labels.mixture(views)
    sizes = torch.from_numpy(labels.sizes[views.index]).double()
    area = views.box[:, 2:].double().prod(1) / sizes.prod(1)
    partner = views.partner()
    if partner is None:
        return views.index, area, mixture.own, mixture.partner
    own = mixture.own_covers_most()
    return (
        torch.where(own, views.index, views.index[partner]),
        torch.where(own, area, area[partner]),
        mixture.main_class(),
        torch.where(own, mixture.partner, mixture.own),
    )


def measure(labels: LabelSet, worst: int) -> Drift:
    """Reads a label set once, two passes in memory.

    Tr(Sigma) of an image is estimated by half the mean squared distance between its soft labels of
    successive passes, which has the right expectation and needs no sums over the whole set.

    Args:
        labels: the set.
        worst: how many drifting views to keep.
    """
    count = labels.manifest["images"]["count"]
    spread = torch.zeros(count, dtype=torch.float64)
    views_of, astray_of = (torch.zeros(count, dtype=torch.int64) for _ in range(2))
    by_area, own_by_area = torch.zeros(10, 2, dtype=torch.int64), torch.zeros(10).double()
    none, worst_by_image, before = 0, {}, None
    for pass_index in cli.progress(range(labels.passes), desc="report", unit="pass"):
        whole = labels.whole_pass(pass_index)
        soft = whole.logits.softmax(1)
        image, area, main_class, other_class = shown(labels, whole.views)
        bins = (area * 10).long().clamp(0, 9)
        first = soft.argmax(1)
        own = soft.gather(1, main_class[:, None])[:, 0]
        astray = first != main_class
        none += int((astray & (first != other_class)).sum())
        views_of.index_add_(0, image, torch.ones_like(first))
        astray_of.index_add_(0, image, astray.long())
        by_area.index_add_(0, bins, torch.stack([torch.ones_like(first), astray], 1))
        own_by_area.index_add_(0, bins, own.double())
        by_image = soft[whole.views.index.argsort()]
        if before is not None:
            parts = zip(*(each.split(1024) for each in (spread, by_image, before)), strict=True)
            for total, now, last in parts:
                total += (now - last).double().square().sum(1)
        before = by_image
        gap = torch.where(astray, soft.amax(1) - own, torch.zeros_like(own))
        for row in gap.topk(min(4 * worst, len(gap))).indices.tolist():
            known = worst_by_image.get(int(image[row]))
            if gap[row] == 0 or (known and known.gap >= gap[row]):
                continue
            top = soft[row].topk(min(3, soft.shape[1]))
            worst_by_image[int(image[row])] = Drifted(
                gap=float(gap[row]),
                pass_index=pass_index,
                row=row,
                image=int(image[row]),
                area=float(area[row]),
                expected=int(main_class[row]),
                top=list(zip(top.indices.tolist(), top.values.tolist(), strict=True)),
                own=float(own[row]),
            )
    spread = spread / (2 * (labels.passes - 1)) if labels.passes > 1 else spread * float("nan")
    own_by_area /= by_area[:, 0].clamp(min=1)
    return Drift(
        spread=spread.numpy(),
        views=views_of.numpy(),
        astray=astray_of.numpy(),
        by_area=by_area.numpy(),
        own_by_area=own_by_area.numpy(),
        none=none,
        worst=sorted(worst_by_image.values(), reverse=True)[:worst],
    )

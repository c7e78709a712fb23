"""Local-view semantic drift of a label set: how far soft labels of crops go astray."""

import dataclasses

import numpy as np
import torch

from utils import cli
from utils.data.views import Views
from utils.labels import LabelSet


@dataclasses.dataclass
class Drift:
    """What every view of a label set shows and is labelled as, in the order of passes and rows.

    A mixed view counts for the image that covers most of it. Probabilities are at temperature 1.

    Attributes:
        spread: float64 [images], an estimate of Tr(Sigma), the trace of the covariance of an
            image's soft labels; NaN with one label per image.
        image, expected: int64 [views], the image that the view mainly shows, and its class.
        area: float64 [views], the crop's share of that image.
        own: float32 [views], the probability of that image's class.
        gap: float32 [views], by how much the most probable class exceeds it.
        astray: bool [views], whether another class than the image's is the most probable one.
        none: bool [views], whether it is the class of no image in the view.
    """

    spread: np.ndarray
    image: np.ndarray
    expected: np.ndarray
    area: np.ndarray
    own: np.ndarray
    gap: np.ndarray
    astray: np.ndarray
    none: np.ndarray

    def by_image(self, values: np.ndarray | None = None) -> np.ndarray:
        """[images]: how many views mainly show each image, or the sum of their values."""
        return np.bincount(self.image, values, len(self.spread))

    def by_area(self, values: np.ndarray | None = None) -> np.ndarray:
        """[10]: how many views show 0 to 10 %, ... 90 to 100 % of their image, or the sums."""
        return np.bincount((self.area * 10).astype(int).clip(0, 9), values, 10)

    def worst(self, count: int) -> np.ndarray:
        """int64: the views that drift most, at most one of each image, the largest gap first."""
        order = np.argsort(-self.gap, kind="stable")
        _, firsts = np.unique(self.image[order], return_index=True)
        chosen = order[np.sort(firsts)]
        return chosen[self.gap[chosen] > 0][:count]


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


def measure(labels: LabelSet) -> Drift:
    """Reads a label set once, two passes in memory.

    Tr(Sigma) of an image is estimated by half the mean squared distance between its soft labels of
    successive passes, which has the right expectation and needs no sums over the whole set. Passes
    imported from pruned folders do not show every image once.
    """
    images, classes = labels.manifest["images"]["count"], labels.manifest["num_classes"]
    spread, pairs = torch.zeros(2, images, dtype=torch.float64)
    passes, before = [], torch.full((images, classes), float("nan"))
    for pass_index in cli.progress(range(labels.passes), desc="report", unit="pass"):
        whole = labels.whole_pass(pass_index)
        soft = whole.logits.softmax(1)
        image, area, expected, other = shown(labels, whole.views)
        largest, first = soft.max(1)
        own = soft.gather(1, expected[:, None])[:, 0]
        astray = first != expected
        passes.append(
            {
                "image": image,
                "expected": expected,
                "area": area,
                "own": own,
                "gap": largest - own,
                "astray": astray,
                "none": astray & (first != other),
            }
        )
        for rows, now in zip(whole.views.index.split(1024), soft.split(1024), strict=True):
            distance = (now - before[rows]).double().square().sum(1)
            spread.index_add_(0, rows, distance.nan_to_num())
            pairs.index_add_(0, rows, distance.isfinite().double())
        before[whole.views.index] = soft
    spread = spread / (2 * pairs)
    columns = {name: torch.cat([each[name] for each in passes]).numpy() for name in passes[0]}
    return Drift(spread=spread.numpy(), **columns)

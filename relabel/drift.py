"""Local-view semantic drift of a label set: top-1 classes that are none of the view's."""

import dataclasses

import numpy as np
import torch

from utils import cli
from utils.labels import LabelSet


@dataclasses.dataclass
class Drift:
    """What every view of a label set shows and is labelled as, in the order of passes and rows.

    A view drifts when the teacher's top-1 class is none of those in the view, so neither
    its own nor, in a mixed view, its partner's. It counts for the image that covers most of it.
    Probabilities are at temperature 1.
    """

    spread: np.ndarray  # float64 [images], estimates Tr(Sigma); NaN with one label per image
    place: np.ndarray  # int64 [views, 2], the view's pass and its row there
    image: np.ndarray  # int64 [views], the image that covers most of the view
    label: np.ndarray  # int64 [views], its class
    share: np.ndarray  # float32 [views], how much of the view it covers
    partner: np.ndarray  # int64 [views], the class of the other image; `label` where unmixed
    area: np.ndarray  # float64 [views], the crop's share of the image that covers most
    known: np.ndarray  # float32 [views], the probability of the view's classes together
    gap: np.ndarray  # float32 [views], by how much the top-1 class exceeds each of them
    drifts: np.ndarray  # bool [views]

    def counts(self, group: np.ndarray, groups: int) -> dict[str, np.ndarray]:
        """int64 [groups]: "views", and of these "drifting", by the group that each counts for."""
        drifting = np.bincount(group[self.drifts], minlength=groups)
        return {"views": np.bincount(group, minlength=groups), "drifting": drifting}

    def worst(self, count: int) -> np.ndarray:
        """int64: the views that drift most, at most one of each image, the largest gap first."""
        order = np.argsort(-self.gap, kind="stable")
        order = order[self.drifts[order]]
        _, firsts = np.unique(self.image[order], return_index=True)
        return order[np.sort(firsts)][:count]


def measure(labels: LabelSet) -> Drift:
    """Reads a label set once, two passes in memory.

    Tr(Sigma), the trace of the covariance of an image's soft labels, is estimated by half the mean
    squared distance between those of successive passes, which has the right expectation and needs
    no sums over the whole set. Passes imported from pruned folders do not show every image once.
    """
    images, classes = labels.manifest["images"]["count"], labels.manifest["num_classes"]
    spread, pairs = torch.zeros(2, images, dtype=torch.float64)
    passes, before = [], torch.full((images, classes), float("nan"))
    for pass_index in cli.progress(range(labels.passes), desc="report", unit="pass"):
        views, logits = labels.whole_pass(pass_index)
        soft, mixture = logits.softmax(1), labels.mixture(views)
        own, row = mixture.own_covers_most(), torch.arange(len(soft))
        partner_row = row if views.mix_index is None else views.partner()
        main, other = torch.where(own, row, partner_row), torch.where(own, partner_row, row)
        image, share = views.index[main], torch.maximum(mixture.lam, 1 - mixture.lam)
        label, partner = labels.hard_labels[image], labels.hard_labels[views.index[other]]
        # A cut-out may be empty: then the partner is not in the view.
        shown = torch.stack([label, torch.where(share < 1, partner, label)], 1)
        known = soft.gather(1, shown)
        largest, first = soft.max(1)
        pixels = torch.from_numpy(labels.sizes[image]).double().prod(1)
        passes.append(
            {
                "place": torch.stack([torch.full_like(row, pass_index), row], 1),
                "image": image,
                "label": label,
                "share": share,
                "partner": partner,
                "area": views.box[main, 2:].double().prod(1) / pixels,
                "known": torch.where(shown[:, 0] == shown[:, 1], known[:, 0], known.sum(1)),
                "gap": largest - known.max(1).values,
                "drifts": (first[:, None] != shown).all(1),
            }
        )
        for rows, now in zip(views.index.split(1024), soft.split(1024), strict=True):
            distance = (now - before[rows]).double().square().sum(1)
            spread.index_add_(0, rows, distance.nan_to_num())
            pairs.index_add_(0, rows, distance.isfinite().double())
        before[views.index] = soft
    spread = spread / (2 * pairs)
    columns = {name: torch.cat([each[name] for each in passes]).numpy() for name in passes[0]}
    return Drift(spread=spread.numpy(), **columns)

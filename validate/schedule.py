"""Pure functions of the epoch: phases, learning rate, temperature, pool of label batches."""

import math
import re

from utils.cli import UserError, did_you_mean
from utils.data.views import POOL, shuffle

Phase = tuple[str, int]
KINDS = ("soft", "hard", "joint", "static")
NAMES = ("hald", *KINDS, "S1", "S2", "S3", "S4", "S5", "S6", "S7", "S8")


def phases(schedule: str, soft: int, hard: int, passes: int) -> list[Phase]:
    """The phases of a schedule, in order.

    Args:
        schedule: a name of NAMES (HALD's ablation table, arXiv 2512.15647; hald = S6), or the
            free form "soft:75,hard:150,soft:75". A kind's name trains all soft + hard epochs on
            that one kind, so that baselines take equally many steps.
        soft, hard: number of soft-label and hard-label epochs.
        passes: stored soft labels per image; the n of S2 to S5.

    Returns:
        [(kind, epochs), ...] with a kind of KINDS, no empty phase, neighbours merged.

    Raises:
        UserError: unknown name, a free form that does not parse, or no epoch at all.
    """
    if ":" in schedule:
        found = _parse(schedule)
    else:
        by_name = {
            "hald": lambda: _sandwich("soft", soft, "hard", hard),
            **{kind: lambda kind=kind: [(kind, soft + hard)] for kind in KINDS},
            "S1": lambda: [("hard", hard), ("soft", soft)],
            "S2": lambda: _alternate({"hard": hard, "soft": soft}, passes),
            "S3": lambda: _alternate({"hard": hard, "soft": soft}, 2 * passes),
            "S4": lambda: _alternate({"soft": soft, "hard": hard}, passes),
            "S5": lambda: _alternate({"soft": soft, "hard": hard}, 2 * passes),
            "S6": lambda: _sandwich("soft", soft, "hard", hard),
            "S7": lambda: _sandwich("hard", hard, "soft", soft),
            "S8": lambda: [("soft", soft), ("hard", hard)],
        }
        if schedule not in by_name:
            raise UserError(
                f"unknown schedule {schedule!r}{did_you_mean(schedule, NAMES)} "
                f'(known: {", ".join(NAMES)}, or the form "soft:75,hard:150,soft:75")'
            )
        found = by_name[schedule]()
    merged: list[Phase] = []
    for kind, epochs in found:
        if merged and merged[-1][0] == kind:
            merged[-1] = (kind, merged[-1][1] + epochs)
        elif epochs:
            merged.append((kind, epochs))
    if not merged:
        raise UserError(f"schedule {schedule!r} has no epochs; see --soft-epochs, --hard-epochs")
    return merged


def _sandwich(outer: str, outer_epochs: int, inner: str, inner_epochs: int) -> list[Phase]:
    first = outer_epochs // 2
    return [(outer, first), (inner, inner_epochs), (outer, outer_epochs - first)]


def _alternate(remaining: dict[str, int], every: int) -> list[Phase]:
    """Turns of `every` epochs per kind, in the dict's order, until both kinds are used up."""
    found = []
    while any(remaining.values()):
        for kind in remaining:
            epochs = min(every, remaining[kind])
            remaining[kind] -= epochs
            found.append((kind, epochs))
    return found


def _parse(text: str) -> list[Phase]:
    found = []
    for part in text.split(","):
        match = re.fullmatch(rf"\s*({'|'.join(KINDS)}):(\d+)\s*", part)
        if match is None:
            raise UserError(
                f"schedule {text!r}: {part!r} is not of the form KIND:EPOCHS with KIND one of "
                + ", ".join(KINDS)
            )
        found.append((match[1], int(match[2])))
    return found


def epoch_kinds(found: list[Phase]) -> list[str]:
    """The kind of every epoch."""
    return [kind for kind, epochs in found for _ in range(epochs)]


def learning_rate(epoch: int, epochs: int, base: float, eta: float) -> float:
    """base * (1 + cos(pi t / (E eta))) / 2: a cosine that eta = 2 stops at half the base rate."""
    return base * 0.5 * (1 + math.cos(math.pi * epoch / (epochs * eta)))


def auto_soft_epochs(total: int, labels_per_image: int, classes: int) -> int:
    """How many of `total` epochs are to be soft: half, or three quarters where labels tell much.

    What they tell is labels per image x log10(classes), as a label of more classes tells more;
    three quarters from 4 on. Source: analysis/study.md, where of ten classes half is best at 1 and
    3 labels per image and three quarters at 5; of 200 classes the two are equal at 1 and 2 labels
    per image, and three quarters best at 3 and 5.
    """
    told = labels_per_image * math.log10(classes)
    return round(total * (3 / 4 if told >= 4 else 1 / 2))


def temperature(epoch: int, epochs: int, first: float, last: float) -> float:
    """From `first` to `last` by equal factors per epoch: T = first * (last / first)^(t / (E-1))."""
    return first * (last / first) ** (epoch / max(epochs - 1, 1))


def pruned(batches: int, keep: int, seed: int) -> list[int]:
    """`keep` of the numbers below `batches`, chosen at random, in order: LPLD's random pruning."""
    return sorted(shuffle(seed, POOL, 0, batches)[:keep].tolist())


class BatchPool:
    """All stored label batches, drawn without replacement from shuffle after shuffle.

    The order is a function of (seed, number of refills), so `state` holds all there is to resume.
    """

    def __init__(self, size: int, seed: int):
        self.size, self.seed = size, seed
        self.refills, self.position = 0, size

    def refill(self) -> None:
        """Puts every batch back in a new order; done at the start of each soft phase."""
        self.refills += 1
        self.position = 0

    def take(self, count: int) -> list[int]:
        """The next `count` batch numbers; refills whenever the pool runs out."""
        taken: list[int] = []
        while len(taken) < count:
            if self.position == self.size:
                self.refill()
            order = shuffle(self.seed, POOL, self.refills, self.size)
            chosen = order[self.position : self.position + count - len(taken)]
            self.position += len(chosen)
            taken += chosen.tolist()
        return taken

    @property
    def state(self) -> dict[str, int]:
        """What a checkpoint keeps."""
        return {"refills": self.refills, "position": self.position}

    @state.setter
    def state(self, saved: dict[str, int]) -> None:
        self.refills, self.position = saved["refills"], saved["position"]

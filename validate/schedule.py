"""Pure functions of the epoch: phases, learning rate, temperature, which label batches it draws."""

import itertools
import math
import re
from collections.abc import Collection, Sequence

from utils.cli import UserError, did_you_mean
from utils.data.views import POOL, shuffle

Phase = tuple[str, int]  # a kind of epoch, and how many of them follow one another
ALTERNATING = ("S2", "S3", "S4", "S5")  # share all epochs in their own way
NAMES = ("hald", "S1", *ALTERNATING, "S6", "S7", "S8")


def phases(schedule: str, soft: int, hard: int, passes: int, kinds: Sequence[str]) -> list[Phase]:
    """The phases of a schedule, in order: no empty one, neighbours of one kind merged.

    Args:
        schedule: one of NAMES (HALD's ablation table, arXiv 2512.15647), a kind, or the free form
            "soft:75,hard:150,soft:75". A kind trains all soft + hard epochs, so that baselines
            take equally many steps.
        soft, hard: number of soft-label and hard-label epochs; of ALTERNATING their sum alone
            counts, as in the published code.
        passes: stored soft labels per image, the n of ALTERNATING.

    Raises:
        UserError: unknown name, a free form that does not parse, or no epoch at all.
    """
    total = soft + hard
    named = {
        "hald": [("soft", soft // 2), ("hard", hard), ("soft", soft - soft // 2)],
        "S1": [("hard", hard), ("soft", soft)],
        "S2": _alternate("hard", "soft", total, passes),
        "S3": _alternate("hard", "soft", total, 2 * passes),
        "S4": _alternate("soft", "hard", total, passes),
        "S5": _alternate("soft", "hard", total, 2 * passes),
        "S7": [("hard", hard // 2), ("soft", soft), ("hard", hard - hard // 2)],
        "S8": [("soft", soft), ("hard", hard)],
        **{kind: [(kind, total)] for kind in kinds},
    }
    named["S6"] = named["hald"]
    parts = named.get(schedule, [])
    if ":" in schedule:
        for part in schedule.split(","):
            match = re.fullmatch(rf"\s*({'|'.join(kinds)}):(\d+)\s*", part)
            if match is None:
                form = f"KIND:EPOCHS with KIND one of {', '.join(kinds)}"
                raise UserError(f"schedule {schedule!r}: {part!r} is not of the form {form}")
            parts.append((match[1], int(match[2])))
    elif schedule not in named:
        known = [*NAMES, *kinds]
        what = f"unknown schedule {schedule!r}{did_you_mean(schedule, known)}"
        forms = f'{", ".join(known)}, or the form "soft:75,hard:150,soft:75"'
        raise UserError(f"{what} (known: {forms})")
    each = [kind for kind, epochs in parts for _ in range(epochs)]
    if not each:
        raise UserError(f"schedule {schedule!r} has no epochs; see --soft-epochs, --hard-epochs")
    return [(kind, len([*same])) for kind, same in itertools.groupby(each)]


def _alternate(first: str, second: str, epochs: int, every: int) -> list[Phase]:
    """Turns of `every` epochs per kind until `epochs` are spent in all."""
    return [((first, second)[epoch // every % 2], 1) for epoch in range(epochs)]


def learning_rate(epoch: int, epochs: int, base: float, eta: float) -> float:
    """base * (1 + cos(pi t / (E eta))) / 2: a cosine that eta = 2 stops at half the base rate."""
    return base * 0.5 * (1 + math.cos(math.pi * epoch / (epochs * eta)))


def temperature(epoch: int, epochs: int, first: float, last: float) -> float:
    """From `first` to `last` by equal factors per epoch: T = first * (last / first)^(t / (E-1))."""
    return first * (last / first) ** (epoch / max(epochs - 1, 1))


def auto_soft_epochs(total: int, labels_per_image: int, classes: int) -> int:
    """How many epochs are to be soft: half, or more where labels tell much (analysis/study.md)."""
    told = labels_per_image * math.log10(classes)  # a label of more classes tells more
    return round(total * (3 / 4 if told >= 4 else 1 / 2))


def label_batches(stored: int, keep: int, chosen: str, seed: int) -> list[int]:
    """The pool: of the stored label batches the "first", or "random" ones, as LPLD prunes."""
    if chosen == "first":
        return list(range(keep))
    return sorted(shuffle(seed, POOL, 0, stored)[:keep].tolist())


def drawn_from_pool(
    phases: Sequence[Phase],
    epoch: int,
    per_epoch: int,
    pool: Sequence[int],
    drawing: Collection[str],
    seed: int,
) -> list[int]:
    """The label batches of an epoch, drawn without replacement by the kinds that are `drawing`.

    A function of the epoch, so that a run that continues needs no state of the pool. Every phase
    begins with a new shuffle of the whole pool; another follows whenever one is used up.
    """
    shuffles, phase_start = 1, 0  # number 0 is the one that prunes
    for kind, epochs in phases:
        if epoch < phase_start + epochs:
            break
        phase_start += epochs
        if kind in drawing:
            shuffles += math.ceil(epochs * per_epoch / len(pool))
    start = (epoch - phase_start) * per_epoch
    drawn: list[int] = []
    while len(drawn) < per_epoch:
        used_up, position = divmod(start + len(drawn), len(pool))
        order = shuffle(seed, POOL, shuffles + used_up, len(pool))
        drawn += order[position : position + per_epoch - len(drawn)].tolist()
    return [pool[position] for position in drawn]

"""Pure functions of the epoch: phases, learning rate, temperature, which label batches it draws."""

import math
import re
from collections.abc import Collection, Sequence

from utils.cli import UserError, did_you_mean
from utils.data.views import POOL, shuffle

Phase = tuple[str, int]  # a kind of epoch, and how many of them follow one another
ALTERNATING = ("S2", "S3", "S4", "S5", "turns")
NAMES = ("hald", "S1", *ALTERNATING, "S6", "S7", "S8")


def phases(schedule: str, soft: int, hard: int, passes: int, kinds: Sequence[str]) -> list[Phase]:
    """The phases of a schedule, in order.

    Args:
        schedule: a name of NAMES (HALD's ablation table, arXiv 2512.15647; hald = S6),
            "turns" (a hard epoch, one of moved views, and so on), a kind, or the free form
            "soft:75,hard:150,soft:75". A kind's name trains all soft + hard epochs on that one
            kind, so that baselines take equally many steps.
        soft, hard: number of soft-label and hard-label epochs; of S2 to S5 and of turns their sum
            alone counts, as in the published code.
        passes: stored soft labels per image; the n of S2 to S5.
        kinds: the names of all kinds of epoch.

    Returns:
        [(kind, epochs), ...], no empty phase, neighbours merged.

    Raises:
        UserError: unknown name, a free form that does not parse, or no epoch at all.
    """
    match schedule:
        case "hald" | "S6":
            parts = _sandwich("soft", soft, "hard", hard)
        case "S1":
            parts = [("hard", hard), ("soft", soft)]
        case "S2":
            parts = _alternate(("hard", "soft"), soft + hard, passes)
        case "S3":
            parts = _alternate(("hard", "soft"), soft + hard, 2 * passes)
        case "S4":
            parts = _alternate(("soft", "hard"), soft + hard, passes)
        case "S5":
            parts = _alternate(("soft", "hard"), soft + hard, 2 * passes)
        case "S7":
            parts = _sandwich("hard", hard, "soft", soft)
        case "S8":
            parts = [("soft", soft), ("hard", hard)]
        case "turns":
            parts = _alternate(("hard", "moved"), soft + hard, 1)
        case kind if kind in kinds:
            parts = [(kind, soft + hard)]
        case text if ":" in text:
            parts = parse(text, kinds)
        case unknown:
            known = [*NAMES, *kinds]
            raise UserError(
                f"unknown schedule {unknown!r}{did_you_mean(unknown, known)} "
                f'(known: {", ".join(known)}, or the form "soft:75,hard:150,soft:75")'
            )
    merged: list[Phase] = []
    for kind, epochs in parts:
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


def _alternate(kinds: tuple[str, str], epochs: int, every: int) -> list[Phase]:
    """Turns of `every` epochs per kind until `epochs` are spent in all; the last may be shorter."""
    starts = range(0, epochs, every)
    return [(kinds[turn % 2], min(every, epochs - start)) for turn, start in enumerate(starts)]


def parse(text: str, kinds: Sequence[str]) -> list[Phase]:
    """The phases of the free form "soft:75,hard:150"; raises UserError for another form."""
    parts = []
    for part in text.split(","):
        match = re.fullmatch(rf"\s*({'|'.join(kinds)}):(\d+)\s*", part)
        if match is None:
            raise UserError(
                f"schedule {text!r}: {part!r} is not of the form KIND:EPOCHS with KIND one of "
                + ", ".join(kinds)
            )
        parts.append((match[1], int(match[2])))
    return parts


def learning_rate(epoch: int, epochs: int, base: float, eta: float) -> float:
    """base * (1 + cos(pi t / (E eta))) / 2: a cosine that eta = 2 stops at half the base rate."""
    return base * 0.5 * (1 + math.cos(math.pi * epoch / (epochs * eta)))


def temperature(epoch: int, epochs: int, first: float, last: float) -> float:
    """From `first` to `last` by equal factors per epoch: T = first * (last / first)^(t / (E-1))."""
    return first * (last / first) ** (epoch / max(epochs - 1, 1))


def auto_soft_epochs(total: int, labels_per_image: int, classes: int) -> int:
    """How many of `total` epochs are to be soft: half, or three quarters where labels tell much.

    What they tell is labels per image x log10(classes), as a label of more classes tells more;
    three quarters from 4 on. Source: analysis/study.md, where of ten classes half is best at 1 and
    3 labels per image and three quarters at 5; of 200 classes the two are equal at 1 and 2 labels
    per image, and three quarters best at 3 and 5.
    """
    told = labels_per_image * math.log10(classes)
    return round(total * (3 / 4 if told >= 4 else 1 / 2))


def label_batches(stored: int, keep: int, chosen: str, seed: int) -> list[int]:
    """The stored label batches that soft epochs draw from: the pool.

    Args:
        stored, keep: how many there are, and how many of them to use.
        chosen: "first", or "random": chosen by the seed, LPLD's random pruning.
    """
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
    """The label batches of an epoch: drawn without replacement from shuffle after shuffle.

    A pure function of the epoch, so that a run that continues needs no state of the pool. Every
    phase begins with a new shuffle of the whole pool; another follows whenever one is used up.

    Args:
        phases: of the whole run.
        epoch: counted from 0, of a kind that draws from the pool.
        per_epoch: label batches that such an epoch draws.
        pool: the label batches to draw from.
        drawing: the kinds of epoch that draw from the pool.
        seed: of the run.
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

"""Trellis-coded quantisation, and its whole numbers as bytes.

Two quantisers share the whole numbers: the first has the even ones, the second 0 and the odd ones.
Which of them serves component k of a label follows from the label's components before k, so that
each has the spacing of 2, but paths through both come as near to the label as a finer spacing does
(Marcellin and Fischer, Trellis coded quantization of memoryless and Gauss-Markov sources, 1990).

A number u is the index i = sign(u) * ((|u| + 1) // 2) of its quantiser. With q[k] = 1 where the
second one serves, q[k] = q[k - 1] ^ q[k - 3] ^ (i[k - 2] & 1), and 0 before the first: Ungerboeck's
code of eight states.
"""

import numpy as np
import torch

from utils.cli import UserError
from utils.labels.codecs.packing import DAMAGED, pack_integers, unpack_integers

# What it costs to be 0 under the second quantiser, where 0 is rare, in squared spacings of numbers.
_RARE_ZERO = 0.7
# What a number is modulo 4, by quantiser, where its index is even and where it is odd.
_REMAINDERS = ((0.0, 2.0), (3.0, 1.0))
_TOGETHER = 8  # components whose distances are computed at once
_BEFORE = 3  # rows of zeros for what a path looks back to before the first component


def _distances(size: torch.Tensor) -> torch.Tensor:
    """float32 [K, 2, 3, N]: squared distances of [K, N], at least 0, to the nearest numbers.

    By quantiser, and to an even, an odd and an even index: any two neighbours are both ways on.
    """
    within = (size / 4).frac_().mul_(4)
    to_two = (within - 2).abs_()
    to_three = ((within - 1).abs_() - 2).abs_()
    lost = size.new_empty((len(size), 2, 3, size.shape[1]))
    torch.square(2 - to_two, out=lost[:, 0, 0])
    torch.square(to_two, out=lost[:, 0, 1])
    torch.square(2 - to_three, out=lost[:, 1, 1])
    torch.minimum(to_three.square_(), size.square() + _RARE_ZERO, out=lost[:, 1, 0])
    lost[:, :, 2] = lost[:, :, 0]
    return lost


def quantise(values: torch.Tensor) -> torch.Tensor:
    """int16 [K, N]: the cheapest paths for float32 [K, N], whose columns are labels.

    The Viterbi algorithm for all columns at once. A state (q, w, c) says which quantiser served,
    and what the next two depend on: the next is q ^ w, and its w is c. All of it is elementwise: a
    label's path depends neither on other labels nor on the number of threads.
    """
    components, labels = values.shape
    size = values.abs()
    cost = values.new_full((2, 2, 2, labels), 1e30)
    cost[0, 0, 0] = 0
    # Whether the cheapest way to a state comes from the second quantiser.
    came = torch.empty((components, 2, 2, 2, labels), dtype=torch.bool, device=values.device)
    for sizes, ways in zip(size.split(_TOGETHER), came.split(_TOGETHER), strict=True):
        lost = _distances(sizes)
        first_way, second_way = lost[:, :, None, :2].unbind(), lost[:, :, None, 1:].unbind()
        for lost_first, lost_second, way in zip(first_way, second_way, ways, strict=True):
            after_first = cost[0].unsqueeze(2) + lost_first
            after_second = cost[1].flip(0).unsqueeze(2) + lost_second
            torch.lt(after_second, after_first, out=way)
            cost = torch.minimum(after_first, after_second)
    # Back along the cheapest path: a step is 8q + 4w + 2c + whether it came from the second one.
    steps = [(step >> 3, step >> 2 & 1, step >> 1 & 1, step & 1) for step in range(16)]
    remainder_of = values.new_tensor([_REMAINDERS[q][c ^ last] for q, _, c, last in steps])
    before = torch.tensor([4 * last + 2 * (q ^ last) + w for q, w, _, last in steps])
    before, start = before.to(values.device), torch.empty_like(size)
    state = cost.view(8, labels).argmin(0)
    for component in range(components - 1, -1, -1):
        from_second = came[component].view(8, labels).gather(0, state[None])[0]
        step = torch.add(from_second, state, alpha=2)
        torch.index_select(remainder_of, 0, step, out=start[component])
        state = before.index_select(0, step)
    numbers = start + 4 * ((size - start) / 4).round_()
    # Only the second quantiser's even indices have a remainder of 3; index 0 is number 0 there.
    is_zero = size.square() + _RARE_ZERO < (size - numbers).square()
    numbers[(start == 3) & is_zero] = 0
    return torch.where(values < 0, -numbers, numbers).short()


def pack_numbers(numbers: np.ndarray) -> bytes:
    """Bytes of int16 [K, N], each column a path: see `unpack_numbers`."""
    index = np.sign(numbers) * ((np.abs(numbers) + 1) >> 1)
    by_second, odd = np.zeros((2, _BEFORE + len(index), index.shape[1]), dtype=bool)
    odd[_BEFORE:] = index & 1
    for k in range(_BEFORE, len(odd)):
        by_second[k] = by_second[k - 1] ^ by_second[k - 3] ^ odd[k - 2]
    second = by_second[_BEFORE:]
    first_stream = pack_integers(index[~second])
    return len(first_stream).to_bytes(4, "little") + first_stream + pack_integers(index[second])


def unpack_numbers(packed: bytes, components: int, labels: int) -> np.ndarray:
    """int16 [components, labels]: the inverse of pack_numbers; raises UserError on damage.

    The indices of both quantisers, whose frequencies differ, are streams of their own, component by
    component: uint32 bytes of the first, then both.
    """
    end = 4 + int.from_bytes(packed[:4], "little")
    first = unpack_integers(packed[4:end], components * labels)
    second = unpack_integers(packed[end:], components * labels)
    if len(first) + len(second) != components * labels:  # before memory is taken for so many
        raise UserError(DAMAGED)
    numbers = np.empty((components, labels), dtype=np.int16)
    by_second, odd = np.zeros((2, _BEFORE + components, labels), dtype=bool)
    for k, row in enumerate(numbers, start=_BEFORE):
        by_second[k] = by_second[k - 1] ^ by_second[k - 3] ^ odd[k - 2]
        (from_first,), (from_second,) = (~by_second[k]).nonzero(), by_second[k].nonzero()
        if len(from_first) > len(first) or len(from_second) > len(second):
            raise UserError(DAMAGED)
        row[from_first], first = first[: len(from_first)], first[len(from_first) :]
        row[from_second], second = second[: len(from_second)], second[len(from_second) :]
        odd[k] = row & 1
    numbers *= 2
    numbers -= np.sign(numbers) * by_second[_BEFORE:]
    return numbers

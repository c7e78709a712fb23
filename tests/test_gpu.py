"""What only a GPU can show: mixed precision labels and training, exact replay on the device."""

import json

import numpy as np
import pytest
import torch
from conftest import TINY, generate_arguments, train_arguments

from relabel import generate
from utils.data import folders, images
from utils.data.images import ResidentImages
from utils.data.views import ViewSpec, draw
from utils.labels import LabelSet
from validate import kinds, train

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("amp", ["fp16", "bf16", "off"])
def test_labels_agree_with_those_of_the_cpu(world, tmp_path, command, amp):
    arguments = generate_arguments(world.data, tmp_path / "l", world.weights, "--slc", 6)
    done = command(generate.main, *arguments, "--device", "cuda", "--amp", amp)
    assert done.code == 0, done.err
    reference, found = LabelSet.open(world.labels), LabelSet.open(tmp_path / "l")
    for number in range(len(reference)):
        expected, logits = reference[number].logits, found[number].logits
        assert (logits - expected).norm() / expected.norm() < {"off": 2e-3}.get(amp, 0.05)


def test_views_are_replayed_bit_for_bit_on_the_device(world):
    device = torch.device("cuda")
    pixels = images.load_evaluation(folders.scan(world.data), TINY)
    source = ResidentImages(pixels, TINY, device)
    views = draw(ViewSpec(32, 5), np.full((12, 2), 32), 42).to(device)
    first, second = (list(source.render(list(views))) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("amp", ["fp16", "bf16", "off"])
def test_training_learns_and_resumes(world, tmp_path, command, amp, monkeypatch):
    output = tmp_path / "run"
    arguments = train_arguments(world, output, "--soft-epochs", 10, "--hard-epochs", 10)
    arguments += ["--device", "cuda", "--amp", amp, "--soft-loss-scale", "T2"]
    original = kinds.draw

    def stop(spec, sizes, seed, epoch=0):
        if epoch == 9:
            raise KeyboardInterrupt
        return original(spec, sizes, seed, epoch)

    monkeypatch.setattr(kinds, "draw", stop)
    assert command(train.main, *arguments).code == 130
    monkeypatch.setattr(kinds, "draw", original)
    done = command(train.main, *arguments)
    assert done.code == 0 and "continuing after epoch 8 of 20" in done.out, done.err
    assert json.loads((output / "result.json").read_text())["last"]["top1"] > 50

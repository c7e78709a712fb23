"""What the label benchmarks compute, on hand-worked numbers."""

import pytest
import torch

from benchmarks import label_size
from utils.data.views import Mixture


def test_a_codecs_bytes_are_counted_with_its_fitted_part(monkeypatch):
    monkeypatch.setattr(label_size, "CLASSES", 10)
    monkeypatch.setattr(label_size, "SET_LABELS", 1000)
    logits = torch.randn(40, 10, generator=torch.Generator().manual_seed(0))
    logits -= logits.mean(1, keepdim=True)
    photos = torch.arange(40) % 4
    mixture = Mixture(own=photos, partner=photos, lam=torch.ones(40))
    row = label_size.measure({"name": "fp16"}, logits, mixture, "plain")
    assert (row["bytes_per_label"], row["fitted"], row["top1_agreement"]) == (20, 0, 1)
    assert row["distortion_t20"] < 1e-5
    row = label_size.measure({"name": "klt", "distortion": 0.01}, logits, mixture, "plain")
    assert row["setting"] == "distortion=0.01" and row["fitted"] > 0
    assert row["bytes_per_label"] == pytest.approx(row["payload"] + row["fitted"], abs=0.011)
    assert 0.005 < row["distortion_t20"] < 0.02

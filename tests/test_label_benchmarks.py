"""What the label benchmarks compute, on hand-worked numbers."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import glyphs, label_size
from utils.cli import UserError
from utils.data.views import Mixture


def test_characters_that_look_alike_are_not_both_chosen(monkeypatch):
    monkeypatch.setattr(glyphs, "CLASSES", 2)
    monkeypatch.setattr(glyphs, "CANDIDATES", [65, 66, 67])
    pictures = np.eye(3, 4, dtype=np.uint8) * 255
    pictures[1] = pictures[0]
    family = dict(zip("ABC", pictures, strict=True))
    assert glyphs.choose_characters([family]) == ["A", "C"]
    monkeypatch.setattr(glyphs, "CLASSES", 4)
    with pytest.raises(UserError, match="only 3 characters"):
        glyphs.choose_characters([family])


def test_families_of_one_folder_are_in_one_split_and_none_is_lost():
    families = {
        f"{folder}{one}": (Path(f"{folder}/{one}"), set()) for folder in "abcdefgh" for one in "12"
    }
    splits = glyphs.split_families(families)
    assert {split: len(names) for split, names in splits.items()} == {
        "test": 4,
        "val": 2,
        "train": 10,
    }
    assert sorted([*splits["test"], *splits["val"], *splits["train"]]) == sorted(families)
    for names in splits.values():
        assert all(f"{name[0]}1" in names and f"{name[0]}2" in names for name in names)


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

"""What the label benchmarks compute, on hand-worked numbers."""

from pathlib import Path

import numpy as np
import pytest
import torch

from analysis.tables import read_csv
from benchmarks import glyphs, label_size, packing
from utils import runtime
from utils.cli import UserError
from utils.data.views import Mixture
from utils.labels import LabelSet, centre
from utils.labels.codecs.base import distortion


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


def test_packing_is_timed_with_and_without_processes(monkeypatch, tmp_path, command):
    for name, value in {"CLASSES": 10, "SET_LABELS": 160, "_SAMPLE": 160, "_STARTING": 0}.items():
        monkeypatch.setattr(packing, name, value)
    arguments = ("--views", 80, "--images", 40, "--packers", 0, 1, "--repeats", 2)
    done = command(packing.main, "--out", tmp_path / "rates.csv", *arguments, "--device", "cpu")
    assert done.code == 0, done.err
    rows = read_csv(tmp_path / "rates.csv")
    assert [row["packers"] for row in rows] == ["0", "0", "1", "1"]
    assert all(int(row["views_per_second"]) > 0 for row in rows)
    assert "bytes per label in passes of 40; fitted in" in done.out


def test_what_is_packed_are_the_logits_of_the_costless_teacher(monkeypatch, tmp_path):
    for name, value in {"CLASSES": 10, "SET_LABELS": 80, "_SAMPLE": 80}.items():
        monkeypatch.setattr(packing, name, value)
    teacher, labels = packing.Free(runtime.start("cpu", "off")), torch.arange(40) // 4
    writer = packing.new_writer(tmp_path, 40)
    with writer.begun():
        packing.fit_codec(writer, teacher, teacher, labels)
        (rate,) = packing.rates(writer, teacher, labels, packers=0, passes=2, repeats=1)
        writer.finish()
    assert rate > 0
    stored = LabelSet.open(writer.path)
    found = torch.cat([stored.whole_pass(pass_index).logits for pass_index in range(2)])
    assert distortion(centre(teacher.stored), found) < 0.003

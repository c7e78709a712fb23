"""The pure functions of the label benchmarks, on hand-worked numbers."""

import numpy as np
import pytest

from benchmarks import glyphs, label_size
from utils.cli import UserError


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


def test_a_step_is_found_that_keeps_a_budget():
    step = label_size.step_for(32, lambda step: 100 * step**-1.7)
    assert 0.99 * 32 < 100 * step**-1.7 <= 32

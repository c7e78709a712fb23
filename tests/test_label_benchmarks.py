"""The pure functions of the label benchmarks, on hand-worked numbers."""

import numpy as np
import pytest

from benchmarks import accuracy_per_byte, accuracy_tables, glyphs, label_size
from utils.cli import UserError
from utils.results import write_csv


def line(question: str, codec: str, top1: float, size: float, **more) -> dict:
    row = {"data": "glyphs", "question": question, "codec": codec, "top1": top1, "passes": 1}
    row |= {"bytes_per_label": size, "distortion_t20": 0, "label_bytes": size, "schedule": "soft"}
    return row | {"budget": 1} | more


def test_the_factor_is_the_largest_within_one_standard_deviation():
    rows = [line("near-lossless", "fp16", top1, 400) for top1 in (79, 80, 81)]
    rows += [line("near-lossless", "klt --distortion 0.01", top1, 20) for top1 in (79, 79.5)]
    rows += [line("near-lossless", "klt --distortion 0.1", top1, 10) for top1 in (78, 78.5)]
    text = accuracy_tables.tables(rows)
    assert "| glyphs | klt | 20.0 | 20.0 | 0.0000 | 79.2 ± 0.4 (2) |" in text
    assert "glyphs: no more than one standard deviation below fp16: 20.0 times" in text


def test_codecs_stand_side_by_side_at_equal_bytes():
    rows = [line("equal bytes", "fp16", top1, 400) for top1 in (60, 62)]
    rows += [line("equal bytes", "quant --bits 4", 66, 390, passes=4)]
    text = accuracy_tables.tables(rows)
    assert "| data | schedule | bytes | fp16 | quant 4 |" in text
    assert "| glyphs | soft | 400 | 61.0 ± 1.4 (2), 1 | 66.0 (1), 4 |" in text


def test_codecs_stand_side_by_side_at_as_many_labels():
    rows = [line("equal labels", "fp16", 60, 1234), line("equal labels", "topk --topk 2", 50, 99)]
    rows += [line("equal labels", "fp16", top1, 3600, passes=3) for top1 in (65, 67)]
    text = accuracy_tables.tables(rows)
    assert "| data | labels per image | fp16 | topk 2 |" in text
    assert "| glyphs | 1 | 60.0 (1), 1,234 | 50.0 (1), 99 |" in text
    assert "| glyphs | 3 | 66.0 ± 1.4 (2), 3,600 | – |" in text


def test_below_one_label_per_image_a_budget_buys_fewer_images():
    assert [accuracy_per_byte.afforded(budget) for budget in (3, 10, 30)] == [
        (3, 1),
        (10, 1),
        (10, 3),
    ]


def test_a_data_set_that_is_not_run_again_keeps_its_lines_and_where_they_come_from(tmp_path):
    path = tmp_path / "a.csv"
    write_csv([{"data": "glyphs", "top1": 50.5}], path, "a remark", "glyphs: then; there: a, b")
    assert path.read_text().splitlines()[:3] == [
        "# a remark",
        "# glyphs: then; there: a, b",
        "data,top1",
    ]
    assert accuracy_per_byte.read_csv(path) == (
        [{"data": "glyphs", "top1": "50.5"}],
        {"glyphs": "then; there: a, b"},
    )


def test_a_setting_is_chosen_by_its_mean():
    rows = [{"rate": 1, "top1": 50}, {"rate": 1, "top1": 60}, {"rate": 2, "top1": 56}]
    assert accuracy_per_byte.best(rows, "rate") == 2


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

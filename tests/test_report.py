"""report.py: bytes by purpose, what a codec lost, and drift, against direct computations."""

import csv
import json

import numpy as np
import pytest
import torch

from relabel import compress, drift, report
from relabel.compress import compare
from utils.labels import LabelSet, LabelWriter
from utils.labels.codecs.base import distortion
from utils.results import write_csv

CLASSES = 4


@pytest.fixture(scope="module")
def klt(world, tmp_path_factory):
    """The world's labels in klt, at a visible distortion."""
    path = tmp_path_factory.mktemp("report") / "klt"
    with pytest.MonkeyPatch.context() as patch:
        words = ["compress.py", "--label-dir", world.labels, "--out-dir", path]
        words += ["--codec", "klt", "--distortion", "0.1"]
        patch.setattr("sys.argv", [*map(str, words)])
        compress.main()
    return path


def labels_and_views(path) -> tuple[LabelSet, list]:
    """Every label of a set: (pass, image, lambda, partner, both crop areas, probabilities)."""
    labels = LabelSet.open(path)
    found = []
    for number in range(len(labels)):
        batch = labels[number]
        views, lam = batch.views, batch.views.lam(labels.spec.input_size)
        for row in range(len(views.index)):
            index, partner = int(views.index[row]), int(views.index[views.mix_index[row]])
            other = int(views.mix_index[row])
            area = [
                float(views.box[place, 2] * views.box[place, 3]) / 32**2 for place in (row, other)
            ]
            pass_number = number // labels.batches_per_pass
            soft = batch.logits[row].double().softmax(0).numpy()
            found.append((pass_number, index, float(lam[row]), partner, area, soft))
    return labels, found


def test_bytes_by_purpose_add_up(world, klt):
    for path in (world.labels, klt):
        found = report.report_sizes(LabelSet.open(path))["bytes"]
        total = found.pop("total")
        assert total == sum(found.values()) == sum(file.stat().st_size for file in path.iterdir())
        assert found["views"] == 0 and found["manifest"] == (path / "manifest.json").stat().st_size
        payload = [np.load(file)["payload"].nbytes for file in path.glob("pass_*.npz")]
        assert found["logits"] == sum(payload)
    assert found["codec, fitted part"] == (klt / "codec.npz").stat().st_size


def test_the_factor_against_fp16_of_another_codec(world, klt):
    same = report.report_sizes(LabelSet.open(world.labels))
    assert same["factor against fp16"] == 1
    other = report.report_sizes(LabelSet.open(klt))
    parts = other["bytes"]
    rest = parts["views"] + parts["manifest"] + parts["checksums, headers"]
    expected = (rest + 24 * 2 * CLASSES) / parts["total"]
    assert other["factor against fp16"] == pytest.approx(expected, abs=1e-3)


def test_spread_of_two_passes_is_the_trace_of_the_sample_covariance(world):
    labels, rows = labels_and_views(world.labels)
    found = drift.measure(labels)
    for image in range(12):
        soft = np.stack([row[5] for row in rows if row[1] == image])
        assert len(soft) == 2
        assert found.spread[image] == pytest.approx(np.trace(np.cov(soft.T)), abs=1e-6)


def test_a_view_drifts_when_its_top1_class_is_none_of_its_classes(world):
    """It counts for the image that covers most of it; a hit of the partner's class is no drift."""
    labels, rows = labels_and_views(world.labels)
    found = drift.measure(labels)
    views, drifting, hits_of_partners = np.zeros(12), np.zeros(12), 0
    by_area, gaps = np.zeros((10, 2)), {}
    for _, index, lam, partner, area, soft in rows:
        main, other, size = (index, partner, area[0]) if lam >= 0.5 else (partner, index, area[1])
        present = [main // 3, other // 3] if 0 < lam < 1 else [main // 3]
        wrong = soft.argmax() not in present
        views[main] += 1
        drifting[main] += wrong
        hits_of_partners += not wrong and soft.argmax() != main // 3
        by_area[min(int(size * 10), 9)] += 1, wrong
        if wrong:
            gaps[main] = max(gaps.get(main, 0), soft.max() - soft[present].max())
    assert hits_of_partners > 0  # else this test says less than it should
    for told, expected in (
        (report.image_rows(labels, found, [""] * 12), zip(views, drifting, strict=True)),
        (report.area_rows(found), by_area),
    ):
        counts = [(row["views"], row["drifting"]) for row in told]
        assert counts == [tuple(each) for each in expected]
    expected = sorted(gaps.values(), reverse=True)[:3]
    assert found.gap[found.worst(3)].tolist() == pytest.approx(expected, abs=1e-5)


def test_what_a_codec_lost_is_measured_against_the_reference(world, klt, command):
    run = command(report.main, "--label-dir", klt)
    assert run.code == 0 and "not known without --reference" in run.out
    labels, reference = LabelSet.open(klt), LabelSet.open(world.labels)
    found, expected = (
        torch.cat([each[batch].logits for batch in range(len(each))])
        for each in (labels, reference)
    )
    distortions, same = compare(labels, reference, range(labels.passes), (20, 4, 1))
    for t, value in zip((20, 4, 1), distortions, strict=True):
        assert value == pytest.approx(distortion(expected, found, t), rel=1e-5)
    assert same == pytest.approx(float((found.argmax(1) == expected.argmax(1)).float().mean()))
    run = command(report.main, "--label-dir", klt, "--reference", world.labels)
    assert run.code == 0 and f"{distortions[0]:.5f}" in run.out


def test_labels_that_say_nothing_have_nothing_to_lose(world, tmp_path):
    known = LabelSet.open(world.labels)
    settings = {**known.manifest, "passes": 1, "slc": 3}
    writer = LabelWriter(tmp_path / "uniform", settings, known.sizes)
    with writer.begun():
        views = writer.draw(0)
        writer.write_pass(0, torch.full((len(views.index), CLASSES), 2.0), views, known.hard_labels)
        writer.finish()
    uniform = LabelSet.open(writer.path)
    assert compare(uniform, uniform, [0], (20.0,)) == ([0.0], 1.0)


def test_a_reference_in_a_lossy_codec_is_refused(world, klt, command):
    run = command(report.main, "--label-dir", world.labels, "--reference", klt)
    assert run.code == 2 and "is not in codec fp16" in run.err


def test_tables_and_pictures(world, tmp_path, command):
    arguments = ("--label-dir", world.labels, "--data-dir", world.data, "--samples", 2)
    run = command(report.main, *arguments, "--out-dir", tmp_path / "R")
    assert run.code == 0 and "Tr(Sigma)" in run.out
    names = {"images.csv", "classes.csv", "crop_area.csv", "views.csv", "report.json", "drift.png"}
    names |= {"drift.pdf", "views.png", "views.pdf"}
    assert names <= {path.name for path in (tmp_path / "R").iterdir()}
    with (tmp_path / "R" / "images.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows][:2] == ["00000/0.png", "00000/1.png"]
    assert sum(int(row["views"]) for row in rows) == 24
    with (tmp_path / "R" / "views.csv").open() as file:
        drifting = list(csv.DictReader(file))
    assert len(drifting) == 2 and len({row["image"] for row in drifting}) == 2
    for row in drifting:
        labels = LabelSet.open(world.labels)
        batch, position = divmod(int(row["row"]), 5)
        soft = labels[3 * int(row["pass"]) + batch].logits[position].softmax(0)
        name, probability = row["top1"].split()
        assert name == labels.manifest["classes"][int(soft.argmax())] != row["class"]
        assert float(probability) == pytest.approx(float(soft.max()), abs=1e-4)
    found = json.loads((tmp_path / "R" / "report.json").read_text())
    assert found["sizes"]["bytes"]["total"] == LabelSet.open(world.labels).bytes_on_disk()


def test_the_share_of_drifting_views_is_the_same_in_every_table_and_picture(world, capsys):
    labels = LabelSet.open(world.labels)
    measured = drift.measure(labels)
    views, count = len(measured.drifts), int(measured.drifts.sum())
    told = report.report_drift(measured)
    assert f"views that drift: {100 * count / views:.1f} % of {views}" in capsys.readouterr().out
    assert told["drifting"] == count / views
    files = [str(image) for image in range(12)]
    for rows in (report.area_rows(measured), report.image_rows(labels, measured, files)):
        assert sum(row["drifting"] for row in rows) == count
    by_class = report.class_rows(labels, measured)
    assert sum(row["views"] * row["drifting_share"] for row in by_class) == pytest.approx(
        count, rel=1e-3
    )
    bars = report.draw_drift(labels, measured).axes[0].patches
    shown = [row for row in report.area_rows(measured) if row["views"]]
    heights = [bar.get_height() * row["views"] for bar, row in zip(bars, shown, strict=True)]
    assert sum(heights) == pytest.approx(100 * count)


def test_the_top1_of_the_teacher_is_that_of_its_own_output_in_any_codec(world, klt, command):
    told = LabelSet.open(world.labels).manifest["teacher_top1"]
    for path in (world.labels, klt):
        run = command(report.main, "--label-dir", path)
        assert f"; teacher top-1 on the views {told:.1f} %\n" in run.out


def test_bars_of_drift_name_classes_and_count_views(world):
    labels = LabelSet.open(world.labels)
    measured = drift.measure(labels)
    by_area, by_class, spread = report.draw_drift(labels, measured).axes
    rows = report.class_rows(labels, measured)
    names = [label.get_text() for label in by_class.get_yticklabels()]
    assert names == [row["name"] for row in rows]
    widths = [bar.get_width() for bar in by_class.patches]
    assert widths == [100 * row["drifting_share"] for row in rows] == sorted(widths, reverse=True)
    assert by_class.yaxis_inverted()  # the first is on top
    texts = [text.get_text() for text in by_class.texts]
    assert texts == [f"{100 * row['drifting_share']:.0f} % of {row['views']}" for row in rows]
    counts = [int(text.get_text().split()[-1]) for text in by_area.texts]
    assert counts == [row["views"] for row in report.area_rows(measured) if row["views"]]
    assert sum(bar.get_height() for bar in spread.patches) == 12


def test_of_many_classes_the_twenty_that_drift_most_are_drawn(world):
    measured = drift.measure(LabelSet.open(world.labels))
    many = LabelSet.open(world.labels)
    many.manifest["num_classes"] = 30
    many.manifest["classes"] = [f"{label} " + "long name " * 3 for label in range(30)]
    measured.label = np.arange(24)  # class 7, all of whose views drift, is the worst
    measured.drifts = np.arange(24) == 7
    _, by_class, _ = report.draw_drift(many, measured).axes
    names = [label.get_text() for label in by_class.get_yticklabels()]
    assert len(names) == 20 and names[0].startswith("7 long") and names[0].endswith("…")
    assert max(map(len, names)) == 24 and "worst 20 of 24" in by_class.get_title()


def test_without_a_second_pass_no_spread_is_drawn(world):
    labels = LabelSet.open(world.labels)
    measured = drift.measure(labels)
    measured.spread[:] = np.nan
    assert len(report.draw_drift(labels, measured).axes) == 2


def test_pictured_views_name_both_classes_and_box_the_crop_to_the_pixel(world, capsys):
    labels = LabelSet.open(world.labels)
    measured = drift.measure(labels)
    worst = measured.worst(4)
    folder = report.open_folder(labels, world.data)
    rows = report.view_rows(labels, measured, worst, [str(path) for path in folder.files])
    panels = report.draw_views(labels, rows, folder).axes[: 2 * len(rows)]
    assert "100%" in capsys.readouterr().err  # the bar of the views
    for left, row, position in zip(panels[::2], rows, worst.tolist(), strict=True):
        assert measured.drifts[position]
        title = left.get_title()
        assert f"{row['class']}, λ = {row['lam']:.2f}" in title
        assert row["lam"] >= 0.5 and (f"partner {row['partner']}" in title) == (row["lam"] < 1)
        (box,) = left.patches
        views = labels.views(3 * row["pass"] + row["row"] // 5)
        area = box.get_width() * box.get_height() / 32**2
        assert area == pytest.approx(row["crop_area"], abs=1e-4)
        corners = {(top - 0.5, left - 0.5) for top, left, _, _ in views.box.tolist()}
        assert (box.get_y(), box.get_x()) in corners
        limit = left.get_xlim()[1]
        assert box.get_x() >= -0.5 and box.get_x() + box.get_width() <= limit == 31.5


def test_a_table_without_rows_has_its_header(tmp_path):
    write_csv([], tmp_path / "none.csv", "nothing", columns=("pass", "row"))
    assert (tmp_path / "none.csv").read_text() == "# nothing\npass,row\n"
    write_csv([{"row": 1}], tmp_path / "one.csv", columns=("pass", "row"))
    assert (tmp_path / "one.csv").read_text() == "pass,row\n,1\n"


def test_other_images_are_refused(world, command):
    run = command(report.main, "--label-dir", world.labels, "--data-dir", world.val)
    assert run.code == 2 and "does not hold the images" in run.err

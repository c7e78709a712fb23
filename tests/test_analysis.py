"""The studies: what they measure, against numbers worked by hand or by other means."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, script, train_arguments, write_images
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from analysis import compare, consistency, gradients, landscape, replay, study, tables, updates
from utils import runlog
from utils.cli import UserError
from utils.files import load_tensors, save_figure, save_tensors
from utils.results import write_csv
from validate import train


@pytest.fixture(scope="module")
def run(world) -> Path:
    """A finished run: soft, two hard epochs, soft, the loss balanced."""
    output = world.root / "studied_seed0"
    more = ("--soft-loss-scale", "T2", "--temperature", 4, "--label-smoothing", 0.1)
    done = script(ROOT / "validate/train.py", *train_arguments(world, output, *more))
    assert done.returncode == 0, done.stderr
    return output


def test_a_replayed_run_ends_with_the_weights_of_its_checkpoint(run):
    again = replay.Replay(run, "again")
    for epoch in range(len(again.settings.kinds)):
        again.train_epoch(epoch)
    recorded = load_tensors(run / "checkpoint.pt", "checkpoint")["model"]
    trained = again.training.student.state_dict()
    assert all(torch.equal(trained[name], recorded[name]) for name in recorded)


def test_what_is_not_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not a run folder"):
        replay.Replay(tmp_path, "again")


def test_a_run_whose_images_have_changed_is_not_trained_again(world, run, tmp_path):
    """args.yaml is what names the images."""
    write_images(tmp_path / "data", 3, seed=9)
    shutil.copytree(run, tmp_path / "run")
    text = (run / "args.yaml").read_text()
    text = text.replace(str(world.data), str(tmp_path / "data"))
    (tmp_path / "run" / "args.yaml").write_text(
        text.replace(f"label_dir: {world.labels}", "label_dir: null")
    )
    with pytest.raises(UserError, match="cannot be trained again as it was: images_sha256"):
        replay.Replay(tmp_path / "run", "again")


def test_code_that_a_run_names_is_not_run_unless_confirmed(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    arguments = tmp_path / "run" / "args.yaml"
    arguments.write_text(arguments.read_text().replace("model: ConvNetW32", "model: os:abort"))
    with pytest.raises(UserError, match="confirm with --model os:abort"):
        replay.Replay(tmp_path / "run", "again")


def test_gradients_are_those_of_the_two_losses(run):
    """One batch, the two gradients once more by .backward() on losses written out."""
    again = replay.Replay(run, "again")
    measured = gradients.measure(again, 2)
    labels, cosines = again.training.data.labels, []
    student, source = again.training.student, again.training.data.source
    for index in (0, 1):
        batch, sides = labels[index], []
        own, partner, _ = batch.views.mixture(labels.hard_labels, 32)
        lam = batch.views.lam(32)[:, None]
        target = lam * nn.functional.one_hot(own, 4) + (1 - lam) * nn.functional.one_hot(partner, 4)
        for side in ("hard", "soft"):
            student.zero_grad()
            logits = student.train()(next(source.render([batch.views])))
            if side == "hard":
                loss = -((0.9 * target + 0.025) * logits.log_softmax(1)).sum(1).mean()
            else:
                teacher = (batch.logits / 4).softmax(1)
                loss = (teacher * (teacher.log() - (logits / 4).log_softmax(1))).sum(1).mean()
            loss.backward()
            sides.append(torch.cat([p.grad.flatten() for p in student.parameters()]))
        cosines.append(float(sides[0] @ sides[1] / sides[0].norm() / sides[1].norm()))
    assert measured["cosine"] == pytest.approx(sum(cosines) / 2, abs=1e-4)


def test_gradients_and_updates_draw_and_record(run, tmp_path, command):
    done = command(gradients.main, "--run", run, "--out", tmp_path / "g", "--every", 2)
    assert done.code == 0, done.err
    done = command(updates.main, "--out", tmp_path / "u", f"a={run}")
    assert done.code == 0, done.err
    for name in ("g", "u"):
        assert Image.open(tmp_path / f"{name}.png").size[0] > 600
    about, *lines = (tmp_path / "g.csv").read_text().splitlines()
    assert about.startswith("# ") and "--every 2" in about and len(lines) == 1 + 3
    assert len((tmp_path / "u.csv").read_text().splitlines()) == 2 + 2 * 12


def finished(folder: Path, kinds: list[str]) -> Path:
    """A run folder as far as it is compared: evaluated after every epoch."""
    folder.mkdir()
    lines = [
        {"epoch": epoch + 1, "kind": kind, "loss": 1.0, "train_top1": 10.0, "val_top1": 20.0}
        for epoch, kind in enumerate(kinds)
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "args.yaml").write_text("settings: {}\n")
    end = {"epoch": len(kinds), "top1": 20.0, "top5": 50.0}
    result = {"best": end, "last": end, "label_bytes": 7, "epochs": len(kinds), "seconds": 1.0}
    facts = {"model": "ConvNetW32", "dataset": "custom", "seed": 0}
    (folder / "result.json").write_text(json.dumps(result | facts))
    return folder


def test_runs_of_different_length_have_axes_of_their_own(tmp_path):
    finished(tmp_path / "long", ["soft"] * 60)
    finished(tmp_path / "short", ["soft", "hard", "hard", "soft"])
    groups = [(name, compare.finished_runs(str(tmp_path / name))) for name in ("long", "short")]
    panels = compare.draw_curves(groups).axes
    assert [axes.get_xlim() for axes in panels] == [(0, 60), (0, 4)]
    heading, *lines = compare.table(groups).splitlines()
    column = heading.split().index("epochs") - heading.split().index("seeds")
    assert [line.split()[column - 1] for line in lines] == ["60", "4"]


def test_panels_are_equally_wide_and_their_titles_fit(tmp_path):
    finished(tmp_path / "run", ["soft"] * 3)
    runs = compare.finished_runs(str(tmp_path / "run"))
    figure = compare.draw_curves([(name, runs) for name in ("a", "long name, " * 9, "c")])
    figure.draw_without_rendering()
    shown = [axes for axes in figure.axes if axes.axison]
    assert len({round(axes.get_position().width, 6) for axes in shown}) == 1
    for axes in shown:
        assert axes.title.get_window_extent().width < axes.get_window_extent().width


def test_a_phase_of_one_epoch_is_drawn(tmp_path):
    run = runlog.RunFolder(finished(tmp_path / "run", ["soft", "hard", "hard", "soft"]))
    figure = runlog.plot_curves(run.log_lines(), run.result(), {})
    for axes in figure.axes:
        assert [line.get_marker() for line in axes.get_lines()] == ["."] * 2
    run.draw_curves(run.result(), {})
    assert (run.path / "curves.pdf").exists()


def test_update_lengths_are_those_of_the_weights(run):
    again = replay.Replay(run, "again")
    start = torch.cat([p.detach().flatten() for p in again.training.student.parameters()])
    lengths, starts = updates.update_lengths(again)
    assert starts == [0, 3, 6, 9] and len(lengths) == 12
    once = replay.Replay(run, "once")
    student, after = once.training.student, []
    once.training.optimizer.register_step_post_hook(
        lambda *_: after.append(torch.cat([p.detach().flatten() for p in student.parameters()]))
    )
    once.train_epoch(0)
    moved = (after[0] - start).norm() / after[0].norm()
    assert lengths[0] == pytest.approx(moved.item(), rel=1e-4)


def test_phases_switch_where_the_kind_changes():
    assert updates.switches(["soft", "soft", "hard", "soft"]) == [2, 3]
    assert updates.smoothed([1.0, 100.0], width=2) == pytest.approx([1, 10])


def test_jensen_shannon_divergence_in_bits():
    """Disjoint: 1 bit. (1, 0) and (1/2, 1/2): middle (3/4, 1/4)."""
    one = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.3, 0.7]])
    other = torch.tensor([[0.0, 1.0], [0.5, 0.5], [0.3, 0.7]])
    half = 0.5 * math.log2(1 / 0.75) + 0.5 * (
        0.5 * math.log2(0.5 / 0.75) + 0.5 * math.log2(0.5 / 0.25)
    )
    measured = consistency.jensen_shannon(one, other)
    assert measured.tolist() == pytest.approx([1, half, 0], abs=1e-6)


def test_consistency_compares_groups(run, tmp_path, command):
    pattern = f"balanced={run.parent}/studied_seed*"
    done = command(
        consistency.main, "--out", tmp_path / "c", pattern, "--images", 10, "--min-scale", 1
    )
    assert done.code == 0, done.err
    assert "balanced: divergence" in done.out and (tmp_path / "c.png").exists()
    row = (tmp_path / "c.csv").read_text().splitlines()[2].split(",")
    assert row[:2] == ["balanced", "studied_seed0"] and 0 <= float(row[2]) < 0.5


def test_the_plane_keeps_distances():
    vectors = [torch.randn(7, dtype=torch.float64) for _ in range(3)]
    across, up, points = landscape.plane(vectors)
    for vector, (x, y) in zip(vectors, points, strict=True):
        assert torch.allclose(vectors[0] + x * across + y * up, vector)
    with pytest.raises(UserError, match="one line"):
        landscape.plane([vectors[0], vectors[1], 2 * vectors[1] - vectors[0]])


def test_the_landscape_holds_the_three_students(world, run, tmp_path, command):
    others = []
    for position in range(2):
        folder = tmp_path / f"other{position}"
        folder.mkdir()
        saved = load_tensors(run / "checkpoint.pt", "checkpoint")
        for value in saved["model"].values():
            if value.is_floating_point():
                value += 0.1 * torch.rand(value.shape)
        save_tensors(folder / "checkpoint.pt", saved)
        others.append(f"o{position}={folder}")
    arguments = ("--out", tmp_path / "l", f"a={run}", *others, "--val-dir", world.val)
    done = command(landscape.main, *arguments, "--points", 3)
    assert done.code == 0, done.err
    assert Image.open(tmp_path / "l.png").size[0] > 600
    assert len((tmp_path / "l.csv").read_text().splitlines()) == 11
    same = command(landscape.main, "--out", tmp_path / "l", *[f"a={run}"] * 3, *arguments[5:])
    assert same.code == 2 and "the same" in same.err
    nameless = command(landscape.main, *arguments[:2], run, *arguments[3:])
    assert nameless.code == 2 and "is not of the form NAME=RUN" in nameless.err


def test_numbers_of_plots_are_read_back(tmp_path):
    write_csv([{"ipc": 5, "slc": None, "seed": 0}], tmp_path / "a.csv")
    assert tables.read_csv(tmp_path / "a.csv") == [{"ipc": 5, "slc": None, "seed": 0}]


def test_the_study_chooses_the_settings_with_the_highest_mean():
    rows = [
        {"method": method, "slc": slc, "last_top1": top1}
        for method, slc, top1 in (
            *(("hard s0.1", None, 70.0), ("hard s0.8", None, 71.0)),
            *(("soft T4", 10, 50.0), ("soft T4", 30, 70.0)),
            *(("soft T20", 10, 58.0), ("soft T20", 30, 61.0), ("soft T20", 30, 63.0)),
        )
    ]
    assert study.choices(rows) == {"hard": "s0.8", "soft": "T4"}
    table = study.choice_table(rows).splitlines()
    assert table[3] == "| hard | **s0.8** | 71.0 | 71.0 | **71.0** |"
    assert table[5] == "| soft | T20 | 58.0 | 62.0 | 60.0 |"


def test_a_pivot_has_a_cell_for_each_pair_of_names():
    top1 = {"a / x": (70, 72), "b / x": (50, 50), "a / y": (81, 81)}
    rows = [{"method": name, "last_top1": value} for name in top1 for value in top1[name]]
    table = study.pivot_table(rows).splitlines()
    assert table[0] == "| last top-1 (%) | x | y |"
    assert table[2] == "| a | 71.0 ± 1.4 | 81.0 ± 0.0 |"
    assert table[3] == "| b | 50.0 ± 0.0 | – |"


def test_auto_is_compared_with_the_best_of_the_others_seed_by_seed():
    """Differences 1, 2 and 3: mean 2, standard deviation 1, standard error 1 / sqrt(3)."""
    top1 = {("hard", None): (50, 60, 70), ("soft", 5): (40, 40, 40), ("soft", 15): (80, 80, 80)}
    top1 |= {("auto", 5): (51, 62, 73), ("auto", 15): (80, 80, 80)}
    rows = [
        {"method": method, "student": "S", "ipc": 5, "slc": slc, "seed": seed, "last_top1": value}
        for (method, slc), values in top1.items()
        for seed, value in enumerate(values)
    ]
    table = study.labels_table(rows).splitlines()
    assert table[0] == "| labels per image | hard | soft | auto | auto - best |"
    rest = "62.0 ± 11.0 | +2.0 ± 0.6 (hard) |"
    assert table[2] == f"| 1 | 60.0 ± 10.0 | 40.0 ± 0.0 | {rest}"
    assert table[3].endswith("| 80.0 ± 0.0 | +0.0 ± 0.0 (soft) |")
    table = study.labels_table([*rows, *(row | {"student": "T"} for row in rows)]).splitlines()
    assert table[0].startswith("| student | labels per image | hard |")
    assert [line[:9] for line in table[2:]] == [
        "| S | 1 |",
        "| S | 3 |",
        "| T | 1 |",
        "| T | 3 |",
    ]


def test_methods_on_several_data_sets_stand_side_by_side(tmp_path, monkeypatch):
    def write(data, ipc, top1):
        names = "method", "ipc", "slc", "last_top1"
        rows = [
            dict(zip(names, (method, ipc, slc, value), strict=True)) for method, slc, value in top1
        ]
        write_csv(rows, tmp_path / f"mine_{data}.csv")

    write("glyphs", 2, [("soft", 2, 51.0), ("soft", 2, 53.0)])
    write("digits", 5, [("hard", None, 70.0), ("soft", 5, 60.0), ("soft", 15, 80.0)])
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    assert study.fill("<!-- sets mine -->\n<!-- end -->").splitlines()[1:-1] == [
        "| last top-1 (%) | digits, 1 | digits, 3 | characters, 1 |",
        "|---|---:|---:|---:|",
        "| hard | 70.0 | 70.0 | – |",
        "| soft | 60.0 | 80.0 | 52.0 ± 1.4 |",
    ]


def test_the_tables_of_the_study_are_those_of_its_numbers(tmp_path, monkeypatch):
    row = {"student": "S", "ipc": 10, "method": "soft T4", "slc": 10, "seed": 0}
    row |= {"best_top1": 52.0, "best_epoch": 3, "last_top1": 51.0, "label_bytes": 1234}
    row |= {"epochs": 300, "seconds": 1.0, "device": "cpu"}
    write_csv([row], tmp_path / "mine.csv", "made by hand")
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    text = "a\n<!-- results mine -->\nold\n<!-- end -->\nb\n<!-- choice mine -->\n<!-- end -->\n"
    filled = study.fill(text)
    assert "| S | 10 | soft T4 | 10 | 1,234 | 52.0 | 51.0 | 1 |" in filled and "old" not in filled
    assert filled.count("<!-- end -->") == 2 and "| soft | **T4** | 51.0 | **51.0** |" in filled
    assert study.fill(filled) == filled
    with pytest.raises(UserError, match="unknown table 'picture'"):
        study.fill("<!-- picture mine -->\n<!-- end -->")


def test_the_committed_study_is_what_its_numbers_say():
    text = study.STUDY.read_text()
    assert study.fill(text) == text


def test_a_study_may_have_a_dot_in_its_name_and_a_pdf_is_not_overwritten(tmp_path):
    tables.write_study([{"a": 1}], Figure(), tmp_path / "T0.5")
    assert {path.name for path in tmp_path.iterdir()} == {"T0.5.csv", "T0.5.png", "T0.5.pdf"}
    before = (tmp_path / "T0.5.pdf").read_bytes()
    with pytest.raises(UserError, match=r"T0\.5\.pdf: name the PNG"):
        save_figure(Figure(), tmp_path / "T0.5.pdf")
    assert (tmp_path / "T0.5.pdf").read_bytes() == before


def test_runs_that_are_not_seeds_of_one_method_are_not_averaged(world, tmp_path, command):
    for name, more in (("a0", ()), ("a1", ("--seed", 1)), ("b0", ("--temperature", 4))):
        arguments = train_arguments(world, tmp_path / name, *more)
        assert command(train.main, *arguments).code == 0
    (tmp_path / "a2").symlink_to(tmp_path / "a1")
    assert len(compare.finished_runs(str(tmp_path / "a[01]"))) == 2
    with pytest.raises(UserError, match=r"differ in more than the seed.*temperature"):
        compare.finished_runs(str(tmp_path / "[ab]0"))
    with pytest.raises(UserError, match="a seed occurs twice"):
        compare.finished_runs(str(tmp_path / "a[12]"))

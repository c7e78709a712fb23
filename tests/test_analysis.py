"""The studies: what they measure, against numbers worked by hand or by other means."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import ROOT, script, train_arguments, tree
from matplotlib.figure import Figure

from analysis import compare, consistency, tables
from utils import runlog
from utils.cli import UserError
from utils.files import save_figure
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
        consistency.main, "--out", tmp_path / "c0.5", pattern, "--images", 10, "--min-scale", 1
    )
    assert done.code == 0, done.err
    assert "balanced: divergence" in done.out and tree(tmp_path).keys() == {
        "c0.5.csv",
        "c0.5.png",
        "c0.5.pdf",
    }
    row = (tmp_path / "c0.5.csv").read_text().splitlines()[2].split(",")
    assert row[:2] == ["balanced", "studied_seed0"] and 0 <= float(row[2]) < 0.5


def test_numbers_of_plots_are_read_back(tmp_path):
    write_csv([{"ipc": 5, "slc": None, "seed": 0}], tmp_path / "a.csv")
    assert tables.read_csv(tmp_path / "a.csv") == [{"ipc": 5, "slc": None, "seed": 0}]


def test_a_pdf_is_not_overwritten_by_its_own_picture(tmp_path):
    save_figure(Figure(), tmp_path / "T0.5.png")
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

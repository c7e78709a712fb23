"""Selection of distilled images: which crops win, how they are laid out, what is refused.

Most images are one plain grey, so the teacher's confidence in each is known, and so are the written
pixels; two tests use patterns whose best crop is known.
"""

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from scripts import prepare_distilled
from utils.cli import UserError
from utils.data import folders

TEACHER = f"{__name__}:brightness_teacher"


class Brightness(nn.Module):
    """Class 0 for bright inputs, class 1 for dark ones; the surer, the brighter or darker."""

    def __init__(self, sign: float, num_classes: int):
        super().__init__()
        self.register_buffer("sign", torch.tensor(sign))
        self.num_classes = num_classes

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        score = self.sign * inputs.mean(dim=(1, 2, 3))
        zeros = torch.zeros(len(inputs), self.num_classes - 2, device=inputs.device)
        return torch.cat([torch.stack([score, -score], dim=1), zeros], dim=1)


def brightness_teacher(num_classes: int) -> nn.Module:
    return Brightness(1.0, num_classes)


def darkness_teacher(num_classes: int) -> nn.Module:
    return Brightness(-1.0, num_classes)


def broken_teacher(num_classes: int) -> nn.Module:
    return Brightness(torch.nan, num_classes)


class LeftHalf(nn.Module):
    """Class 0, the surer the brighter the left half is compared with the right one."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.num_classes = num_classes

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        left, right = inputs.tensor_split(2, dim=3)
        score = left.mean(dim=(1, 2, 3)) - right.mean(dim=(1, 2, 3))
        return torch.stack([score, -score], dim=1)


def left_teacher(num_classes: int) -> nn.Module:
    return LeftHalf(num_classes)


GREYS = (40, 200, 120, 80, 160, 240)
BEST_FIRST = {"n00000001": (240, 200, 160, 120, 80, 40), "n00000002": (40, 80, 120, 160, 200, 240)}


@pytest.fixture
def source(tmp_path):
    """Two classes of six plain images, named in another order than their greys."""
    root = tmp_path / "in"
    for name in BEST_FIRST:
        (root / name).mkdir(parents=True)
        for position, grey in enumerate(GREYS):
            Image.new("RGB", (16, 16), (grey,) * 3).save(root / name / f"{position}.png")
    return root


def arguments(source, out, **changes):
    flags = {
        "data_dir": source,
        "out_dir": out,
        "dataset": "custom",
        "input_size": 8,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "teacher": TEACHER,
        "ipc": 2,
        "crops": 2,
        "device": "cpu",
        "workers": 0,
        **changes,
    }
    words = []
    for name, value in flags.items():
        values = value if isinstance(value, tuple) else (value,)
        words += ["--" + name.replace("_", "-"), *map(str, values)]
    return words


def run(monkeypatch, source, out, **changes):
    monkeypatch.setattr(sys, "argv", ["prepare_distilled.py", *arguments(source, out, **changes)])
    prepare_distilled.main()


def error_of(monkeypatch, source, out, **changes) -> str:
    with pytest.raises(UserError) as caught:
        run(monkeypatch, source, out, **changes)
    return str(caught.value)


def pixels(path) -> np.ndarray:
    return np.array(Image.open(path))


def contents(root) -> dict:
    return {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("ipc", [1, 2, 6])
@pytest.mark.parametrize("crops", [0, 3])
def test_images_the_teacher_is_surest_of_are_written_best_first(
    source, tmp_path, monkeypatch, ipc, crops
):
    out, before = tmp_path / "out", contents(source)
    run(monkeypatch, source, out, ipc=ipc, crops=crops)
    for label, best_first in enumerate(BEST_FIRST.values()):
        for position, grey in enumerate(best_first[:ipc]):
            written = pixels(out / f"{label:05d}" / f"{position:05d}.png")
            np.testing.assert_array_equal(written, np.full((8, 8, 3), grey))
    assert contents(source) == before


def test_layout_is_five_digit_folders_and_files_in_source_order(source, tmp_path, monkeypatch):
    run(monkeypatch, source, tmp_path / "out")
    written = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*")}
    expected = {f"{label:05d}/{position:05d}.png" for label in (0, 1) for position in (0, 1)}
    assert written == expected | {"selection.json"}
    assert folders.scan(tmp_path / "out", 2).ipc() == 2


def test_a_selection_knows_from_which_images_it_was_made(source, tmp_path, monkeypatch):
    """So that training says when it is validated on these."""
    run(monkeypatch, source, tmp_path / "out")
    assert folders.are_selected(tmp_path / "out") and not folders.are_selected(source)
    assert folders.selection_source(tmp_path / "out") == folders.scan(source).listing_sha256()
    assert folders.selection_source(source) is None


def test_another_teacher_makes_another_choice(source, tmp_path, monkeypatch):
    run(monkeypatch, source, tmp_path / "out", teacher=f"{__name__}:darkness_teacher", ipc=1)
    assert pixels(tmp_path / "out/00000/00000.png")[0, 0, 0] == 40
    assert pixels(tmp_path / "out/00001/00000.png")[0, 0, 0] == 240


def test_collage_deals_the_best_images_out_over_the_tiles(source, tmp_path, monkeypatch):
    run(monkeypatch, source, tmp_path / "out", ipc=1, collage=2)
    written = pixels(tmp_path / "out/00000/00000.png")
    expected = np.array([[240, 200], [160, 120]]).repeat(4, axis=0).repeat(4, axis=1)
    np.testing.assert_array_equal(written, expected[..., None].repeat(3, axis=2))


def test_every_collage_gets_one_of_the_best(source, tmp_path, monkeypatch):
    for name in BEST_FIRST:
        for grey in (10, 20):
            Image.new("RGB", (16, 16), (grey,) * 3).save(source / name / f"grey{grey}.png")
    run(monkeypatch, source, tmp_path / "out", ipc=2, collage=2)
    tiles = [pixels(tmp_path / f"out/00000/0000{n}.png")[::4, ::4, 0].ravel() for n in (0, 1)]
    assert [tile.tolist() for tile in tiles] == [[240, 160, 80, 20], [200, 120, 40, 10]]


def test_the_surest_crop_of_an_image_is_the_one_written(tmp_path, monkeypatch):
    root, out = tmp_path / "in", tmp_path / "out"
    halves = np.zeros((32, 32, 3), dtype=np.uint8)
    halves[:, :16] = 255
    for name in ("n00000001", "n00000002"):
        (root / name).mkdir(parents=True)
        Image.fromarray(halves).save(root / name / "0.png")
    run(monkeypatch, root, out, ipc=1, crops=200, min_scale=0.1)
    # A crop of nothing but the bright half for the bright class, of the dark half for the dark.
    assert pixels(out / "00000/00000.png").min() == 255
    assert pixels(out / "00001/00000.png").max() == 0


def test_the_crop_that_was_scored_is_written_and_not_its_mirror_image(tmp_path, monkeypatch):
    root, out = tmp_path / "in", tmp_path / "out"
    ramp = np.linspace(255, 0, 32).astype(np.uint8)  # bright on the left
    for name in ("n00000001", "n00000002"):
        (root / name).mkdir(parents=True)
        Image.fromarray(np.stack([np.tile(ramp, (32, 1))] * 3, axis=2)).save(root / name / "0.png")
    # Class 1 wants the bright side on the right: no crop is, so the flattest must win.
    run(monkeypatch, root, out, ipc=1, crops=30, min_scale=0.1, teacher=f"{__name__}:left_teacher")
    spread = [np.ptp(pixels(out / f"0000{label}/00000.png").astype(int)) for label in (0, 1)]
    assert spread[0] > 150 and spread[1] < 100


def test_jpg_is_written_when_asked_for(source, tmp_path, monkeypatch):
    run(monkeypatch, source, tmp_path / "out", format="jpg", ipc=1)
    assert Image.open(tmp_path / "out/00000/00000.jpg").format == "JPEG"
    assert abs(int(pixels(tmp_path / "out/00000/00000.jpg")[0, 0, 0]) - 240) <= 2
    assert not list((tmp_path / "out").rglob("*.png"))


def test_images_of_different_sizes_are_taken_too(source, tmp_path, monkeypatch):
    Image.new("RGB", (40, 20), (255,) * 3).save(source / "n00000001" / "wide.png")
    run(monkeypatch, source, tmp_path / "out", ipc=1)
    assert (pixels(tmp_path / "out/00000/00000.png") == 255).all()


def test_only_candidates_are_looked_at(source, tmp_path, monkeypatch):
    chosen = set()
    for seed in range(4):
        out = tmp_path / f"out{seed}"
        run(monkeypatch, source, out, ipc=1, candidates=1, crops=0, seed=seed)
        chosen.add(int(pixels(out / "00000/00000.png")[0, 0, 0]))
    assert chosen <= set(GREYS) and len(chosen) > 1


def test_same_seed_gives_the_same_bytes(source, tmp_path, monkeypatch):
    written = []
    for name in ("a", "b"):
        run(monkeypatch, source, tmp_path / name, seed=3, candidates=3)
        made = contents(tmp_path / name)
        written.append({path.relative_to(tmp_path / name): made[path] for path in made})
    assert written[0] == written[1]


def test_same_command_again_is_a_no_op(source, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    run(monkeypatch, source, out)
    before = {path: path.stat().st_mtime_ns for path in contents(out)}
    run(monkeypatch, source, out)
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in contents(out)} == before


@pytest.mark.parametrize(
    "change",
    [
        {"ipc": 1},
        {"crops": 3},
        {"min_scale": 0.4},
        {"collage": 1, "candidates": 4},
        {"format": "jpg"},
        {"seed": 1},
        {"input_size": 16},
        {"std": (0.5, 0.5, 0.25)},
        {"teacher": f"{__name__}:darkness_teacher"},
    ],
)
def test_folder_made_with_other_settings_is_left_as_it_is(source, tmp_path, monkeypatch, change):
    out = tmp_path / "out"
    run(monkeypatch, source, out)
    before = contents(out)
    assert "exists already" in error_of(monkeypatch, source, out, **change)
    assert contents(out) == before


def test_folder_made_from_other_images_is_left_as_it_is(source, tmp_path, monkeypatch):
    run(monkeypatch, source, tmp_path / "out")
    (source / "n00000001" / "0.png").rename(source / "n00000001" / "another.png")
    assert "exists already" in error_of(monkeypatch, source, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ipc": 7}, "has 6 images, but IPC 7 with --collage 1 takes 7 per class"),
        ({"ipc": 2, "collage": 2}, "has 6 images, but IPC 2 with --collage 2 takes 8 per class"),
        ({"ipc": 3, "candidates": 2}, "--candidates 2 is too few"),
        ({"collage": 3}, "--collage 3 does not divide 8 pixels"),
        ({"num_classes": 3}, "has 2 class folders, the data set 3"),
        ({"teacher": f"{__name__}:broken_teacher"}, "is NaN or infinite"),
        ({"teacher": "no.such:factory"}, "--teacher: cannot import"),
    ],
)
def test_what_cannot_work_is_one_line_and_makes_no_folder(
    source, tmp_path, monkeypatch, change, message
):
    refusal = error_of(monkeypatch, source, tmp_path / "out", **change)
    assert message in refusal and "\n" not in refusal
    assert not (tmp_path / "out").exists()


def test_truncated_image_is_named(source, tmp_path, monkeypatch):
    path = source / "n00000002" / "3.png"
    path.write_bytes(path.read_bytes()[:40])
    assert str(path) in error_of(monkeypatch, source, tmp_path / "out")


def test_interrupted_selection_starts_over(source, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as interrupted:
        interrupted.setattr(prepare_distilled, "atomic_write", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(interrupted, source, tmp_path / "out")
    (content,) = (tmp_path / "out.partial").iterdir()
    (content / "left").write_bytes(b"over")
    assert not (tmp_path / "out").exists()
    run(monkeypatch, source, tmp_path / "out")
    assert folders.scan(tmp_path / "out", 2).ipc() == 2
    assert not (tmp_path / "out.partial").exists() and not (tmp_path / "out" / "left").exists()

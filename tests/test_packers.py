"""Passes packed by other processes: the same bytes; their errors and ends are told in a line."""

import multiprocessing
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import generate_arguments, tree

from relabel import generate
from relabel.packers import default_packers, pass_writer
from utils.cli import UserError
from utils.labels import LabelSet, LabelWriter

OTHERS = ("--slc", 12, "--codec", "klt", "--distortion", 0.05)


@pytest.fixture(scope="module")
def inline(world, tmp_path_factory) -> LabelSet:
    """Four passes written by the labelling process itself."""
    path = tmp_path_factory.mktemp("inline") / "labels"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        arguments = generate_arguments(world.data, path, world.weights, *OTHERS)
        patch.setattr("sys.argv", ["generate.py", *map(str, arguments)])
        generate.cli.run(generate.main)
    assert stopped.value.code == 0
    return LabelSet.open(path)


@pytest.fixture
def writer(inline, tmp_path) -> LabelWriter:
    """A writer of the same passes to another folder."""
    shutil.copytree(inline.path, tmp_path / "labels")
    for path in (tmp_path / "labels").glob("pass_*"):
        path.unlink()
    (tmp_path / "labels/manifest.json").rename(tmp_path / "labels/manifest.partial.json")
    return LabelWriter(tmp_path / "labels", inline.manifest, inline.sizes)


def test_other_processes_write_the_same_bytes(world, inline, tmp_path, command):
    labels = tmp_path / "labels"
    arguments = generate_arguments(world.data, labels, world.weights, *OTHERS, "--packers", 2)
    assert command(generate.main, *arguments).code == 0
    assert tree(labels) == tree(inline.path)
    assert not multiprocessing.active_children()


def test_what_was_handed_over_is_written_when_labelling_stops(inline, writer):
    with pytest.raises(KeyboardInterrupt), pass_writer(writer, 1) as write_pass:
        whole = inline.whole_pass(1)
        write_pass(1, whole.logits, whole.views, inline.hard_labels)
        raise KeyboardInterrupt
    assert writer.verified(1) and not writer.verified(0)


def test_an_error_of_a_packer_is_raised_and_names_the_file(inline, writer):
    whole = inline.whole_pass(0)
    with pytest.raises(OSError, match="pass_0000"), pass_writer(writer, 1) as write_pass:
        (writer.path / "pass_0000.npz").mkdir()
        write_pass(0, whole.logits, whole.views, inline.hard_labels)
    assert not multiprocessing.active_children()


def test_any_error_of_a_packer_is_raised_as_what_it_is(inline, writer):
    whole = inline.whole_pass(0)
    with pytest.raises(IndexError, match="size 11"), pass_writer(writer, 1) as write_pass:
        write_pass(0, whole.logits, whole.views, inline.hard_labels[:-1])
    writer.settings = {**writer.settings, "codec": {"name": "none such"}}  # it cannot even start
    with pytest.raises(UserError, match="none such"), pass_writer(writer, 1) as write_pass:
        write_pass(0, whole.logits, whole.views, inline.hard_labels)


def test_the_end_of_a_packer_is_told(inline, writer):
    whole = inline.whole_pass(0)
    with pytest.raises(UserError, match="ended from outside"), pass_writer(writer, 1) as write_pass:
        write_pass(0, whole.logits, whole.views, inline.hard_labels)
        for process in multiprocessing.active_children():
            process.kill()
        write_pass(1, whole.logits, whole.views, inline.hard_labels)


@pytest.mark.parametrize(
    ("cores", "gigabytes", "world", "on_machine", "expected"),
    [
        *((1, 64, 1, None, 1), (3, 64, 1, None, 2), (32, 256, 1, None, 8)),
        *((32, 128, 1, None, 5), (32, 20, 1, None, 0)),  # too little memory: labelling packs
        *((32, 128, 4, None, 0), (32, 128, 4, 2, 2), (4, 128, 4, 2, 1)),
    ],
)
def test_packers_are_as_many_as_cores_and_memory_of_this_machine_allow(
    monkeypatch, cores, gigabytes, world, on_machine, expected
):
    """Logits of 1,281,167 images and 1000 classes: four times 5.1 GB a packer, and beside them."""
    writer = SimpleNamespace(sizes=range(1281167), settings={"num_classes": 1000, "passes": 1})
    monkeypatch.setattr("utils.runtime.usable_cores", lambda: cores)
    monkeypatch.setattr("utils.runtime.available_memory", lambda: gigabytes * 10**9)
    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if on_machine:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(on_machine))
    assert default_packers(torch.device("cpu"), writer) == 0
    assert default_packers(torch.device("cuda"), writer) == expected
    writer.sizes = range(29_999)  # packed before a process has started
    assert default_packers(torch.device("cuda"), writer) == 0

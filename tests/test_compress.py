"""Codecs in both entry scripts: generate.py and compress.py."""

import sys

import numpy as np
import pytest
import torch
from conftest import generate_arguments, tree

from relabel import compress, generate, report
from utils import extensions
from utils.cli import UserError
from utils.files import seal
from utils.labels import LabelSet, codecs
from utils.labels.codecs.base import distortion

PASSES = 10


@pytest.fixture(scope="module")
def long_set(world, tmp_path_factory):
    """An fp16 label set of 12 images and 10 passes."""
    path = tmp_path_factory.mktemp("long") / "labels"
    arguments = generate_arguments(world.data, path, world.weights, "--slc", 3 * PASSES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["generate.py", *map(str, arguments)])
        generate.main()
    return path


def all_logits(path) -> torch.Tensor:
    labels = LabelSet.open(path)
    return torch.cat([labels[batch].logits for batch in range(len(labels))])


def recode(command, source, target, *flags):
    return command(compress.main, "--label-dir", source, "--out-dir", target, *flags)


CODECS = [
    ("--codec", "topk", "--topk", 2),
    ("--codec", "quant", "--bits", 6),
    ("--codec", "klt", "--distortion", 0.02),
    ("--codec", "klt", "--bytes-per-label", 24),
]


@pytest.mark.parametrize("flags", CODECS, ids=lambda flags: f"{flags[1]}{flags[2]}")
def test_generating_and_recoding_give_equal_labels(world, long_set, tmp_path, command, flags):
    direct = generate_arguments(world.data, tmp_path / "a", world.weights, "--slc", 3 * PASSES)
    assert command(generate.main, *direct, *flags).code == 0
    done = recode(command, long_set, tmp_path / "b", *flags)
    assert done.code == 0 and "distortion at temperature 20" in done.out
    one, other = all_logits(tmp_path / "a"), all_logits(tmp_path / "b")
    assert distortion(one, other) < 0.01
    assert distortion(all_logits(long_set), other) < 0.5


def test_a_budget_above_what_labels_take_is_refused_and_its_bytes_are_told_apart(
    long_set, tmp_path, command
):
    refused = recode(command, long_set, tmp_path / "b", "--codec", "klt", "--bytes-per-label", 900)
    assert refused.code == 2 and "bytes each already" in refused.err
    assert not (tmp_path / "b").exists()
    done = recode(command, long_set, tmp_path / "b", "--codec", "klt", "--bytes-per-label", 24)
    labels = LabelSet.open(tmp_path / "b")
    payloads = [np.load(path)["payload"] for path in sorted((tmp_path / "b").glob("pass_*.npz"))]
    counted = sum(map(len, payloads)) + sum(a.nbytes for a in labels.codec.arrays().values())
    assert labels.budgeted_bytes() == counted < labels.bytes_on_disk()
    assert f"{counted / (12 * PASSES):.1f} of them for labels and codec" in done.out


def test_views_hard_labels_and_manifest_stay(long_set, tmp_path, command):
    assert recode(command, long_set, tmp_path / "b", "--codec", "klt").code == 0
    before, after = LabelSet.open(long_set), LabelSet.open(tmp_path / "b")
    assert all(
        before.views(batch).checksum() == after.views(batch).checksum()
        for batch in range(len(before))
    )
    assert torch.equal(before.hard_labels, after.hard_labels)
    changed = {"codec", "files", "recoded_from"}
    assert {key for key in after.manifest if after.manifest[key] != before.manifest.get(key)} == (
        changed
    )
    assert after.manifest["codec"] == {"name": "klt", "distortion": 0.002}
    assert after.manifest["recoded_from"] == {"name": "fp16"}
    assert "codec.npz" in after.manifest["files"]
    assert distortion(all_logits(long_set), all_logits(tmp_path / "b")) <= 0.0102


def test_a_byte_budget_counts_all_label_bytes(long_set, tmp_path, command):
    assert recode(command, long_set, tmp_path / "b", "--codec", "klt", "--bytes-per-label", 24)
    fitted = (tmp_path / "b" / "codec.npz").stat().st_size
    passes = sorted((tmp_path / "b").glob("pass_*.npz"))
    payload = sum(np.load(path)["payload"].nbytes for path in passes)
    assert (fitted + payload) / (12 * PASSES) <= 24


def test_recoding_resumes_to_equal_bytes(long_set, tmp_path, command):
    flags = ("--codec", "klt", "--distortion", 0.05)
    assert recode(command, long_set, tmp_path / "a", *flags).code == 0
    assert recode(command, long_set, tmp_path / "b", *flags).code == 0
    partial = tmp_path / "b" / "manifest.json"
    text = partial.read_text()
    partial.unlink()
    settings = LabelSet.open(tmp_path / "a").manifest
    for name in ("files", "teacher_top1"):
        settings.pop(name)
    (tmp_path / "b" / "manifest.partial.json").write_bytes(seal(settings))
    (tmp_path / "b" / "pass_0003.npz").unlink()
    assert recode(command, long_set, tmp_path / "b", *flags).code == 0
    assert (tmp_path / "b" / "manifest.json").read_text() == text
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    again = recode(command, long_set, tmp_path / "b", *flags)
    assert again.code == 0 and "nothing to do" in again.out
    other = recode(command, long_set, tmp_path / "b", "--codec", "fp16")
    assert other.code == 2 and "other settings (codec" in other.err


def test_generate_resumes_with_the_codec_it_fitted(world, tmp_path, command, monkeypatch):
    flags = ("--slc", 12, "--codec", "klt", "--distortion", 0.05)
    whole = generate_arguments(world.data, tmp_path / "a", world.weights, *flags)
    broken = generate_arguments(world.data, tmp_path / "b", world.weights, *flags)
    done = command(generate.main, *whole)
    assert done.code == 0 and "48/48" in done.err  # those labelled for the fit are counted, too
    write, calls = generate.LabelWriter.write_pass, []

    def fail_at_third(self, number, *rest):
        calls.append(number)
        if len(calls) == 3:
            raise UserError("interrupted")
        write(self, number, *rest)

    monkeypatch.setattr(generate.LabelWriter, "write_pass", fail_at_third)
    assert command(generate.main, *broken).code == 2
    monkeypatch.setattr(generate.LabelWriter, "write_pass", write)
    assert command(generate.main, *broken).code == 0
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_a_flipped_bit_anywhere_in_a_label_set_is_found(long_set, tmp_path, command):
    assert recode(command, long_set, tmp_path / "b", "--codec", "klt").code == 0
    LabelSet.open(tmp_path / "b")
    for path in sorted((tmp_path / "b").iterdir()):
        whole = path.read_bytes()
        for place in np.linspace(0, len(whole) - 1, 7).astype(int):
            content = bytearray(whole)
            content[place] ^= 1 << (place % 8)
            path.write_bytes(bytes(content))
            with pytest.raises(UserError, match=path.name.replace(".", r"\.")):
                LabelSet.open(tmp_path / "b")
        path.write_bytes(whole)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--codec", "topk"), "--codec topk needs --topk"),
        (("--codec", "topk", "--topk", 4), "--topk 4 must be between 1 and classes - 1 = 3"),
        (("--codec", "fp16", "--bits", 4), "--bits belongs to codec quant, not to fp16"),
        (("--codec", "klt", "--bytes-per-label", 8, "--distortion", 0.1), "not allowed with"),
        (("--codec", "zip"), "invalid choice"),
    ],
)
def test_flags_that_clash_are_named(long_set, tmp_path, command, flags, message):
    refused = recode(command, long_set, tmp_path / "b", *flags)
    assert refused.code == 2 and message in refused.err and refused.err.count("\n") == 1


def test_only_the_first_passes_are_kept_when_slc_says_so(long_set, tmp_path, command):
    assert recode(command, long_set, tmp_path / "b", "--codec", "fp16", "--slc", 6).code == 0
    before, after = LabelSet.open(long_set), LabelSet.open(tmp_path / "b")
    assert (after.manifest["slc"], after.passes) == (6, 2)
    for number in range(len(after)):
        assert torch.allclose(after[number].logits, before[number].logits, atol=0.01)
    refused = recode(command, long_set, tmp_path / "c", "--codec", "fp16", "--slc", 7)
    assert refused.code == 2 and "use a multiple of 3" in refused.err


def test_the_source_is_never_the_target(long_set, command):
    before = tree(long_set)
    refused = recode(command, long_set, long_set, "--codec", "klt")
    assert refused.code == 2 and "need a folder of their own" in refused.err
    assert tree(long_set) == before


SIGNS = """
from utils.cli import bounded
from utils.labels.codecs.base import Codec


class Signs(Codec):
    name = "signs"
    flags = {"signs_scale": {"type": bounded(float, 0), "metavar": "X", "help": "what 1 means"}}

    def __init__(self, num_classes, signs_scale):
        super().__init__(num_classes, signs_scale=signs_scale)

    def encode(self, logits, mixture):
        return (logits.sign().char(),)

    def pack_codes(self, codes):
        return codes[0].numpy().tobytes()

    def unpack(self, payload):
        import torch
        return (torch.frombuffer(bytearray(payload), dtype=torch.int8).view(-1, self.num_classes),)

    def expand(self, codes, mixture):
        return codes[0].float() * self.options["signs_scale"]
"""


def test_a_codec_is_added_by_one_file(world, tmp_path, command, monkeypatch):
    monkeypatch.setattr(extensions, "FOLDER", tmp_path / "more_codecs")
    monkeypatch.syspath_prepend(tmp_path)
    extensions.FOLDER.mkdir()
    (extensions.FOLDER / "signs.py").write_text(SIGNS)
    flags = ("--codec", "signs", "--signs-scale", 3)
    arguments = generate_arguments(world.data, tmp_path / "a", world.weights, "--slc", 6)
    try:
        done = command(generate.main, *arguments, *flags)
        assert done.code == 0, done.err
        assert recode(command, world.labels, tmp_path / "b", *flags).code == 0
        expected = 3 * all_logits(world.labels).sign()
        assert torch.equal(all_logits(tmp_path / "a"), expected)
        assert torch.equal(all_logits(tmp_path / "b"), expected)
        told = command(report.main, "--label-dir", tmp_path / "b")
        assert told.code == 0 and "codec signs (signs_scale 3.0)" in told.out
        refused = recode(command, world.labels, tmp_path / "c", "--codec", "signs")
        assert refused.code == 2 and "--codec signs needs --signs-scale" in refused.err
        refused = recode(command, world.labels, tmp_path / "c", "--codec", "klt", *flags[2:])
        assert refused.code == 2 and "--signs-scale belongs to codec signs" in refused.err
    finally:
        codecs.CODECS.pop("signs", None)


def test_two_codecs_of_one_name_are_refused():
    with pytest.raises(UserError, match="there is a codec fp16 already"):
        type("Other", (codecs.Codec,), {"name": "fp16"})

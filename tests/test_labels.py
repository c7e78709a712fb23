"""Label sets: what is stored is what the teacher said, and what is replayed is what it saw."""

import dataclasses
import json
from importlib import metadata

import numpy as np
import pytest
import torch
from conftest import CPU, TINY, generate_arguments, tree
from torchvision.transforms import functional as transforms

from relabel import generate, teacher
from utils.cli import UserError
from utils.data import folders, images
from utils.data.images import ResidentImages
from utils.data.views import ViewSpec, draw
from utils.labels import LabelSet, LabelWriter
from utils.labels.arrays import views_to_arrays


def tiny_teacher(world) -> teacher.Teacher:
    return teacher.load_teacher("ConvNetW32", world.weights, TINY, CPU)


def decoded(world) -> tuple[folders.ImageFolder, torch.Tensor]:
    folder = folders.scan(world.data)
    return folder, images.load_evaluation(folder, TINY)


def independent_views(pixels: torch.Tensor, one) -> torch.Tensor:
    """A batch of views rendered by torchvision and mixed by slicing."""
    rendered = []
    for index, box, flip in zip(one.index, one.box.tolist(), one.flip, strict=True):
        crop = transforms.resized_crop(pixels[index].float(), *box, [32, 32], antialias=True)
        rendered.append(transforms.hflip(crop) if flip else crop)
    views = torch.stack(rendered)
    top, left, height, width = one.mix_box[0].tolist()
    mixed = views.clone()
    rows, columns = slice(top, top + height), slice(left, left + width)
    mixed[:, :, rows, columns] = views[one.mix_index][:, :, rows, columns]
    return transforms.normalize(mixed / 255, TINY.mean, TINY.std)


def test_labels_are_the_teachers_logits_with_batch_statistics(world):
    """BatchNorm in train mode on exactly one stored batch of torchvision's crops."""
    _, pixels = decoded(world)
    model = tiny_teacher(world).model.train()
    labels = LabelSet.open(world.labels)
    assert len(labels) == 2 * 3
    for batch in (labels[number] for number in range(len(labels))):
        with torch.no_grad():
            logits = model(independent_views(pixels, batch.views))
        expected = logits - logits.mean(1, keepdim=True)
        assert torch.allclose(batch.logits, expected, atol=2e-3, rtol=1e-3)


def test_selected_images_are_labelled_without_bssl_unless_it_is_asked_for(
    copied, tmp_path, command
):
    (copied.data / "selection.json").write_text("{}")
    for more, said in (((), "it is off"), (("--bssl",), "it is on, as --bssl says")):
        labels = tmp_path / f"labels{len(more)}"
        arguments = generate_arguments(copied.data, labels, copied.weights, "--slc", 3, *more)
        done = command(generate.main, *arguments)
        assert done.code == 0 and said in done.out
        assert LabelSet.open(labels).manifest["bssl"] == bool(more)


def test_without_bssl_running_statistics_are_used(world, tmp_path, command):
    done = command(
        generate.main,
        *generate_arguments(world.data, tmp_path / "l", world.weights, "--slc", 3, "--no-bssl"),
    )
    assert done.code == 0, done.err
    _, pixels = decoded(world)
    model = tiny_teacher(world).model
    batch = LabelSet.open(tmp_path / "l")[0]
    expected = model(independent_views(pixels, batch.views))
    expected = expected - expected.mean(1, keepdim=True)
    assert torch.allclose(batch.logits, expected, atol=2e-3, rtol=1e-3)


def test_relabelling_leaves_the_teacher_unchanged_and_dropout_off(world):
    loaded = tiny_teacher(world)
    loaded.model.add_module("dropout", torch.nn.Dropout(0.5).eval())
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    teacher.use_batch_statistics(loaded.model)
    assert not loaded.model.dropout.training
    ensemble = teacher.Ensemble([loaded], None, CPU)
    ensemble.logits(torch.randn(5, 3, 32, 32))
    after = loaded.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("together", [5, 10])
def test_training_renders_bit_for_bit_what_the_teacher_saw(
    world, monkeypatch, tmp_path, command, together
):
    seen = []
    original = teacher.Ensemble.logits

    def watched(self, views, batch_size=None):
        seen.extend(views.clone().split(5))
        return original(self, views, batch_size)

    monkeypatch.setattr(teacher.Ensemble, "logits", watched)
    arguments = generate_arguments(world.data, tmp_path / "l", world.weights, "--slc", 6, "--force")
    assert command(generate.main, *arguments, "--views-per-forward", together).code == 0
    _, pixels = decoded(world)
    labels = LabelSet.open(tmp_path / "l")
    source = ResidentImages(pixels, TINY, torch.device("cpu"))
    batches = [labels.views(number) for number in range(len(labels))]
    seen = seen[-len(batches) :]  # the first ones are the class-order check
    assert len(batches) == 6
    for rendered, labelled in zip(source.render(batches), seen, strict=True):
        assert torch.equal(rendered, labelled)


def test_ensemble_is_the_weighted_mean_of_logits(world):
    one, other = tiny_teacher(world), tiny_teacher(world)
    for parameter in other.model.parameters():
        parameter.mul_(0.5)
    views = torch.randn(4, 3, 32, 32)
    found = teacher.Ensemble([one, other], [3, 1], CPU).logits(views)
    assert torch.allclose(found, 0.75 * one.model(views) + 0.25 * other.model(views), atol=1e-5)


@pytest.mark.parametrize("mix", ["mixup", "none"])
def test_other_mixes_make_label_sets(world, tmp_path, command, mix):
    arguments = generate_arguments(world.data, tmp_path / "l", world.weights, "--slc", 3)
    assert command(generate.main, *arguments, "--mix", mix).code == 0
    one = LabelSet.open(tmp_path / "l")[0].views
    assert (one.mix_box is None) and ((one.mix_lam is None) == (mix == "none"))


def test_passes_in_any_order_and_after_interruption_give_equal_bytes(world, tmp_path, command):
    arguments = generate_arguments(world.data, tmp_path / "l", world.weights, "--slc", 6)
    settings = {
        name: value
        for name, value in LabelSet.open(world.labels).manifest.items()
        if name not in ("format", "version", "teacher_top1", "files")
    }
    writer = LabelWriter(tmp_path / "l", settings, np.full((12, 2), 32))
    with writer.begun():
        pass
    (tmp_path / "l" / "pass_0001.npz").write_bytes((world.labels / "pass_0001.npz").read_bytes())
    done = command(generate.main, *arguments)
    assert done.code == 0 and "1 of 2 passes are there and verified: skipped" in done.out
    assert tree(tmp_path / "l") == tree(world.labels)
    again = command(generate.main, *arguments)
    assert again.code == 0 and "complete and verified: nothing to do" in again.out


def test_manifest_names_what_the_contract_asks_for(world):
    manifest = LabelSet.open(world.labels).manifest
    assert (manifest["format"], manifest["version"]) == ("hald-labels", 2)
    assert (manifest["ipc"], manifest["slc"], manifest["passes"]) == (3, 6, 2)
    assert manifest["images"]["count"] == 12 and len(manifest["images"]["sha256"]) == 64
    assert set(manifest["files"]) == {"pass_0000.npz", "pass_0001.npz"}
    assert 0 < manifest["teacher_top1"] <= 100
    assert manifest["versions"]["pcodec"] == metadata.version("pcodec")


def test_uneven_classes_can_be_labelled_by_passes(copied, tmp_path, command):
    next((copied.data / "00002").iterdir()).unlink()
    base = generate_arguments(copied.data, tmp_path / "l", copied.weights)
    refused = command(generate.main, *base, "--slc", 3)
    assert refused.code == 2 and "00002 has 2 images where other classes have 3" in refused.err
    assert command(generate.main, *base, "--passes", 2, "--no-bssl").code == 0
    labels = LabelSet.open(tmp_path / "l")
    assert labels.manifest["ipc"] is None
    assert torch.bincount(labels.hard_labels).tolist() == [3, 3, 2, 3]


def test_images_of_different_sizes_are_streamed(copied, tmp_path, command):
    from PIL import Image

    first = copied.data / "00000" / "0.png"
    Image.open(first).resize((40, 50)).save(first)
    arguments = generate_arguments(copied.data, tmp_path / "l", copied.weights, "--slc", 3)
    done = command(generate.main, *arguments)
    assert done.code == 0, done.err
    labels = LabelSet.open(tmp_path / "l")
    assert labels.manifest["image_size"] is None and labels.sizes[0].tolist() == [50, 40]
    folder = folders.scan(copied.data)
    streamed = images.StreamingImages(folder.files, TINY, torch.device("cpu"), 2)
    batches = [labels.views(number) for number in range(len(labels))]
    for one, rendered in zip(batches, streamed.render(batches), strict=True):
        pixels = [images.pixels_of(images.decode(path)) for path in folder.files]
        assert torch.allclose(rendered, independent_views(pixels, one), atol=1e-3)


def test_streaming_and_resident_sources_give_the_same_pixels(world):
    folder, pixels = decoded(world)
    device = torch.device("cpu")
    labels = LabelSet.open(world.labels)
    batches = [labels.views(number) for number in range(len(labels))]
    resident = ResidentImages(pixels, TINY, device).render(batches)
    streaming = images.StreamingImages(folder.files, TINY, device, 2).render(batches)
    for one, other in zip(resident, streaming, strict=True):
        grey_levels = (one - other).abs() * 255 * 0.25
        assert grey_levels.max() <= 1e-2


def test_slc_uses_the_first_passes_only(world):
    labels = LabelSet.open(world.labels)
    whole = labels.bytes_on_disk()
    labels.passes = labels.passes_for(3)
    assert len(labels) == 3
    assert labels.bytes_on_disk() == whole - (world.labels / "pass_0001.npz").stat().st_size
    with pytest.raises(UserError, match="multiple of 3 up to 6"):
        labels.passes_for(4)


def test_every_kind_of_damage_is_named(copied):
    path = copied.labels / "pass_0001.npz"
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    for content in (bytes(flipped), good[:-10], (copied.labels / "pass_0000.npz").read_bytes()):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"pass_0001\.npz is damaged"):
            LabelSet.open(copied.labels)
    path.write_bytes(good)
    (copied.labels / "pass_0002.npz").write_bytes(good)
    with pytest.raises(UserError, match=r"pass_0002\.npz does not belong"):
        LabelSet.open(copied.labels)
    (copied.labels / "pass_0002.npz").unlink()
    path.unlink()
    with pytest.raises(UserError, match=r"pass_0001\.npz is missing"):
        LabelSet.open(copied.labels)


def test_other_versions_and_incomplete_sets_are_refused(copied):
    manifest_path = copied.labels / "manifest.json"
    intact = manifest_path.read_text()
    made_by = {"generate": {}, "compress": {"recoded_from": {}}, "convert": {"imported": {}}}
    for name, fields in made_by.items():
        manifest_path.write_text(json.dumps({**json.loads(intact), "version": 1, **fields}))
        message = rf"version 1; this code reads version 2: .*relabel/{name}\.py"
        with pytest.raises(UserError, match=message):
            LabelSet.open(copied.labels)
    manifest_path.write_text(intact)
    manifest_path.rename(copied.labels / "manifest.partial.json")
    (copied.labels / "pass_0001.npz").unlink()
    with pytest.raises(UserError, match="incomplete: 1 of 2 passes"):
        LabelSet.open(copied.labels)


@pytest.mark.parametrize(
    ("field", "facts", "classes", "images_sha256"),
    [
        ("dataset", {"name": "cifar10"}, None, None),
        ("num_classes", {"num_classes": 5}, None, None),
        ("input_size", {"input_size": 64}, None, None),
        ("mean", {"mean": (0.0, 0.0, 0.0)}, None, None),
        ("std", {"std": (1.0, 1.0, 1.0)}, None, None),
        ("classes", {}, ["a", "b", "c", "d"], None),
        ("images", {}, None, "0" * 64),
    ],
)
def test_labels_for_something_else_are_refused(world, field, facts, classes, images_sha256):
    labels = LabelSet.open(world.labels)
    right = (labels.manifest["classes"], labels.manifest["images"]["sha256"])
    labels.check(TINY, *right)
    given = dataclasses.replace(TINY, **facts)
    with pytest.raises(UserError, match=field):
        labels.check(given, classes or right[0], images_sha256 or right[1])


def test_stored_views_take_at_most_ten_bytes_each_at_224_pixels():
    views = draw(ViewSpec(224, 16), np.full((10000, 2), 224), 0)
    assert sum(array.nbytes for array in views_to_arrays(views).values()) <= 10 * 10000

"""Published FKD label folders: imported batch for batch as an independent decoding reads them."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CUSTOM, TINY, generate_arguments, train_arguments, tree, write_images
from torch.utils.data import DataLoader, RandomSampler
from torchvision.transforms import functional as transforms

from relabel import convert, drift, export, generate
from utils.data import folders, images
from utils.data.images import ResidentImages
from utils.data.views import Mixture
from utils.labels import LabelSet
from validate import train

CODES = ("HALD", "SRe2L", "LPLD", "LPLD pruned", "LPQLD", "LPQLD k")


def write_published(folder, code="HALD", passes=2, batch=5, mixed=True, seed=42, side=32) -> list:
    """12 images of `side` pixels, 4 classes, in the layout of a code; views of 32 pixels.

    Returns of every batch [images, boxes in pixels, flips, mix_index, bbox, target at T = 20].
    """
    folder.mkdir()
    numbers = np.random.default_rng(3)
    sampler = RandomSampler(range(12), generator=torch.Generator().manual_seed(seed))
    loader = DataLoader(range(12), batch, sampler=sampler)
    record, truth, written = [], [], []
    for pass_index in range(passes):
        (folder / f"epoch_{pass_index}").mkdir()
        for number, members in enumerate(loader):
            count = len(members)
            if "pruned" in code and (count < batch or (pass_index == passes - 1 and number > 0)):
                continue
            size = numbers.integers(side // 4, side, (count, 2))
            boxes = np.concatenate([numbers.integers(0, side + 1 - size), size], axis=1)
            coords = torch.from_numpy(boxes / side).half()
            coords = coords if code.startswith(("HALD", "LPQLD")) else coords.float()
            corner = np.int64(numbers.integers(0, 20))
            bbox = [corner, np.int64(4), corner + 9, np.int64(22)] if mixed else None
            logits = torch.from_numpy(numbers.normal(0, 4, (count, 4))).half()
            logits[range(count), members // 3] += 20
            target = torch.softmax(logits.float() / 20, dim=1)
            labels = [logits.float() if code == "SRe2L" else logits]
            if code == "HALD":
                labels = [target.half()]
            elif code == "LPQLD k":
                values, indices = logits.topk(2)
                shares = torch.softmax(values.float() / 20, dim=1)
                target = torch.zeros(count, 4).scatter_(1, indices, shares)
                labels = [values, indices.short()]
            mix_index = torch.from_numpy(numbers.permutation(count)) if mixed else None
            flips = torch.from_numpy(numbers.random(count) < 0.5)
            stored = [mix_index, np.float64(0.7) if mixed else None, bbox]
            if code.startswith("LPQLD"):
                stored = [mix_index.byte(), 0.7, [torch.tensor(side).byte() for side in bbox]]
            written.append((pass_index, number, [coords, flips, *stored, *labels]))
            truth.append([members, boxes, flips, mix_index, bbox, target])
            record.append((pass_index, members.tolist()))
    by_pass = {
        str(p): [image for q, each in record if p == q for image in each] for p in range(passes)
    }
    if code == "HALD":
        torch.save(by_pass, folder / "sampler_indices_dict.pt")
    elif code.startswith("LPLD"):
        (folder / "sampler_indices_epoch.json").write_text(json.dumps(by_pass))
    elif code.startswith("LPQLD"):
        orders = {str(n): members for n, (_, members) in enumerate(record)}
        (folder / "sampler_indices_batch.json").write_text(json.dumps(orders))
    for place, (pass_index, number, content) in enumerate(written):
        if code.startswith("LPQLD"):
            torch.save(content, folder / f"batch_{place}.tar")
        elif code != "HALD":
            torch.save(content, folder / f"epoch_{pass_index}" / f"batch_{number}.tar")
    for pass_index in range(passes):
        if code == "HALD":
            batches = [content for p, _, content in written if p == pass_index]
            torch.save(batches, folder / f"epoch_{pass_index}.tar")
        if code in ("HALD", "LPQLD", "LPQLD k"):
            (folder / f"epoch_{pass_index}").rmdir()
    return truth


def arguments(world, fkd, out) -> list:
    return ["--fkd-dir", fkd, "--data-dir", world.data, "--out-dir", out, *CUSTOM]


def check_labels(data, out, truth) -> None:
    """The stored batches against an independent decoding."""
    pixels = torch.stack([images.pixels_of(images.decode(f)) for f in folders.scan(data).files])
    labels = LabelSet.open(out)
    source = ResidentImages(pixels, TINY, torch.device("cpu"))
    batches = [labels.views(number) for number in range(len(truth))]
    rendered = source.render(batches)
    for number, (members, boxes, flips, mix_index, bbox, target) in enumerate(truth):
        views = []
        for image, box, flip in zip(members, boxes, flips, strict=True):
            view = transforms.resized_crop(
                pixels[image].float(), *box.tolist(), [32, 32], antialias=True
            )
            views.append(transforms.hflip(view) if flip else view)
        views = torch.stack(views)
        mixed = views.clone()
        rows, columns = slice(bbox[0], bbox[2]), slice(bbox[1], bbox[3])
        mixed[:, :, rows, columns] = views[mix_index][:, :, rows, columns]
        expected = transforms.normalize(mixed / 255, TINY.mean, TINY.std)
        assert torch.allclose(next(rendered), expected, atol=1e-3)
        found = torch.softmax(labels[number].logits / 20, dim=1)
        assert torch.allclose(found, target, atol=2e-4 if target.all() else 2e-3)


@pytest.mark.parametrize("code", CODES)
def test_every_layout_is_imported_as_an_independent_decoding_reads_it(
    world, tmp_path, command, code
):
    fkd, out = tmp_path / "fkd", tmp_path / "labels"
    truth = write_published(fkd, code, passes=3)
    done = command(convert.main, *arguments(world, fkd, out))
    assert done.code == 0, done.err
    assert f"layout of {code.split()[0]}" in done.out and "boxes rounded" in done.out
    labels = LabelSet.open(out)
    assert labels.manifest["codec"]["name"] == ("topk" if code == "LPQLD k" else "fp16")
    # Pruned: five batches of five are one pass of three and two of another, filled up with a first.
    missing = len(labels) - len(truth)
    assert missing == (1 if "pruned" in code else 0)
    assert 90 < labels.manifest["teacher_top1"] <= 100
    check_labels(world.data, out, truth + truth[:missing])


def test_boxes_are_the_teachers_or_truncated_as_published(tmp_path, command):
    """Half-precision fractions of 50 pixels do not fall on pixels."""
    fkd, world = (
        tmp_path / "fkd",
        SimpleNamespace(data=write_images(tmp_path / "data", 3, 0, size=50)),
    )
    truth = write_published(fkd, side=50)
    command(convert.main, *arguments(world, fkd, tmp_path / "rounded"))
    check_labels(world.data, tmp_path / "rounded", truth)
    stored = [torch.load(fkd / f"epoch_{number}.tar", weights_only=False) for number in range(2)]
    rounded = [expected[1] for expected in truth]
    for expected, content in zip(truth, stored[0] + stored[1], strict=True):
        expected[1] = np.array([[int(each.item() * 50) for each in view] for view in content[0]])
    assert not np.array_equal(np.concatenate(rounded), np.concatenate([e[1] for e in truth]))
    command(convert.main, *arguments(world, fkd, tmp_path / "truncated"), "--boxes", "published")
    check_labels(world.data, tmp_path / "truncated", truth)


def test_labels_in_halds_layout_that_are_logits_are_taken_as_such(world, tmp_path, command):
    fkd = tmp_path / "fkd"
    truth = write_published(fkd)
    for number in range(2):
        batches = torch.load(fkd / f"epoch_{number}.tar", weights_only=False)
        for batch in batches:
            batch[5] = (20 * batch[5].float().log() + 30).half()
        torch.save(batches, fkd / f"epoch_{number}.tar")
    done = command(convert.main, *arguments(world, fkd, tmp_path / "labels"))
    assert done.code == 0 and "views, logits;" in done.out, done.err
    labels = LabelSet.open(tmp_path / "labels")
    for number, expected in enumerate(truth):
        found = torch.softmax(labels[number].logits / 20, dim=1)
        assert torch.allclose(found, expected[5], atol=2e-3)


@pytest.mark.parametrize("codec", [("quant", "--bits", 8), ("klt", "--distortion", 0.0001)])
def test_any_codec_stores_imported_labels(world, tmp_path, command, codec):
    truth = write_published(tmp_path / "fkd", "LPLD")
    done = command(
        convert.main, *arguments(world, tmp_path / "fkd", tmp_path / "labels"), "--codec", *codec
    )
    assert done.code == 0, done.err
    labels = LabelSet.open(tmp_path / "labels")
    assert labels.manifest["codec"]["name"] == codec[0]
    for number, expected in enumerate(truth):
        found = torch.softmax(labels[number].logits / 20, dim=1)
        assert torch.allclose(found, expected[5], atol=5e-3)


def test_an_order_that_does_not_fit_is_told_as_what_it_is(world, tmp_path, command, monkeypatch):
    fkd, out = tmp_path / "fkd", tmp_path / "labels"
    truth = write_published(fkd, "SRe2L", passes=4, seed=7)
    done = command(convert.main, *arguments(world, fkd, out))
    assert done.code == 2 and "image order is not that of --fkd-seed 42" in done.err, done.err
    assert command(convert.main, *arguments(world, fkd, out), "--fkd-seed", 7).code == 0
    check_labels(world.data, out, truth)
    # A folder of two runs: the order of its third pass is that of the first one again.
    for batch in range(3):
        shutil.copy(fkd / f"epoch_0/batch_{batch}.tar", fkd / f"epoch_2/batch_{batch}.tar")
    shutil.rmtree(out)
    done = command(convert.main, *arguments(world, fkd, out), "--fkd-seed", 7)
    assert done.code == 2 and "those of later passes do not" in done.err, done.err
    assert not out.exists()
    with monkeypatch.context() as patched:  # the first two passes alone are looked at before
        patched.setattr(convert, "_CHECKED_VIEWS", 1)
        done = command(convert.main, *arguments(world, fkd, out), "--fkd-seed", 7)
    assert done.code == 2 and "teacher top-1 on the views of pass 2 is only" in done.err, done.err
    assert not (out / "manifest.json").exists()
    for file in fkd.glob("epoch_*/*"):
        content = torch.load(file, weights_only=False)
        torch.save([*content[:5], content[5].roll(1, dims=1)], file)
    done = command(convert.main, *arguments(world, fkd, out), "--fkd-seed", 7)
    assert done.code == 2 and "another class order" in done.err, done.err


def labels_of(own, partner, lam, classes):
    """Labels that say which classes the views show, and how much of each, and the mixture."""
    mixture = Mixture(own, partner, torch.full((len(own),), lam))
    logits = lam * F.one_hot(own, classes) + (1 - lam) * F.one_hot(partner, classes)
    return logits - logits.mean(1, keepdim=True), mixture


def test_a_short_pass_of_even_mixtures_does_not_fall_behind():
    own, partner = torch.arange(10), torch.arange(10).roll(1)
    logits, mixture = labels_of(own, partner, 0.9, 10)
    first = convert.Fit.of(logits, mixture)
    even, _ = labels_of(own, partner, 0.49, 10)  # where the teacher names the smaller part
    even = convert.Fit.of(even, mixture._replace(lam=torch.full((10,), 0.51)))
    assert not even.right.any() and not even.falls_behind(first)
    assert convert.Fit.of(logits.roll(3, dims=0), mixture).falls_behind(first)


def test_a_pass_in_another_order_falls_behind_with_two_classes_too():
    own = torch.arange(200) % 2
    logits, mixture = labels_of(own, own, 1.0, 2)
    first, other = (convert.Fit.of(each, mixture) for each in (logits, logits.sort(0).values))
    assert other.right.sum() == 100 and other.falls_behind(first)


@pytest.mark.parametrize(("hits", "classes"), [(6, 1000), (15, 200), (120, 10), (530, 2)])
def test_labels_convince_where_far_more_views_than_by_chance_are_named(hits, classes):
    doubtful, convincing = (torch.arange(1000) < count for count in (hits, hits + 35))
    assert not convert.convinces(doubtful, classes) and convert.convinces(convincing, classes)


def test_orders_of_older_versions_of_torch_are_found(world, tmp_path, command, monkeypatch):
    def one_permutation(sampler):
        yield from torch.randperm(12, generator=sampler.generator).tolist()

    with monkeypatch.context() as patched:
        patched.setattr(RandomSampler, "__iter__", one_permutation)
        truth = write_published(tmp_path / "fkd", "SRe2L")
    done = command(convert.main, *arguments(world, tmp_path / "fkd", tmp_path / "labels"))
    assert done.code == 0, done.err
    check_labels(world.data, tmp_path / "labels", truth)


def test_an_imported_set_trains_and_importing_again_does_nothing(world, tmp_path, command):
    fkd, out = tmp_path / "fkd", tmp_path / "labels"
    write_published(fkd)
    before = tree(fkd)
    command(convert.main, *arguments(world, fkd, out))
    imported = tree(out)
    again = command(convert.main, *arguments(world, fkd, out))
    assert again.code == 0 and "nothing to do" in again.out
    assert tree(out) == imported and tree(fkd) == before
    world.labels, own = out, world.labels
    done = command(train.main, *train_arguments(world, tmp_path / "run"))
    world.labels = own
    assert done.code == 0, done.err


def test_labels_of_another_teacher_do_not_continue_a_set(world, tmp_path, command):
    """Same images, order and views: only the logits differ."""
    first, second, out = tmp_path / "first", tmp_path / "second", tmp_path / "labels"
    write_published(first, "SRe2L")
    shutil.copytree(first, second)
    for file in second.glob("epoch_*/*"):
        change_batch(file, lambda batch: [*batch[:5], 2 * batch[5]])
    assert command(convert.main, *arguments(world, first, out)).code == 0
    before = tree(out)
    done = command(convert.main, *arguments(world, second, out))
    assert done.code == 2 and "imported" in done.err, done.err
    assert tree(out) == before


def test_unmixed_labels(world, tmp_path, command):
    write_published(tmp_path / "fkd", mixed=False)
    done = command(convert.main, *arguments(world, tmp_path / "fkd", tmp_path / "labels"))
    assert done.code == 0, done.err
    labels = LabelSet.open(tmp_path / "labels")
    assert labels.manifest["mix"] == "none" and labels.views(0).mix_index is None


def change(fkd, edit):
    batches = torch.load(fkd / "epoch_1.tar", weights_only=False)
    edit(batches)
    torch.save(batches, fkd / "epoch_1.tar")


class Code:
    def __reduce__(self):
        return (print, ("executed",))


def test_labels_of_other_images_are_refused_unless_forced(world, tmp_path, command):
    fkd = tmp_path / "fkd"
    write_published(fkd)
    for number in range(2):
        batches = torch.load(fkd / f"epoch_{number}.tar", weights_only=False)
        for batch in batches:
            batch[5] = batch[5].roll(1, dims=1)
        torch.save(batches, fkd / f"epoch_{number}.tar")
    done = command(convert.main, *arguments(world, fkd, tmp_path / "l"))
    assert done.code == 2 and "probably other images, or another class order" in done.err
    assert command(convert.main, *arguments(world, fkd, tmp_path / "l"), "--force").code == 0


def test_a_seed_that_torch_does_not_take_is_refused(world, tmp_path, command):
    flags = ("--fkd-seed", 10**30)
    done = command(convert.main, *arguments(world, tmp_path, tmp_path / "labels"), *flags)
    assert done.code == 2 and "is out of range" in done.err


REFUSED = {
    "no folder": (shutil.rmtree, "published label folder not found"),
    "missing pass": (
        lambda fkd: (fkd / "epoch_1.tar").unlink(),
        "has 1 passes or batches, sampler_indices_dict.pt the images of 2",
    ),
    "missing order": (lambda f: shutil.copy(f / "epoch_1.tar", f / "epoch_2.tar"), "has 3 passes"),
    "other images": (
        lambda fkd: torch.save({"0": list(range(13))}, fkd / "sampler_indices_dict.pt"),
        "entry 0 does not list images of the 12",
    ),
    "image twice": (
        lambda fkd: torch.save(
            {"0": [0, 0, *range(2, 12)], "1": [*range(12)]}, fkd / "sampler_indices_dict.pt"
        ),
        "once each",
    ),
    "image list of lists": (
        lambda fkd: torch.save(
            {"0": [0, [1, 2]], "1": [*range(12)]}, fkd / "sampler_indices_dict.pt"
        ),
        "entry 0 does not list images of the 12",
    ),
    "fractional partner": (
        lambda fkd: change(fkd, lambda b: b[1].__setitem__(2, b[1][2] + 0.5)),
        "batch 1 is no batch of [coords,",
    ),
    "no flips": (
        lambda fkd: change(fkd, lambda b: b[1].__setitem__(1, None)),
        "batch 1 is no batch of [coords,",
    ),
    "fractional box": (
        lambda fkd: change(fkd, lambda b: b[1].__setitem__(4, [0, 0, 4.5, 4])),
        "batch 1 is no batch of [coords,",
    ),
    "endless box": (
        lambda fkd: change(fkd, lambda b: b[1].__setitem__(4, [0, 0, 4, math.inf])),
        "batch 1 is no batch of [coords,",
    ),
    "sparse crops": (
        lambda fkd: change(fkd, lambda b: b[1].__setitem__(0, b[1][0].to_sparse())),
        "batch 1 is no batch of [coords,",
    ),
    "other classes": (
        lambda fkd: change(fkd, lambda b: b[1].__setitem__(5, b[1][5][:, :3])),
        "batch 1: soft labels are (5, 3), expected (5, 4)",
    ),
    "logits instead of probabilities": (
        lambda fkd: change(fkd, lambda b: b[1].__setitem__(5, 20 * b[1][5].float().log())),
        "batch 1: ('cutmix', 'logits', None) labels, in the first batch",
    ),
    "logits above zero": (
        lambda fkd: change(fkd, lambda b: b[0].__setitem__(5, 9 * b[0][5])),
        "batch 0: ('cutmix', 'logits', None) labels, in the first batch",
    ),
    "another layout": (
        lambda fkd: [file.unlink() for file in fkd.iterdir()],
        "none of the field's layouts",
    ),
    "views missing": (
        lambda fkd: change(fkd, lambda b: b.pop()),
        "epoch_1.tar has 2 batches where 3 belong",
    ),
    "crop outside": (
        lambda fkd: change(fkd, lambda b: b[0][0].__setitem__((0, 0), 0.99)),
        "a crop lies outside its image",
    ),
    "partner outside": (
        lambda fkd: change(fkd, lambda b: b[0][2].__setitem__(0, 7)),
        "batch 0 is no batch of [coords,",
    ),
    "CutMix box outside": (
        lambda fkd: change(fkd, lambda b: b[0].__setitem__(4, [0, 0, 40, 3])),
        "does not fit 32 pixels",
    ),
    "code": (lambda fkd: torch.save([Code()], fkd / "epoch_1.tar"), "nothing in it was executed"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_convert_refuses(world, tmp_path, command, case):
    spoil, message = REFUSED[case]
    fkd = tmp_path / "fkd"
    write_published(fkd)
    spoil(fkd)
    done = command(convert.main, *arguments(world, fkd, tmp_path / "labels"))
    lines = [line for line in done.err.splitlines() if line and not line.startswith("convert:")]
    assert done.code == 2 and len(lines) == 1 and message in lines[0], done.err
    assert not (tmp_path / "labels" / "manifest.json").exists()
    assert "executed\n" not in done.out


def change_batch(file, edit):
    torch.save(edit(torch.load(file, weights_only=False)), file)


LAYOUTS_REFUSED = {
    "batch missing": ("SRe2L", lambda f: (f / "epoch_0/batch_1.tar").unlink(), "no batch_1.tar"),
    "last batch missing": (
        "SRe2L",
        lambda f: [(f / f"epoch_{p}/batch_2.tar").unlink() for p in range(2)],
        "has 4 batches of 5 views where 12 images fill 6",
    ),
    "pass missing": ("SRe2L", lambda f: shutil.rmtree(f / "epoch_0"), "no epoch_0"),
    "pass without batches": (
        "SRe2L",
        lambda f: [file.unlink() for file in (f / "epoch_1").iterdir()],
        "batches are missing; there are [3, 0]",
    ),
    "cutout boxes": (
        "SRe2L",
        lambda f: change_batch(
            f / "epoch_0/batch_0.tar", lambda b: [b[0], torch.zeros(5, 4), *b[2:]]
        ),
        "the ImageNet-21K variants",
    ),
    "parameters of augmentations": (
        "SRe2L",
        lambda f: change_batch(f / "epoch_1/batch_1.tar", lambda b: [*b, [1], [2]]),
        "the ImageNet-21K variants",
    ),
    "order of other batches": (
        "LPQLD",
        lambda f: (f / "sampler_indices_batch.json").write_text('{"0": [1, 2, 3, 4, 5]}'),
        "has 6 passes or batches, sampler_indices_batch.json the images of 1",
    ),
    "no order": ("LPQLD", lambda f: (f / "sampler_indices_batch.json").unlink(), "_batch.json"),
    "order of other images": (
        "LPLD",
        lambda f: (f / "sampler_indices_epoch.json").write_text('{"0": [1, 2, 12], "1": []}'),
        "entry 0 does not list images of the 12",
    ),
    "other number of logits": (
        "LPQLD k",
        lambda f: change_batch(f / "batch_2.tar", lambda b: [*b[:5], b[5][:, :1], b[6][:, :1]]),
        "('cutmix', 'k logits', 1) labels, in the first batch ('cutmix', 'k logits', 2)",
    ),
    "no logits at all": (
        "LPQLD k",
        lambda f: change_batch(f / "batch_2.tar", lambda b: [*b[:5], b[5][:, :0], b[6][:, :0]]),
        "batch_2.tar is no batch of [coords,",
    ),
    "classes that are none": (
        "LPQLD k",
        lambda f: change_batch(f / "batch_2.tar", lambda b: [*b[:6], b[6] + 3]),
        "class indices do not fit 4 classes",
    ),
}


@pytest.mark.parametrize("case", LAYOUTS_REFUSED)
def test_a_damaged_folder_of_any_layout_is_refused(world, tmp_path, command, case):
    code, spoil, message = LAYOUTS_REFUSED[case]
    write_published(tmp_path / "fkd", code)
    spoil(tmp_path / "fkd")
    done = command(convert.main, *arguments(world, tmp_path / "fkd", tmp_path / "labels"))
    lines = [line for line in done.err.splitlines() if line and not line.startswith("convert:")]
    assert done.code == 2 and len(lines) == 1 and message in lines[0], done.err
    assert not (tmp_path / "labels" / "manifest.json").exists()


@pytest.mark.parametrize("mix", ["cutmix", "mixup", "none"])
def test_an_exported_set_is_as_published_and_comes_back_equal(world, tmp_path, command, mix):
    """Of 48 pixels, whose fractions are not those of half precision."""
    own = SimpleNamespace(data=write_images(tmp_path / "data", 3, 0, size=48))
    made = generate_arguments(own.data, tmp_path / "own", world.weights, "--slc", 6, "--mix", mix)
    assert command(generate.main, *made).code == 0
    done = command(export.main, "--label-dir", tmp_path / "own", "--out-dir", tmp_path / "own/x")
    assert done.code == 2 and "is within the label set" in done.err
    done = command(export.main, "--label-dir", tmp_path / "own", "--out-dir", tmp_path / "fkd")
    assert done.code == 0 and "too large" not in done.out, done.err
    labels = LabelSet.open(tmp_path / "own")
    order = torch.load(tmp_path / "fkd" / "sampler_indices_dict.pt", weights_only=True)
    assert [*order] == ["0", "1"] and order["1"] == labels.whole_pass(1).views.index.tolist()
    assert {file.name for file in (tmp_path / "fkd").iterdir()} == {
        *("epoch_0.tar", "epoch_1.tar", "sampler_indices_dict.pt", "export.json")
    }
    before = tree(tmp_path / "fkd")
    done = command(export.main, "--label-dir", tmp_path / "own", "--out-dir", tmp_path / "fkd")
    assert done.code == 0 and "there already: nothing to do" in done.out
    done = command(export.main, "--label-dir", world.labels, "--out-dir", tmp_path / "fkd")
    assert done.code == 2 and "exists already" in done.err and tree(tmp_path / "fkd") == before
    for pass_index in range(2):
        batches = torch.load(tmp_path / "fkd" / f"epoch_{pass_index}.tar", weights_only=True)
        assert [len(batch[0]) for batch in batches] == [5, 5, 2]
        for number, (coords, flips, partner, lam, bbox, soft) in enumerate(batches):
            count, views = len(coords), labels.views(3 * pass_index + number)
            assert coords.dtype == torch.float16 and coords.shape == (count, 4)
            assert flips.dtype == torch.bool and flips.shape == (count,)
            assert soft.dtype == torch.float16 and soft.shape == (count, 4)
            logits = labels[3 * pass_index + number].logits
            assert torch.equal(soft, torch.softmax(logits / 20, dim=1).half())
            # As the published code reads them: truncated.
            assert [[int(each * 48) for each in view] for view in coords.tolist()] == (
                views.box.tolist()
            )
            if mix == "none":
                assert (partner, lam, bbox) == (None, None, None)
                continue
            assert partner.dtype == torch.int64 and partner.shape == (count,)
            assert type(lam) is float and lam == float(views.lam(32)[0])
            if mix == "cutmix":
                x1, y1, x2, y2 = bbox
                assert views.mix_box[0].tolist() == [x1, y1, x2 - x1, y2 - y1]
            else:
                assert bbox is None
    for boxes in ("rounded", "published"):
        back = tmp_path / boxes
        flags = [*arguments(own, tmp_path / "fkd", back), "--boxes", boxes]
        assert command(convert.main, *flags).code == 0
        for number, (views, logits) in enumerate(LabelSet.open(back)):
            assert views.checksum() == labels.views(number).checksum()
            assert torch.allclose(logits, labels[number].logits, atol=0.03)


def test_a_pruned_set_comes_back_from_its_export(world, tmp_path, command):
    write_published(tmp_path / "fkd", "LPLD pruned", passes=3)
    pruned, back = tmp_path / "pruned", tmp_path / "back"
    assert command(convert.main, *arguments(world, tmp_path / "fkd", pruned)).code == 0
    done = command(export.main, "--label-dir", pruned, "--out-dir", tmp_path / "exported")
    assert done.code == 0, done.err
    done = command(convert.main, *arguments(world, tmp_path / "exported", back))
    assert done.code == 0, done.err
    labels = LabelSet.open(pruned)
    # Each pass has 15 views of 12 images.
    assert drift.measure(labels).place[14:16].tolist() == [[0, 14], [1, 0]]
    for number, (views, logits) in enumerate(LabelSet.open(back)):
        assert views.checksum() == labels.views(number).checksum()
        assert torch.allclose(logits, labels[number].logits, atol=0.03)

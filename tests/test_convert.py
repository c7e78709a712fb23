"""Published FKD label folders: imported batch for batch as an independent decoding reads them."""

import shutil

import numpy as np
import pytest
import torch
from conftest import CUSTOM, TINY, train_arguments, tree
from torchvision.transforms import functional as transforms

from relabel import convert
from utils.data import folders, images
from utils.data.images import ResidentImages
from utils.labels import LabelSet
from validate import train


def write_published(folder, passes=2, batch=5, mixed=True) -> None:
    """12 images of 32 pixels, 4 classes, in the published layout: half-precision boxes and all."""
    folder.mkdir()
    numbers = np.random.default_rng(3)
    order = {str(number): numbers.permutation(12).tolist() for number in range(passes)}
    torch.save(order, folder / "sampler_indices_dict.pt")
    for number in range(passes):
        batches = []
        for start in range(0, 12, batch):
            count = min(batch, 12 - start)
            size = numbers.uniform(0.3, 0.9, (count, 2))
            place = numbers.uniform(0, 1, (count, 2)) * (1 - size)
            coords = torch.from_numpy(np.concatenate([place, size], axis=1)).half()
            corner = np.int64(numbers.integers(0, 20))
            bbox = [corner, np.int64(4), corner + 9, np.int64(22)] if mixed else None
            logits = torch.from_numpy(numbers.normal(0, 4, (count, 4)))
            members = order[str(number)][start : start + count]
            logits[range(count), [image // 3 for image in members]] += 20
            batches.append(
                [
                    coords,
                    torch.from_numpy(numbers.random(count) < 0.5),
                    torch.from_numpy(numbers.permutation(count)) if mixed else None,
                    np.float64(0.7) if mixed else None,
                    bbox,
                    torch.softmax(logits / 20, dim=1).half(),
                ]
            )
        torch.save(batches, folder / f"epoch_{number}.tar")


def arguments(world, fkd, out) -> list:
    return ["--fkd-dir", fkd, "--data-dir", world.data, "--out-dir", out, *CUSTOM]


def published_files(fkd, number):
    order = torch.load(fkd / "sampler_indices_dict.pt", weights_only=False)[str(number)]
    return order, torch.load(fkd / f"epoch_{number}.tar", weights_only=False)


def test_images_and_targets_equal_an_independent_decoding(world, tmp_path, command):
    fkd, out = tmp_path / "fkd", tmp_path / "labels"
    write_published(fkd)
    done = command(convert.main, *arguments(world, fkd, out))
    assert done.code == 0, done.err
    pixels = images.load_evaluation(folders.scan(world.data), TINY)
    labels = LabelSet.open(out)
    source = ResidentImages(pixels, TINY, torch.device("cpu"))
    rendered = list(source.render([labels.views(number) for number in range(len(labels))]))
    position = 0
    for number in range(2):
        order, batches = published_files(fkd, number)
        for coords, flips, mix_index, _, bbox, soft in batches:
            members = [order.pop(0) for _ in range(len(flips))]
            views = []
            for image, fractions, flip in zip(members, coords, flips, strict=True):
                top, left, height, width = (int(value.item() * 32) for value in fractions)
                view = transforms.resized_crop(
                    pixels[image].float(), top, left, height, width, [32, 32], antialias=True
                )
                views.append(transforms.hflip(view) if flip else view)
            views = torch.stack(views)
            mixed = views.clone()
            rows, columns = slice(bbox[0], bbox[2]), slice(bbox[1], bbox[3])
            mixed[:, :, rows, columns] = views[mix_index][:, :, rows, columns]
            expected = transforms.normalize(mixed / 255, TINY.mean, TINY.std)
            assert torch.allclose(rendered[position], expected, atol=1e-3)
            found = torch.softmax(labels[position].logits / 20, dim=1)
            assert torch.allclose(found, soft.float(), atol=2e-4)
            position += 1
    assert position == len(labels) == 6


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


REFUSED = {
    "no folder": (shutil.rmtree, "published label folder not found"),
    "missing pass": (lambda fkd: (fkd / "epoch_1.tar").unlink(), "epoch_1.tar"),
    "other images": (
        lambda fkd: torch.save({"0": list(range(13))}, fkd / "sampler_indices_dict.pt"),
        "lists 13 images",
    ),
    "image twice": (
        lambda fkd: torch.save({"0": [0, 0, *range(2, 12)]}, fkd / "sampler_indices_dict.pt"),
        "once each",
    ),
    "other classes": (
        lambda fkd: change(fkd, lambda b: b[1].__setitem__(5, b[1][5][:, :3])),
        "batch 1: soft labels are (5, 3), expected (5, 4)",
    ),
    "logits instead of probabilities": (
        lambda fkd: change(fkd, lambda b: b[1].__setitem__(5, 20 * b[1][5].float().log())),
        "batch 1: soft labels are no probabilities",
    ),
    "logits above zero": (
        lambda fkd: change(fkd, lambda b: b[0].__setitem__(5, 9 * b[0][5])),
        "batch 0: soft labels are no probabilities",
    ),
    "another layout": (
        lambda fkd: (fkd / "sampler_indices_dict.pt").unlink(),
        "only the layout of HALD's published labels can be imported; relabel/generate.py",
    ),
    "views missing": (lambda fkd: change(fkd, lambda b: b.pop()), "has 10 views"),
    "crop outside": (
        lambda fkd: change(fkd, lambda b: b[0][0].__setitem__((0, 0), 0.99)),
        "a crop lies outside its image",
    ),
    "partner outside": (
        lambda fkd: change(fkd, lambda b: b[0][2].__setitem__(0, 7)),
        "mix_index does not name views",
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


def test_stored_views_take_at_most_ten_bytes_each_at_224_pixels():
    from utils.data.views import ViewSpec, draw
    from utils.labels.arrays import views_to_arrays

    views = draw(ViewSpec(224, 16), np.full((10000, 2), 224), 0)
    assert sum(array.nbytes for array in views_to_arrays(views).values()) <= 10 * 10000

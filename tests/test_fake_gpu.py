"""What a GPU would be asked to do, seen without one: nothing waits, and launches are counted."""

import dataclasses
import threading
from collections.abc import Callable
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import write_images
from fake_gpu import CUDA, Watch, fake_gpu, machine

import models
from relabel import generate
from relabel.teacher import Ensemble, Teacher, use_batch_statistics
from utils import cli, runtime
from utils.data import datasets, folders, images
from utils.data.images import ResidentImages
from utils.data.views import ViewSpec
from utils.labels import LabelSet, LabelWriter, make_settings
from validate import evaluate, kinds
from validate.kinds import Batch
from validate.settings import Materials, Settings, parse_arguments, resolve
from validate.train import Training

SIZE, CLASSES, IMAGES, BATCHES = 224, 8, 128, 8
FACTS = datasets.Dataset("custom", CLASSES, SIZE, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
READ_BACK = (
    "a value is read, validate/step.py: loss, seen, *correct = self.machine.total(sums).tolist()"
)


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> SimpleNamespace:
    """128 images of 8 classes in batches of 16, and label sets of mixed and of unmixed views."""
    root = tmp_path_factory.mktemp("stored")
    write_images(root / "images", IMAGES // CLASSES, seed=0, classes=CLASSES)
    folder = folders.scan(root / "images")
    sizes, fingerprint = images.inspect(folder)
    for mix in ("cutmix", "none"):
        settings = make_settings(
            dataset=FACTS,
            folder=folder,
            sizes=sizes,
            images_sha256=fingerprint,
            ipc=IMAGES // CLASSES,
            passes=1,
            spec=ViewSpec(SIZE, mix=mix),
            seed=0,
            origin={"views_per_forward": 256},
            codec={"name": "klt", "distortion": 0.05},
        )
        writer = LabelWriter(root / mix, settings, sizes)
        logits = torch.randn(IMAGES, CLASSES, generator=torch.Generator().manual_seed(0))
        with writer.begun():
            drawn = writer.draw(0)
            writer.fit([(drawn, logits)], folder.labels)
            writer.write_pass(0, logits, drawn, folder.labels)
            writer.finish()
    return SimpleNamespace(root=root, folder=folder, sizes=sizes)


def prepared(stored, schedule: str, *flags: str) -> tuple[Settings, Materials]:
    """What validate/train.py makes of these flags on a GPU."""
    labels = stored.root / ("none" if "static" in schedule else "cutmix")
    words = ["--data-dir", stored.root / "images", "--val-dir", stored.root / "images"]
    words += ["--output-dir", stored.root / "run", "--label-dir", labels, "--dataset", "custom"]
    words += ["--input-size", SIZE, "--mean", *FACTS.mean, "--std", *FACTS.std]
    words += ["--schedule", schedule, *flags]
    args = parse_arguments([*map(str, words)])
    dataset = datasets.from_arguments(args)
    materials = Materials.open(dataset, args.data_dir, args.val_dir, args.label_dir)
    return resolve(args, materials, machine()), materials


def trained(
    settings: Settings, materials: Materials, spoil: Callable[[Training], None] = lambda _: None
) -> Watch:
    """Trains all epochs on the fake GPU; what was seen in the second one."""
    with fake_gpu() as watch:
        # Whether the network takes the images is asked before, and is allowed to wait.
        with mock.patch.multiple(runtime, check_outputs=mock.DEFAULT, check_trains=mock.DEFAULT):
            training = Training(settings, materials, machine())
        spoil(training)
        step, student = training.step, training.student
        for epoch in range(len(settings.kinds)):
            watch.clear()
            kind = training.begin_epoch(epoch)
            with watch.phases(
                rest_of_step=(step, "_update"),
                forward=(student, "forward"),
                backward=(torch.Tensor, "backward"),
                loss=(kind, "loss"),
                optimiser=(step.scaler, "step"),
            ):
                for batches in training.batches(kind, epoch):
                    step(batches, kind.loss)
                step.means()
    return watch


@pytest.mark.parametrize(
    ("kind", "most"),
    [("hard", 270), ("soft", 270), ("joint", 299), ("moved", 299), ("static", 270)],
)
def test_an_epoch_reads_one_result_and_launches_few_kernels(stored, record_property, kind, most):
    """At most 20 launches per step outside a graph; one by one, ResNet-18 itself needs some 220."""
    settings, materials = prepared(stored, f"{kind}:2", "--model", "ResNet18")
    for graph in (True, False):
        watch = trained(dataclasses.replace(settings, graph=graph), materials)
        assert {*watch.waits} == {READ_BACK}
        per_step = {phase: count / BATCHES for phase, count in watch.launches.items()}
        phases = ", ".join(f"{phase} {count:g}" for phase, count in sorted(per_step.items()))
        way = "one graph a step" if graph else "kernel by kernel"
        record_property(f"launches per step, {kind} epoch, {way}", phases)
        if graph:
            assert per_step["other"] <= 20
        else:
            assert sum(per_step.values()) <= most


def read_the_loss(training: Training) -> None:
    loss = training.kinds["hard"].loss
    training.kinds["hard"].loss = lambda *given: loss(*given) * loss(*given).item()


def ask_for_nan(training: Training) -> None:
    loss = training.kinds["hard"].loss
    training.kinds["hard"].loss = lambda *given: loss(*given) * bool(loss(*given).isnan().any())


def index_on_the_cpu(training: Training) -> None:
    render = training.data.render
    rows = torch.arange(2)
    training.data.render = lambda given: (
        Batch(*(part if part is None else part[rows] for part in batch)) for batch in render(given)
    )


def mean_on_the_cpu(training: Training) -> None:
    training.data.source.mean = torch.zeros(3)


def upload_at_leisure(training: Training) -> None:
    training.data.fresh_views = lambda epoch: [
        dataclasses.replace(batch, index=batch.index.cpu().to(CUDA))
        for batch in type(training.data).fresh_views(training.data, epoch)
    ]


def channels_first(training: Training) -> None:
    block = training.student.layer1
    block.register_forward_pre_hook(lambda _, given: (given[0].contiguous(),))


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (read_the_loss, "a value is read, tests/test_fake_gpu.py"),
        (ask_for_nan, "a value is read, tests/test_fake_gpu.py"),
        (index_on_the_cpu, "an index on cpu"),
        (mean_on_the_cpu, "device"),
        (upload_at_leisure, "an upload from memory that is not pinned"),
        (channels_first, "a convolution of channels first"),
    ],
)
def test_a_fault_is_seen(stored, spoil, told):
    """So that the test above can fail: each of these would slow a GPU down, or stop it."""
    settings, materials = prepared(stored, "hard:1", "--model", "ResNet18")
    try:
        seen = [*trained(settings, materials, spoil).waits]
    except RuntimeError as error:
        seen = [str(error).lower()]
    assert any(told in each for each in seen), seen


def test_images_in_main_memory_are_sent_without_waiting(stored):
    settings, materials = prepared(stored, "hard:2", "--model", "ResNet18")
    with mock.patch.object(images, "fits", lambda *_: False):
        watch = trained(settings, materials)
    index = "a copy to the CPU is waited for, utils/data/images.py: "
    index += "indices = [views.index.to(self.pixels.device) for views in batches]"
    assert watch.waits == {READ_BACK: 7, index: 1}  # one group of eight batches


def test_an_evaluation_reads_one_result(stored):
    with fake_gpu() as watch:
        model = models.build("ResNet18", CLASSES, SIZE)
        model.to(CUDA, memory_format=torch.channels_last)
        pixels = torch.zeros(512, 3, SIZE, SIZE, dtype=torch.uint8, device=CUDA)
        targets = torch.zeros(512, dtype=torch.int64)
        watch.clear()
        evaluate.accuracy(model, pixels=pixels, targets=targets, dataset=FACTS, machine=machine())
    assert watch.waits == {
        "a value is read, validate/evaluate.py: ranked = machine.total(counts).tolist()": 5
    }


def test_labelling_waits_for_nothing_but_labels(stored):
    settings = LabelSet.open(stored.root / "cutmix").manifest
    writer = LabelWriter(stored.root / "new", settings, np.full((IMAGES, 2), 32))
    with fake_gpu() as watch:
        model = models.build("ResNet18", CLASSES, SIZE).requires_grad_(False).eval()
        model.to(CUDA, memory_format=torch.channels_last)
        assert use_batch_statistics(model) == 20
        teachers = Ensemble([Teacher("", model, "")], None, machine(), graph=True)
        pixels = torch.zeros(IMAGES, 3, 32, 32, dtype=torch.uint8)
        source = ResidentImages(pixels, FACTS, CUDA)
        watch.clear()
        with cli.progress(disable=True) as bar:
            passes = generate.label_passes(range(2), writer, teachers, source, bar)
            _, _, logits = next(passes)
    assert logits.shape == (IMAGES, CLASSES)
    # Both passes are under way when the first one's labels are waited for.
    (copied,) = watch.waits
    assert copied.startswith("a copy to the CPU, utils/runtime.py") and watch.waits[copied] == 2


def test_the_views_of_the_next_epoch_are_drawn_beside_the_gpu(stored, monkeypatch):
    """Each epoch's once; those of the first epoch of a phase when it begins."""
    settings, materials = prepared(stored, "hard:3,soft:1,hard:2", "--model", "ConvNetW32")
    drawn, original = [], kinds.draw

    def draw(spec, sizes, seed, epoch=0):
        drawn.append((epoch, threading.current_thread() is threading.main_thread()))
        return original(spec, sizes, seed, epoch)

    monkeypatch.setattr(kinds, "draw", draw)
    trained(settings, materials)
    assert drawn == [(epoch, False) for epoch in (1, 2, 3, 5, 6)]

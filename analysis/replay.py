"""A recorded run, once more: trained in memory, step by step, from the settings in its args.yaml.

Training is a function of its settings, so what a study wants to see on the way need not have been
recorded: the run is trained again, and nothing in its folder changes.
"""

import dataclasses
from pathlib import Path

from utils import cli, runlog, runtime
from utils.cli import UserError
from validate.evaluate import check_confirmed
from validate.settings import Materials, Settings
from validate.train import Training

CONFIRMING = "the network of the run, where it is a package.module:factory"


class Replay:
    """Trains a recorded run from the start, epoch by epoch.

    Attributes:
        training: see validate.train.Training.
        settings, materials: of the run.
    """

    def __init__(self, run: Path, what: str, model: str | None = None):
        """Opens images and labels of the run in a folder.

        Args:
            run: the folder.
            what: names the progress bar.
            model: the network where it is code, which a file may not name alone.

        Raises:
            UserError: no run there, or one that would be another one here: other images or labels
                by now, several processes, or a precision that this device lacks.
        """
        path = run / runlog.ARGUMENTS
        if not path.exists():
            raise UserError(f"{run} is not a run folder: it has no {runlog.ARGUMENTS}")
        settings = Settings.from_record(runlog.RunFolder(run).settings(), run)
        check_confirmed(settings.model, model, run)
        machine = runtime.start(device=settings.device, amp=settings.precision)
        materials = Materials.open(
            settings.facts,
            data_dir=Path(settings.data_dir),
            val_dir=Path(settings.val_dir),
            label_dir=Path(settings.label_dir) if settings.label_dir else None,
        )
        now = dataclasses.replace(
            settings,
            images_sha256=materials.images_sha256,
            validation_images=materials.validation.listing_sha256(),
            labels_sha256=materials.labels_sha256(),
            processes=machine.world,
        )
        if difference := now.difference(settings):
            raise UserError(f"{run} cannot be trained again as it was: {difference}")
        self.settings, self.materials = settings, materials
        plain = dataclasses.replace(settings, compile=False, graph=False)
        self.training = Training(plain, materials, machine)
        views = len(settings.kinds) * len(materials.folder.files)
        self.bar = cli.progress(desc=what, unit="view", total=views)

    def train_epoch(self, epoch: int) -> None:
        """Trains an epoch, counted from 0; epochs must follow one another."""
        training = self.training
        kind = training.begin_epoch(epoch)
        for batches in training.batches(kind, epoch):
            training.step(batches, kind.loss)
            self.bar.update(sum(len(batch.pixels) for batch in batches))

"""The codec klt: a basis and class means fitted to the labels, one quantiser step."""

import bisect
import functools
import math
from typing import Any, ClassVar

import numpy as np
import torch

from utils.cli import UserError, bounded
from utils.data.views import Mixture
from utils.labels.codecs.base import BLOCK, Codec, Codes, distortion, flag, labels_to_fit

# What klt aims at without a target: near-lossless. Settled by the study of accuracy per byte.
DEFAULT_DISTORTION = 0.002
LARGEST = (1 << 15) - 1  # of the absolute values of codes


def _pcodec():
    """The package pcodec, which this codec alone needs."""
    try:
        import pcodec
    except ImportError:
        raise UserError("codec klt needs the package pcodec: pip install 'pcodec<2'") from None
    return pcodec


def pack_integers(values: torch.Tensor) -> bytes:
    """A pcodec stream (standalone format) of int16 [K, N], row after row."""
    pcodec = _pcodec()
    # Neighbours have nothing in common that a difference or a common factor would show, but rows
    # differ in spread: each part of a stream has frequencies of its own.
    packing = pcodec.ChunkConfig(
        compression_level=8,
        mode_spec=pcodec.ModeSpec.classic(),
        delta_spec=pcodec.DeltaSpec.no_op(),
        paging_spec=pcodec.PagingSpec.equal_pages_up_to(1 << 15),
    )
    whole = values.to(torch.int16).cpu().contiguous().numpy()
    return bytes(pcodec.standalone.simple_compress(whole.reshape(-1), packing))


def unpack_integers(stream: bytes, rows: int, columns: int) -> torch.Tensor:
    """int16 [rows, columns]: the inverse of pack_integers; raises UserError on damage."""
    standalone = _pcodec().standalone
    try:
        values = np.empty(rows * columns, dtype=np.int16)  # touched only as far as it is filled
        progress = standalone.simple_decompress_into(stream, values)
        complete = progress.finished and progress.n_processed == len(values)
    except (RuntimeError, MemoryError, ValueError):
        complete = False
    if not complete:
        raise UserError("the packed numbers of a label set are damaged")
    return torch.from_numpy(values).view(rows, columns)


def _entropy_bits(values: torch.Tensor) -> torch.Tensor:
    """float64 [K]: bits that each column of whole numbers [N, K] needs at its own frequencies."""
    clipped = values.clamp(-2048, 2047).long()
    low = clipped.min()
    width = int(clipped.max() - low) + 1
    columns = torch.arange(clipped.shape[1], device=values.device) * width
    counts = torch.bincount((clipped - low + columns).flatten(), minlength=clipped.shape[1] * width)
    counts = counts.view(-1, width).double()
    nats = len(values) * math.log(max(len(values), 1)) - torch.xlogy(counts, counts).sum(1)
    return nats / math.log(2)


def _principal(centred: torch.Tensor, rank: int = 1024) -> torch.Tensor:
    """float32 [K, C]: orthonormal directions of [N, C], the largest variance first.

    All of them up to 4096 classes, by the eigenvectors of the covariance; above that the `rank`
    leading ones by torch.svd_lowrank, which draws its start: here always the same.
    """
    classes, device = centred.shape[1], centred.device
    if classes <= 4 * rank:
        scatter = torch.zeros(classes, classes, dtype=torch.float64, device=device)
        for chunk in centred.split(BLOCK):
            scatter += chunk.double().T @ chunk.double()
        return torch.linalg.eigh(scatter).eigenvectors.flip(1).T.float().contiguous()
    with torch.random.fork_rng(devices=[device] if centred.is_cuda else []):
        torch.manual_seed(0)
        _, _, directions = torch.svd_lowrank(centred, q=min(rank, len(centred)), niter=4)
    return directions.T.contiguous()


def _blend(class_means: torch.Tensor, mixture: Mixture) -> torch.Tensor:
    """[N, K]: lambda-weighted rows of class_means [classes, K]."""
    lam = mixture.lam[:, None]
    return lam * class_means[mixture.own] + (1 - lam) * class_means[mixture.partner]


def _class_means(values: torch.Tensor, mixture: Mixture, num_classes: int) -> torch.Tensor:
    """float32 [num_classes, K]: class means whose blends fit values [N, K] best.

    Least squares by the normal equations, shrunk as if every class had one label more, a label of
    the overall mean.
    """
    normal = torch.eye(num_classes, dtype=torch.float64, device=values.device)
    total = normal.new_zeros(num_classes, values.shape[1])
    shown = ((mixture.own, mixture.lam.double()), (mixture.partner, 1 - mixture.lam.double()))
    # index_put_ adds in a fixed order on a GPU, too, which index_add_ does not.
    for label, share in shown:
        total.index_put_((label,), share[:, None] * values, accumulate=True)
        for other, other_share in shown:
            normal.index_put_((label, other), share * other_share, accumulate=True)
    return torch.cholesky_solve(total, torch.linalg.cholesky(normal)).float()


class Klt(Codec):
    """The label minus what its class mean predicts, in the basis where logits decorrelate.

    Karhunen-Loeve transform: the basis are the principal directions of centred logits, and one
    quantiser step for all components spends bits where they reduce squared error most, which at
    high temperature is KL. A coefficient is coded as round((coefficient - prediction) / step);
    the prediction is the lambda-weighted mean of the classes in the view, in the components where
    that pays. Payload: uint32 N, then `pack_integers` of the codes [K, N].

    codec.npz holds `scales`, float32 [1 + C + K]: the step, the mean label, and a scale for each
    component; `basis`, uint8, pack_integers of [K, C], whose rows times their scales are the
    directions; `class_means`, uint8, pack_integers of [K, C], times step / 4 the coefficients of
    the class means. Three arrays, because each takes some 250 bytes more in an archive.
    """

    name = "klt"
    fitted = True
    flags: ClassVar = {
        "bytes_per_label": {
            "type": bounded(float, 0.1),
            "metavar": "N",
            "help": "budget for the logits, basis and class means included",
        },
        "distortion": {
            "type": bounded(float, 1e-6, 1),
            "metavar": "X",
            "help": "share of the label's information lost at temperature 20 "
            f"(default without a budget: {DEFAULT_DISTORTION})",
        },
    }

    def __init__(self, num_classes: int, arrays: dict[str, np.ndarray], **target: float):
        """A codec from the content of codec.npz; `target` is what it was fitted to."""
        super().__init__(num_classes, **target)
        self._arrays = arrays
        scales = torch.from_numpy(arrays["scales"].astype(np.float32))
        components = len(scales) - 1 - num_classes
        step, mean, scale = scales.split([1, num_classes, components])
        self.step = step.item()

        def matrix(name: str) -> torch.Tensor:
            return unpack_integers(arrays[name].tobytes(), components, num_classes).float()

        basis = matrix("basis") * scale[:, None]
        self.basis = basis - basis.mean(1, keepdim=True)
        self.mean = mean - mean.mean()
        self.class_means = matrix("class_means").T.contiguous() * (self.step / 4)
        # The rounded basis is not quite orthonormal: least squares, not the transpose, inverts it.
        rows = self.basis.double()
        gram = rows @ rows.T
        gram += 1e-9 * gram.trace() * torch.eye(components)
        self.projection = torch.linalg.solve(gram, rows).T.float().contiguous()

    @classmethod
    def options_from(cls, given: dict[str, Any]) -> dict[str, Any]:
        if len(given) > 1:
            raise UserError("--distortion is not allowed with --bytes-per-label")
        return given or {"distortion": DEFAULT_DISTORTION}

    def arrays(self) -> dict[str, np.ndarray]:
        return self._arrays

    def to(self, device: torch.device) -> "Klt":
        """Moves the fitted part to a device."""
        for name in ("basis", "mean", "class_means", "projection"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def encode(self, logits: torch.Tensor, mixture: Mixture) -> Codes:
        self.to(logits.device)
        coefficients = (logits - self.mean) @ self.projection
        codes = ((coefficients - _blend(self.class_means, mixture)) / self.step).round()
        if codes.numel() and codes.abs().max() > LARGEST:
            raise UserError(
                "a teacher's logits are thousands of times larger than those that codec klt was "
                "fitted on; a coarser --distortion or --codec fp16 can store them"
            )
        return (codes.short(),)

    def pack_codes(self, codes: Codes) -> bytes:
        return len(codes[0]).to_bytes(4, "little") + pack_integers(torch.cat(codes, 1).T)

    def unpack(self, payload: bytes) -> Codes:
        labels = int.from_bytes(payload[:4], "little")
        codes = unpack_integers(payload[4:], len(self.basis), labels)
        # In memory, a byte holds a code of all components after the last that needs two.
        wide = (codes.abs().amax(1) > 127).nonzero() if codes.numel() else codes.new_zeros(0)
        split = int(wide.max()) + 1 if len(wide) else 0
        return codes[:split].T.contiguous(), codes[split:].to(torch.int8).T.contiguous()

    def expand(self, codes: Codes, mixture: Mixture) -> torch.Tensor:
        self.to(codes[0].device)
        coefficients = torch.cat([code.float() for code in codes], 1) * self.step
        return torch.addmm(self.mean, coefficients + _blend(self.class_means, mixture), self.basis)

    @classmethod
    def fit(
        cls,
        samples: list[tuple[torch.Tensor, Mixture]],
        num_classes: int,
        labels: int,
        pass_labels: int | None = None,
        **target: float,
    ) -> "Klt":
        """Fits basis, class means and step to the first labels of a set, on their device.

        Of a sample of at most 20,000 labels, four fifths give the basis and the means and the
        fifth label each is held back, to find the step that meets the target on labels that were
        not fitted. Where the sample is the whole set, all of it serves both ends.

        Args:
            samples: centred logits float32 [n, C] and their mixtures.
            num_classes: C.
            labels: how many labels the fitted part will serve; its bytes count pro rata.
            pass_labels: labels packed together (default: as many as there are).
            target: bytes_per_label, a budget, the fitted part included; or distortion, at
                temperature 20. By default DEFAULT_DISTORTION.

        Raises:
            UserError: no step is coarse enough for the budget.
        """
        count = min(labels, labels_to_fit(num_classes))
        logits = torch.cat([logits for logits, _ in samples])[:count]
        parts = zip(*(mixture for _, mixture in samples), strict=True)
        mixture = Mixture(*(torch.cat(part)[:count] for part in parts))
        return _Fit(logits, mixture, num_classes, labels, pass_labels).search(
            target or {"distortion": DEFAULT_DISTORTION}
        )


class _Fit:
    """The statistics of a sample of labels, and the klt codec for any step."""

    def __init__(self, logits, mixture, num_classes, labels, pass_labels):
        self.num_classes, self.labels = num_classes, labels
        rows = torch.arange(len(logits), device=logits.device)
        train, probe = rows, rows[:: -(-len(rows) // 8192)]
        if len(logits) < labels and len(logits) >= 5:
            train, probe = rows[rows % 5 != 4], rows[rows % 5 == 4]
        self.pass_labels = min(pass_labels or labels, 8192)
        self.probe, self.probe_mixture = logits[probe], mixture.rows(probe)
        self.mean = logits[train].mean(0)
        centred = logits[train] - self.mean
        self.directions = _principal(centred)
        values = centred @ self.directions.T
        self.deviation = values.square().mean(0).sqrt().clamp(min=1e-6)
        self.class_means = _class_means(values, mixture.rows(train), num_classes)
        centred = self.probe - self.mean
        self.values = centred @ self.directions.T
        self.energy = self.values.double().square().sum(0)
        self.outside = float(centred.double().square().sum() - self.energy.sum())

    def search(self, target: dict[str, float]) -> Klt:
        """The codec of the coarsest step of a distortion, or of the finest of a budget.

        Steps differ by half a percent. What they cost is estimated, and measured for the step that
        the estimates name; estimates are then corrected by what was measured.
        """
        (name, wanted), *_ = target.items()
        measure = {"bytes_per_label": self.bytes_per_label, "distortion": self.distortion}[name]
        # Labels that are all the same need no components: any step will do.
        finest = max(float(self.values.abs().max()), 1e-3) * 4 / LARGEST
        coarsest = max(float(self.deviation.max()) * 16, 2 * finest)
        count = math.ceil(200 * math.log(coarsest / finest))
        steps = np.geomspace(finest, coarsest, count).tolist()
        if name == "bytes_per_label":
            steps = steps[::-1]  # what is measured grows along the steps

        @functools.cache
        def estimate(position: int) -> float:
            return self.plan(steps[position])[1][name]

        best, tried, aim = None, set(), wanted
        while True:
            position = bisect.bisect_right(range(len(steps)), aim, key=estimate) - 1
            # An estimate jumps where components come and go, and a further step may meet the aim.
            for further in range(position + 1, min(position + 5, len(steps))):
                if estimate(further) <= aim:
                    position = further
            if position < 0 or position in tried:
                break
            tried.add(position)
            codec = self.codec(steps[position], target)
            measured = measure(codec)
            aim *= wanted / max(measured, 1e-12)
            if measured > wanted:
                aim = min(aim, math.nextafter(estimate(position), 0))
            elif best is None or position > best[0]:
                best = position, codec
        if best is None:
            raise UserError(
                f"{flag(name)} {wanted:g} cannot be met by codec klt for {self.labels} labels"
            )
        return best[1]

    def bytes_per_label(self, codec: Klt) -> float:
        """Bytes per label of the held-back labels, the fitted part included pro rata."""
        (codes,) = codec.encode(self.probe, self.probe_mixture)
        # Passes may be longer than what was held back, and a stream has a fixed part.
        rows = torch.arange(max(len(codes), self.pass_labels), device=codes.device) % len(codes)
        used = sum(len(codec.pack_codes((codes[part],))) for part in rows.split(self.pass_labels))
        return used / len(rows) + fitted_bytes(codec) / self.labels

    def distortion(self, codec: Klt) -> float:
        """Distortion of the held-back labels."""
        decoded = codec.expand(codec.encode(self.probe, self.probe_mixture), self.probe_mixture)
        return distortion(self.probe, decoded)

    def plan(self, step: float) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """The arrays of the codec of one step, as numbers, and what it is expected to cost.

        Components are kept only where they pay, and so are class means in them.

        Squared error is weighed against bits at the slope of a uniform quantiser at high rate,
        d(error) / d(bit) = 2 ln 2 step^2 / 12. The same slope gives the precision of the basis,
        whose bits serve all labels: with rows scaled to a label's deviation, step / sqrt(labels).
        Bits are those of the entropy, and distortion that of a high temperature: the share of the
        squared logits that is lost.
        """
        price = 2 * math.log(2) * step**2 / 12
        share = self.labels / len(self.probe)
        scaled = self.directions * self.deviation[:, None]
        basis_step = max(step / math.sqrt(self.labels), float(scaled.abs().max()) / LARGEST)
        basis = (scaled / basis_step).round()
        means = (self.class_means / (step / 4)).round().clamp(-LARGEST, LARGEST)

        def coded(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            """Squared error and bits of each component, in the whole set."""
            codes = (values / step).round()
            error = (values - codes * step).double().square().sum(0)
            return share * error, share * _entropy_bits(codes)

        error, bits = coded(self.values)
        helped_error, helped_bits = coded(
            self.values - _blend(means * (step / 4), self.probe_mixture)
        )
        helped_bits += _entropy_bits(means)
        helped = helped_error + price * helped_bits < error + price * bits
        error, bits = (
            torch.where(helped, helped_error, error),
            torch.where(helped, helped_bits, bits),
        )
        bits += _entropy_bits(basis.T)
        kept = (error + price * bits < share * self.energy) & basis.any(1)
        lost = torch.where(kept, error / share, self.energy).sum() + self.outside
        plain_bytes = 4 * (1 + self.num_classes + int(kept.sum())) + 256 * 3
        expected = {
            "bytes_per_label": (float(bits[kept].sum()) / 8 + plain_bytes) / self.labels,
            "distortion": float(lost / self.probe.double().square().sum().clamp(min=1e-30)),
        }
        scale = basis_step / self.deviation
        parts = {
            "scale": scale[kept],
            "basis": basis[kept],
            "class_means": (means * helped).T[kept],
        }
        return parts, expected

    def codec(self, step: float, target: dict[str, float]) -> Klt:
        """The codec of one step."""
        step = float(np.float32(step))
        parts, _ = self.plan(step)
        scales = torch.cat([parts["scale"].new_tensor([step]), self.mean, parts["scale"]])
        arrays = {
            "scales": scales.cpu().numpy().astype("<f4"),
            "basis": np.frombuffer(pack_integers(parts["basis"]), np.uint8),
            "class_means": np.frombuffer(pack_integers(parts["class_means"]), np.uint8),
        }
        return Klt(self.num_classes, arrays, **target)


def fitted_bytes(codec: Codec) -> int:
    """Bytes of codec.npz: its arrays and some 256 bytes of naming for each."""
    return sum(array.nbytes + 256 for array in codec.arrays().values())

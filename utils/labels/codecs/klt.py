"""The codec klt: a basis and class means fitted to the labels, one quantiser step."""

import math
from typing import Any, ClassVar

import numpy as np
import torch

from utils.cli import UserError, bounded
from utils.data.views import Mixture
from utils.labels.codecs.base import BLOCK, Codec, Codes, distortion, flag, half, labels_to_fit
from utils.labels.packing import LARGEST, pack_integers, unpack_integers

# What klt aims at without a target: near-lossless. Settled by the study of accuracy per byte.
DEFAULT_DISTORTION = 0.002


def _entropy_bits(values: torch.Tensor) -> torch.Tensor:
    """float64 [K]: bits that each column of whole numbers [N, K] needs at its own frequencies."""
    clipped = values.clamp(-2048, 2047).long()
    low = clipped.min()
    width = int(clipped.max() - low) + 1
    columns = torch.arange(clipped.shape[1], device=values.device) * width
    counts = torch.bincount((clipped - low + columns).flatten(), minlength=clipped.shape[1] * width)
    counts = counts.view(-1, width).double()
    return len(values) * math.log2(max(len(values), 1)) - torch.xlogy(counts, counts).sum(
        1
    ) / math.log(2)


def _principal(centred: torch.Tensor, rank: int = 1024) -> torch.Tensor:
    """float32 [K, C]: orthonormal directions of [N, C], the largest variance first.

    All of them up to 4096 classes, by the eigenvectors of the covariance; above that the `rank`
    leading ones by torch.svd_lowrank, which draws its start: here always the same.
    """
    classes = centred.shape[1]
    if classes <= 4 * rank:
        scatter = torch.zeros(classes, classes, dtype=torch.float64)
        for chunk in centred.split(BLOCK):
            scatter += chunk.double().T @ chunk.double()
        return torch.linalg.eigh(scatter).eigenvectors.flip(1).T.float().contiguous()
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
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
    normal = torch.eye(num_classes, dtype=torch.float64)
    total = torch.zeros(num_classes, values.shape[1], dtype=torch.float64)
    shown = ((mixture.own, mixture.lam.double()), (mixture.partner, 1 - mixture.lam.double()))
    for label, share in shown:
        total.index_add_(0, label, share[:, None] * values)
        for other, other_share in shown:
            normal.index_put_((label, other), share * other_share, accumulate=True)
    return torch.cholesky_solve(total, torch.linalg.cholesky(normal)).float()


_PARTS = {
    "step": "<f8",
    "basis_step": "<f8",
    "mean": "<f2",
    "deviation": "<f4",
    "basis": "u1",
    "class_means": "u1",
}


def join_fitted(parts: dict[str, np.ndarray]) -> np.ndarray:
    """uint8: the parts of `_PARTS` in that order, after their lengths in bytes as six uint32.

    One array, because each takes some 250 bytes more in an .npz archive.
    """
    content = [parts[name].astype(kind).tobytes() for name, kind in _PARTS.items()]
    lengths = np.array([len(part) for part in content], dtype="<u4").tobytes()
    return np.frombuffer(b"".join([lengths, *content]), dtype=np.uint8)


def split_fitted(joined: np.ndarray) -> dict[str, np.ndarray]:
    """The inverse of join_fitted."""
    lengths = joined[: 4 * len(_PARTS)].view("<u4").tolist()
    ends = 4 * len(_PARTS) + np.cumsum(lengths)
    return {
        name: joined[end - length : end].copy().view(kind)
        for (name, kind), length, end in zip(_PARTS.items(), lengths, ends.tolist(), strict=True)
    }


class Klt(Codec):
    """The label minus what its class mean predicts, in the basis where logits decorrelate.

    Karhunen-Loeve transform: the basis are the principal directions of centred logits, and one
    quantiser step for all components spends bits where they reduce squared error most, which at
    high temperature is KL. A coefficient is coded as round((coefficient - prediction) / step);
    the prediction is the lambda-weighted mean of the classes in the view, in the components where
    that pays. Payload: `pack_integers` of the codes [N, K].

    codec.npz holds one array of bytes, `fitted`, with the parts of `_PARTS` one after the other:
    step; basis_step; mean [C]; deviation [K]; basis, pack_integers of [C, K], times basis_step /
    deviation the directions; class_means, pack_integers of [classes, K], times step / 4 the
    coefficients of the class means.
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
        """A fitted codec.

        Args:
            num_classes: C.
            arrays: the content of codec.npz.
            target: what it was fitted to, bytes_per_label or distortion.
        """
        super().__init__(num_classes, **target)
        self._arrays = arrays
        parts = split_fitted(arrays["fitted"])
        self.step = parts["step"].item()
        deviation = torch.from_numpy(parts["deviation"].astype(np.float32))
        components = len(deviation)
        rows = unpack_integers(parts["basis"].tobytes(), components)
        basis = torch.from_numpy(rows.T.astype(np.float32)) * parts["basis_step"].item()
        basis = basis / deviation[:, None]
        self.basis = basis - basis.mean(1, keepdim=True)
        mean = torch.from_numpy(parts["mean"].astype(np.float32))
        self.mean = mean - mean.mean()
        whole = unpack_integers(parts["class_means"].tobytes(), components)
        self.class_means = torch.from_numpy(whole.astype(np.float32)) * (self.step / 4)
        # The rounded basis is not quite orthonormal: least squares, not the transpose, inverts it.
        rows = self.basis.double()
        gram = rows @ rows.T
        gram += 1e-9 * gram.trace() * torch.eye(components)
        self.projection = torch.linalg.solve(gram, rows).T.float().contiguous()
        self._device = torch.device("cpu")

    @classmethod
    def options_from(cls, given: dict[str, Any]) -> dict[str, Any]:
        if len(given) > 1:
            raise UserError("--distortion is not allowed with --bytes-per-label")
        return given or {"distortion": DEFAULT_DISTORTION}

    def arrays(self) -> dict[str, np.ndarray]:
        return self._arrays

    def to(self, device: torch.device) -> "Klt":
        """Moves the fitted part to a device."""
        if device != self._device:
            for name in ("basis", "mean", "class_means", "projection"):
                setattr(self, name, getattr(self, name).to(device))
            self._device = device
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
        return pack_integers(torch.cat(codes, 1).cpu().numpy())

    def unpack(self, payload: bytes) -> Codes:
        codes = torch.from_numpy(unpack_integers(payload, len(self.basis)))
        wide = (codes.abs().amax(0) > 127).nonzero() if len(codes) else codes.new_zeros(0, 1)
        split = int(wide.max()) + 1 if len(wide) else 0
        return codes[:, :split].contiguous(), codes[:, split:].to(torch.int8).contiguous()

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
        """Fits basis, class means and step to the first labels of a set.

        Of a sample of at most 20,000 labels, four fifths give the basis and the means and the
        fifth label each is held back, to find the step that meets the target on labels that were
        not fitted. Where the sample is the whole set, all of it serves both ends.

        Args:
            samples: centred logits float32 [n, C] and their mixtures, on the CPU.
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
        rows = torch.arange(len(logits))
        train, probe = rows, rows[:: -(-len(rows) // 8192)]
        if len(logits) < labels and len(logits) >= 5:
            train, probe = rows[rows % 5 != 4], rows[rows % 5 == 4]
        self.pass_labels = min(pass_labels or labels, len(probe))
        self.probe, self.probe_mixture = logits[probe], mixture.rows(probe)
        self.mean = half(logits[train].mean(0), Klt.name)
        centred = logits[train] - self.mean.float()
        self.directions = _principal(centred)
        values = centred @ self.directions.T
        self.deviation = values.square().mean(0).sqrt().clamp(min=1e-6)
        self.class_means = _class_means(values, mixture.rows(train), num_classes)
        self.values = (self.probe - self.mean.float()) @ self.directions.T

    def search(self, target: dict[str, float]) -> Klt:
        """The codec whose step meets the target, with about a percent to spare at most.

        By bisection on the logarithm of the step.
        """
        (name, wanted), *_ = target.items()
        measure = {"bytes_per_label": self.bytes_per_label, "distortion": self.distortion}[name]
        # Labels that are all the same need no components: any step will do.
        finest = max(float(self.values.abs().max()), 1e-3) * 4 / LARGEST
        low, high = math.log(finest), math.log(max(float(self.deviation.max()) * 16, 2 * finest))
        best = None
        while high - low > 0.004:
            middle = (low + high) / 2
            codec = self.codec(math.exp(middle), target)
            excess = measure(codec) / wanted - 1
            if excess <= 0:
                best = codec
            if -0.012 < excess <= 0:
                break
            # A coarser step takes fewer bytes and loses more.
            if (excess > 0) == (name == "distortion"):
                high = middle
            else:
                low = middle
        if best is None:
            raise UserError(
                f"{flag(name)} {wanted:g} cannot be met by codec klt for {self.labels} labels"
            )
        return best

    def bytes_per_label(self, codec: Klt) -> float:
        """Bytes per label of the held-back labels, the fitted part included pro rata."""
        parts = zip(
            self.probe.split(self.pass_labels),
            *(part.split(self.pass_labels) for part in self.probe_mixture),
            strict=True,
        )
        used = sum(len(codec.pack(logits, Mixture(*mixed))) for logits, *mixed in parts)
        return used / len(self.probe) + fitted_bytes(codec) / self.labels

    def distortion(self, codec: Klt) -> float:
        """Distortion of the held-back labels."""
        decoded = codec.expand(codec.encode(self.probe, self.probe_mixture), self.probe_mixture)
        return distortion(self.probe, decoded)

    def codec(self, step: float, target: dict[str, float]) -> Klt:
        """The codec of one step; components, and class means in them, only where they pay.

        Squared error is weighed against bits at the slope of a uniform quantiser at high rate,
        d(error) / d(bit) = 2 ln 2 step^2 / 12. The same slope gives the precision of the basis,
        whose bits serve all labels: with rows scaled to a label's deviation, step / sqrt(labels).
        """
        price = 2 * math.log(2) * step**2 / 12
        share = self.labels / len(self.probe)
        scaled = self.directions * self.deviation[:, None]
        basis_step = max(step / math.sqrt(self.labels), float(scaled.abs().max()) / LARGEST)
        basis = (scaled / basis_step).round()
        means = (self.class_means / (step / 4)).round().clamp(-LARGEST, LARGEST)
        predicted = _blend(means * (step / 4), self.probe_mixture)

        def cost(values: torch.Tensor) -> torch.Tensor:
            codes = (values / step).round()
            error = (values - codes * step).double().square().sum(0)
            return share * (error + price * _entropy_bits(codes))

        plain = cost(self.values)
        helped = cost(self.values - predicted) + price * _entropy_bits(means)
        means = means * (helped < plain)
        coded = torch.minimum(plain, helped) + price * _entropy_bits(basis.T)
        dropped = share * self.values.double().square().sum(0)
        kept = (coded < dropped) & basis.any(1)
        parts = {
            "step": np.array([step]),
            "basis_step": np.array([basis_step]),
            "mean": self.mean.numpy(),
            "deviation": self.deviation[kept].numpy(),
            "basis": packed(basis[kept].T),
            "class_means": packed(means[:, kept]),
        }
        return Klt(self.num_classes, {"fitted": join_fitted(parts)}, **target)


def packed(whole: torch.Tensor) -> np.ndarray:
    """uint8: pack_integers of whole numbers [N, K]."""
    return np.frombuffer(pack_integers(whole.numpy().astype(np.int16)), dtype=np.uint8)


def fitted_bytes(codec: Codec) -> int:
    """Bytes of codec.npz: its arrays and some 256 bytes of naming for each."""
    return sum(array.nbytes + 256 for array in codec.arrays().values())

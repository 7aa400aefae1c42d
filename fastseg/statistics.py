"""The sums that everything else is made of, and how they combine."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastseg.columns import absent, check_gammas, family_of
from fastseg.curves import JaccardCurve, curve_of
from fastseg.invalid_values import invalid_message
from fastseg.scores import dice_from_counts, jaccard_from_counts, reduce_scores
from fastseg_kernels.constants import (
    BASE_COLUMNS,
    family_columns,
)

if TYPE_CHECKING:
    from fastseg.dispatch import Backend


class OnDevice(NamedTuple):
    """Sums in the memory of a backend, and the stream that writes them.

    None: they were recorded into a graph, and each replay, on whatever stream, writes them anew.
    """

    sums: Any
    backend: Backend
    stream: Any


class Statistics:
    """Sums over the voxels of each sample and class.

    Adding is for *other voxels of the same samples* (slabs of a volume, chunks of a store); other
    samples are joined by `concatenate_statistics`. Statistics of different samples look alike, and
    their sum would be a different loss without an error, so ``+`` asks for names: pass
    ``samples=`` to `Loss.statistics`, or state the fact with `add_voxels`.

    Attributes
    ----------
    array
        float64 (N, C, K), read-only, of NumPy. The sums of arrays on a GPU stay there, and are
        copied (and waited for) when this, or a score, is asked for; `Loss.value` and
        `Loss.gradient` do without.
    names
        The K column names: ``voxels``, ``count`` (valid voxels), ``invalid`` (voxels whose target
        or probability is outside the allowed values), ``targets_sum``, and the columns of the
        families that were asked for (`fastseg_kernels.constants.FAMILY_COLUMNS`).
    samples
        One name per sample, or None.

    Examples
    --------
    >>> import numpy as np, fastseg as fs
    >>> logits, targets = np.zeros((1, 1, 8), np.float32), np.ones((1, 1, 8), bool)
    >>> loss = fs.SoftJaccard()
    >>> halves = [
    ...     loss.statistics(logits[..., k::2], targets[..., k::2], samples="a") for k in (0, 1)
    ... ]
    >>> float(loss.value(sum(halves))) == float(loss(logits, targets)) == 0.5
    True
    """

    __slots__ = ("_host", "_on_device", "names", "samples")

    _host: NDArray[np.float64] | None
    _on_device: OnDevice | None
    names: tuple[str, ...]
    samples: tuple[str, ...] | None

    def __init__(
        self,
        array: NDArray[np.float64],
        names: Sequence[str],
        samples: str | Sequence[str] | None = None,
    ) -> None:
        array = np.array(array, np.float64, order="C")
        families = {family for family in map(family_of, names) if family is not None}
        known = {*BASE_COLUMNS, *(n for family in families for n in family_columns(family))}
        if array.ndim != 3 or array.shape[2] != len(names):
            raise ValueError(f"array must have shape (N, C, {len(names)}), got {array.shape}")
        check_gammas(families)
        if not known.issuperset(names):
            unknown = sorted(set(names) - known)
            raise ValueError(f"names must be those of columns, got {', '.join(unknown)}")
        array.flags.writeable = False
        _put_host(self, array)
        _put_on_device(self, None)
        _put_names(self, tuple(names))
        _put_samples(self, _sample_names(samples, array.shape[0]))

    @classmethod
    def _made(cls, sums: Any, names: tuple[str, ...], backend: Backend, samples: Any) -> Statistics:
        """Wrap what a backend has just made: no copy, and no checks but of the samples' names."""
        self = object.__new__(cls)
        if type(sums) is np.ndarray:
            sums.flags.writeable = False
            _put_host(self, sums)
            _put_on_device(self, None)
        else:
            stream = None if backend.is_recording() else backend.current_stream()
            _put_host(self, None)
            _put_on_device(self, OnDevice(sums, backend, stream))
        _put_names(self, names)
        _put_samples(self, _sample_names(samples, sums.shape[0]))
        return self

    @property
    def array(self) -> NDArray[np.float64]:
        """Return the sums, float64 (N, C, K)."""
        array = self._host
        if array is None:
            assert self._on_device is not None
            sums, backend, stream = self._on_device
            array = backend.to_host(sums, stream)
            array.flags.writeable = False
            if stream is not None:
                _put_host(self, array)
        return array

    @property
    def shape(self) -> tuple[int, int]:
        """Return the number of samples and of classes."""
        held: Any = self._host if self._on_device is None else self._on_device.sums
        samples, classes = held.shape[:2]
        return int(samples), int(classes)

    def _sums_for(self, backend: Backend) -> Any:
        """Return the sums where a backend can use them as they are, else on the host.

        There it is checked what a GPU's backend checks itself, by NaN.
        """
        there = self._on_device
        if there is not None and there.backend is backend:
            return there.sums
        self._check_if_known()
        return self.array

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"Statistics are immutable; cannot set {name}")

    def __reduce__(self) -> tuple[Any, ...]:
        return Statistics, (self.array, self.names, self.samples)

    def __repr__(self) -> str:
        samples, classes = self.array.shape[:2]
        count = int(self.array[:, :, self.names.index("count")].sum())
        return f"<Statistics of {samples} samples, {classes} classes, {count} valid voxels>"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Statistics):
            return NotImplemented
        same = self.names == other.names and self.samples == other.samples
        return same and np.array_equal(self.array, other.array, equal_nan=True)

    def __hash__(self) -> int:
        # Equal arrays have equal bytes once every NaN is the same one and no zero is negative.
        plain = np.where(np.isnan(self.array), np.nan, self.array + 0.0)
        return hash((self.names, self.samples, plain.tobytes()))

    # Sums

    def __getitem__(self, name: str) -> NDArray[np.float64]:
        """Return one column, float64 (N, C).

        ``bce_sum`` is there too where its two parts are.
        """
        if name in self.names:
            return self.array[:, :, self.names.index(name)]
        if name == "bce_sum" and "bce_pos_sum" in self.names:
            return np.asarray(self["bce_pos_sum"] + self["bce_neg_sum"])
        raise absent(name, self.names)

    # Combining

    def add_voxels(self, other: Statistics) -> Statistics:
        """Add the sums of other voxels of the same samples, on the caller's word that they are."""
        if self.names != other.names:
            raise ValueError(
                f"statistics must hold the same columns, got {', '.join(self.names)} and "
                f"{', '.join(other.names)}"
            )
        if self.array.shape != other.array.shape:
            raise ValueError(
                f"statistics must be of the same samples and classes, got shapes "
                f"{self.array.shape[:2]} and {other.array.shape[:2]}"
            )
        if None not in (self.samples, other.samples) and self.samples != other.samples:
            raise ValueError(
                f"statistics must be of the same samples, got {self.samples} and {other.samples}; "
                "join other samples with fastseg.concatenate_statistics"
            )
        return Statistics(self.array + other.array, self.names, self.samples or other.samples)

    def __add__(self, other: object) -> Statistics:
        if isinstance(other, int) and other == 0:  # the start of sum(...)
            return self
        if not isinstance(other, Statistics):
            return NotImplemented
        if self.samples is None or other.samples is None:
            raise ValueError(
                "adding statistics joins voxels of the same samples, and these do not say whose "
                "they are: pass samples= when they are made, or call add_voxels; join other "
                "samples with fastseg.concatenate_statistics"
            )
        return self.add_voxels(other)

    __radd__ = __add__

    def over_batch(self) -> Statistics:
        """Add up the samples: one sample that holds all voxels of the batch."""
        return Statistics(self.array.sum(axis=0, keepdims=True), self.names)

    # Checking and scores

    def check(self) -> None:
        """Raise a ValueError if any target, probability or weight was not an allowed one."""
        fetched = self._fetched()
        invalid, count = fetched["invalid"], fetched["count"]
        if np.count_nonzero(invalid):
            raise ValueError(invalid_message(int(invalid.sum()), int(count.sum())))

    def _check_if_known(self) -> None:
        if "invalid" in self.names and "count" in self.names:
            self.check()

    def _fetched(self) -> Statistics:
        """Return statistics on the host, all of whose numbers are of one moment."""
        return self if self._on_device is None else Statistics(self.array, self.names, self.samples)

    def counts(self) -> dict[str, NDArray[np.int64]]:
        """Return the hard counts tp, fp, fn and tn, each int64 (N, C).

        Needs ``track=("hard",)``. A prediction that is NaN counts as background here; the column
        ``undefined`` says how many there are, and the scores below are NaN. Raises as `check` does.
        """
        fetched = self._fetched()
        fetched._check_if_known()
        hits, over, under = (
            fetched[f"hard_{n}"] for n in ("true_positives", "false_positives", "false_negatives")
        )
        rest = fetched["count"] - hits - over - under
        values = {"tp": hits, "fp": over, "fn": under, "tn": rest}
        return {name: value.astype(np.int64) for name, value in values.items()}

    def jaccard_index(
        self, *, reduction: str = "mean", empty: float = float("nan")
    ) -> NDArray[np.float64] | np.float64:
        """Return the hard Jaccard index tp / (tp + fp + fn), from ``track=("hard",)``.

        Parameters
        ----------
        reduction
            "none": float64 (N, C); "mean": over the rows that are not NaN; "sum".
        empty
            Score where neither prediction nor target has foreground.
        """
        fetched = self._fetched()
        scores = jaccard_from_counts(fetched.counts(), empty)
        return reduce_scores(scores, fetched["undefined"], reduction)

    def dice_score(
        self, *, reduction: str = "mean", empty: float = float("nan")
    ) -> NDArray[np.float64] | np.float64:
        """Return the hard Dice score 2 tp / (2 tp + fp + fn); options as in `jaccard_index`."""
        fetched = self._fetched()
        scores = dice_from_counts(fetched.counts(), empty)
        return reduce_scores(scores, fetched["undefined"], reduction)

    def jaccard_curve(self) -> JaccardCurve:
        """Return the hard Jaccard index and Dice score at every threshold.

        They need ``track=("curve",)``. Thresholds are 1/32 apart for logits (from -16 to 16) and
        1/1024 for probabilities; at each of them scores are exact, those that a count of all voxels
        from there on would give. With softmax they are those of one class against all others, by
        its probability. A soft target is foreground from 0.5 on (with softmax: of the largest
        class). Curves of chunks add up with the statistics. Raises as `check` does.
        """
        fetched = self._fetched()
        fetched._check_if_known()
        return curve_of(fetched)

    # Storing

    def to_json(self) -> str:
        """Return a JSON document that `from_json` reads back exactly."""
        document = {
            "names": self.names,
            "samples": self.samples,
            "array": [[[_number(v) for v in row] for row in sample] for sample in self.array],
            "shape": self.array.shape,
        }
        return json.dumps(document, allow_nan=False)

    @staticmethod
    def from_json(text: str) -> Statistics:
        """Read what `to_json` wrote."""
        document = json.loads(text)
        try:
            array = np.array(document["array"], np.float64).reshape(document["shape"])
            return Statistics(array, document["names"], document["samples"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a JSON document of Statistics: {error!r}") from error


# What sets the slots of an immutable object, without the search of object.__setattr__.
_put_host, _put_on_device, _put_names, _put_samples = (
    Statistics.__dict__[name].__set__ for name in Statistics.__slots__
)


def _sample_names(samples: str | Sequence[str] | None, count: int) -> tuple[str, ...] | None:
    """Return the names of ``count`` samples, checked."""
    if samples is None:
        return None
    named = (samples,) if isinstance(samples, str) else samples
    if len(named) != count:
        raise ValueError(f"samples must name each of the {count} samples, got {len(named)} names")
    return tuple(map(str, named))


def _number(value: float) -> float | str:
    """JSON has no NaN or infinity; float() reads their names back."""
    return float(value) if np.isfinite(value) else str(float(value))


def concatenate_statistics(statistics: Iterable[Statistics]) -> Statistics:
    """Join statistics of different samples along the sample axis.

    Raises
    ------
    ValueError
        If there are none, if they hold different columns or numbers of classes, or if two of them
        name the same sample.

    Examples
    --------
    >>> import numpy as np, fastseg as fs
    >>> loss, x, p = fs.SoftDice(), np.zeros((1, 1, 4)), np.array([[[1, 1, 0, 0]]])
    >>> first, second = (loss.statistics(x, p, samples=name) for name in ("case 1", "case 2"))
    >>> both = fs.concatenate_statistics([first, second])
    >>> both.samples, float(loss.value(both))
    (('case 1', 'case 2'), 0.5)
    """
    parts = list(statistics)
    if not parts:
        raise ValueError("concatenate_statistics needs at least one Statistics, got none")
    first = parts[0]
    for part in parts[1:]:
        if part.names != first.names or part.array.shape[1] != first.array.shape[1]:
            raise ValueError(
                f"statistics must hold the same columns and classes, got {first.names} with "
                f"{first.array.shape[1]} and {part.names} with {part.array.shape[1]} classes"
            )
    samples: tuple[str, ...] | None = None
    if all(part.samples is not None for part in parts):
        samples = tuple(name for part in parts for name in part.samples or ())
        repeated = sorted({name for name in samples if samples.count(name) > 1})
        if repeated:
            raise ValueError(
                f"samples {', '.join(repeated)} come twice; voxels of one sample are added with +"
            )
    return Statistics(np.concatenate([part.array for part in parts]), first.names, samples)

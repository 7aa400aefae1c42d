"""Losses: sums of terms, and the three verbs that evaluate them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastseg.dispatch import Backend, backend_of
from fastseg.libraries import Library
from fastseg.options import DEFAULTS, Options
from fastseg.problems import check_out, make_problem, raise_for_invalid
from fastseg.statistics import Statistics
from fastseg_kernels.constants import BASE_COLUMNS, FAMILY_COLUMNS, REDUCTIONS, columns
from fastseg_kernels.problem import Evaluation, Problem

if TYPE_CHECKING:
    from fastseg.terms import Term

_INVALID = BASE_COLUMNS.index("invalid")
_COUNT = BASE_COLUMNS.index("count")
_FIELDS = ("_parts", "_options")  # of WeightedSum; what else is private is remembered results


class Loss:
    """A loss: one term, or a weighted sum of terms. Immutable.

    Three verbs, each of which reads the volume at most once:

    ``statistics(logits, targets) -> s``
        the sums of every sample and class; statistics of chunks add up,
    ``value(s) -> L``
        reads nothing but ``s``,
    ``gradient(logits, targets, s) -> dL/dlogits``
        one read and one write.

    Calling the loss is the first two, `value_and_grad` and `evaluate` are all three.

    Arrays are NumPy arrays or CPU tensors of PyTorch; answers are of the same library. Logits are
    (N, C, *spatial), or as ``layout`` says, of dtype float32, float64, float16 or bfloat16.
    Targets have the same shape (the class axis may be absent for one class) and any boolean,
    integer or floating dtype. ``mask`` (boolean or integer, 0 leaves a voxel out) and
    ``weight_map`` have the shape of the logits, or lack the class axis. A voxel that is left out
    contributes nothing, whatever is stored there, and its gradient is 0.

    Raises
    ------
    TypeError
        For arrays of a wrong kind, dtype, library or device.
    ValueError
        For wrong shapes and options, and for targets outside the allowed values.

    Examples
    --------
    >>> import numpy as np, fastseg as fs
    >>> loss = fs.BCE() + 2.0 * fs.SoftJaccard()
    >>> loss
    BCE() + 2.0 * SoftJaccard()
    >>> logits = np.array([[[1.0, -2.0, 0.5]]], np.float32)
    >>> targets = np.array([[[1, 0, 0]]], np.uint8)
    >>> value, grad = loss.value_and_grad(logits, targets)
    >>> round(float(value), 4), grad.shape
    (1.6319, (1, 1, 3))
    """

    @property
    def parts(self) -> tuple[tuple[float, Term], ...]:
        """Return the terms with their weights."""
        raise NotImplementedError  # Term and WeightedSum say

    @property
    def options(self) -> Options:
        """Return the options of the whole loss."""
        return DEFAULTS

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value
            for name, value in self.__dict__.items()
            if name[:1] != "_" or name in _FIELDS
        }

    # Composition

    def replace(self, **options: Any) -> Loss:
        """Return the same terms with other options; see `fastseg.Options` for their names."""
        try:
            changed = replace(self.options, **options)
        except TypeError:
            known = ", ".join(Options.__dataclass_fields__)
            wrong = ", ".join(sorted(set(options) - set(Options.__dataclass_fields__)))
            raise TypeError(f"replace takes the options {known}; got {wrong}") from None
        return WeightedSum(self.parts, changed)

    def __add__(self, other: object) -> Loss:
        if not isinstance(other, Loss):
            return NotImplemented
        mine, theirs = self.options, other.options
        if mine != theirs and DEFAULTS not in (mine, theirs):
            raise ValueError(
                f"losses that are added must have the same options, got {mine.given()} and "
                f"{theirs.given()}"
            )
        return WeightedSum(self.parts + other.parts, theirs if mine == DEFAULTS else mine)

    def __mul__(self, factor: object) -> Loss:
        if isinstance(factor, bool) or not isinstance(factor, int | float | np.number):
            return NotImplemented
        number = float(factor)
        if not math.isfinite(number):
            raise ValueError(f"a loss must be multiplied by a finite number, got {factor!r}")
        return WeightedSum(tuple((number * w, term) for w, term in self.parts), self.options)

    __rmul__ = __mul__

    def families(self, track: Sequence[str] = ()) -> frozenset[str]:
        """Return the families of sums that the terms, and ``track``, need."""
        track = track if isinstance(track, str) else tuple(track)
        known = self.__dict__.setdefault("_families", {})
        if track in known:
            return known[track]  # type: ignore[no-any-return]
        wanted = set().union(*(term.needs() for _, term in self.parts))
        if isinstance(track, str) or not set(track) <= set(FAMILY_COLUMNS):
            raise ValueError(f"track must be a tuple of {', '.join(FAMILY_COLUMNS)}, got {track!r}")
        wanted.update(track)
        if "bce_split" in wanted:
            wanted.discard("bce")  # the two parts add up to it
        return known.setdefault(track, frozenset(wanted))  # type: ignore[no-any-return]

    # The three verbs

    def statistics(
        self,
        logits: Any,
        targets: Any,
        *,
        mask: Any = None,
        weight_map: Any = None,
        track: Sequence[str] = (),
        samples: str | Sequence[str] | None = None,
    ) -> Statistics:
        """Read the volume once and return its sums.

        Parameters
        ----------
        logits, targets, mask, weight_map
            See `Loss`.
        track
            Families to add to those that the terms need: ``("hard",)`` for the hard Jaccard index.
        samples
            Names of the samples; ``+`` joins statistics of equal names only.
        """
        library, problem = self._problem(logits, targets, mask, weight_map)
        return self._statistics(self._backend(library, logits), problem, track, samples)

    def value(self, s: Statistics) -> np.float64 | NDArray[np.float64]:
        """Return the loss of the voxels that ``s`` sums up: float64, (N, C) for reduction "none".

        ``s`` must hold at least the families that the terms need.
        """
        return self._reduced(self._evaluate(s, 1.0).value)

    def gradient(
        self,
        logits: Any,
        targets: Any,
        s: Statistics,
        *,
        mask: Any = None,
        weight_map: Any = None,
        rows: slice | None = None,
        out: Any = None,
        grad_scale: Any = 1.0,
    ) -> Any:
        """Return dL/dlogits, where L is the loss of everything that ``s`` sums up.

        Parameters
        ----------
        logits, targets, mask, weight_map
            The volume, or a part of it: ``s`` may sum up more than these voxels.
        s
            Statistics of all voxels of the loss.
        rows
            Which samples of ``s`` these are; all by default.
        out
            Where to write the gradient (it may be ``logits``); a new array by default. Its dtype
            is that of the gradient.
        grad_scale
            Multiplied into the gradient before it is rounded to its dtype: the scale of mixed
            precision, or the gradient that comes from above. (N, C) for reduction "none".
        """
        library, problem = self._problem(logits, targets, mask, weight_map)
        samples, classes = problem.shape[:2]
        total, known = s.array.shape[:2]
        chosen = range(total)[slice(None) if rows is None else rows]
        if len(chosen) != samples or known != classes:
            raise ValueError(
                f"s must have the statistics of these {samples} samples and {classes} classes, got "
                f"{len(chosen)} and {known}"
                + ("" if rows is not None else "; rows= says which samples of a larger s they are")
            )
        coefficients = self._evaluate(s, grad_scale).coefficients[chosen.start : chosen.stop]
        if rows is not None and chosen.step != 1:
            raise ValueError(f"rows must be a slice of step 1, got {rows}")
        grad = library.empty_like(logits) if out is None else out
        view = check_out(grad, library, problem, self.options.layout)
        self._backend(library, logits).gradient(problem, coefficients, view)
        if out is not None:
            library.written(out)
        return grad

    # Together

    def __call__(
        self, logits: Any, targets: Any, *, mask: Any = None, weight_map: Any = None
    ) -> Any:
        """Return the value, as a scalar of the caller's library ((N, C) for reduction "none").

        float32 for float16, bfloat16 and float32 logits, float64 for float64.
        """
        library, problem = self._problem(logits, targets, mask, weight_map)
        s = self._statistics(self._backend(library, logits), problem, (), None)
        return self._answer(library, problem, self._evaluate(s, 1.0).value, logits)

    def value_and_grad(
        self,
        logits: Any,
        targets: Any,
        *,
        mask: Any = None,
        weight_map: Any = None,
        out: Any = None,
        grad_scale: Any = 1.0,
    ) -> tuple[Any, Any]:
        """Return the value and its gradient with respect to the logits; options as the verbs'."""
        value, grad, _ = self.evaluate(
            logits, targets, mask=mask, weight_map=weight_map, out=out, grad_scale=grad_scale
        )
        return value, grad

    def evaluate(
        self,
        logits: Any,
        targets: Any,
        *,
        mask: Any = None,
        weight_map: Any = None,
        track: Sequence[str] = (),
        samples: str | Sequence[str] | None = None,
        out: Any = None,
        grad_scale: Any = 1.0,
    ) -> tuple[Any, Any, Statistics]:
        """Return the value, its gradient and the statistics; options as the verbs'.

        With ``track=("hard",)`` a training step has its hard Jaccard index for nothing:
        ``s.jaccard_index()``.
        """
        library, problem = self._problem(logits, targets, mask, weight_map)
        grad = library.empty_like(logits) if out is None else out
        view = check_out(grad, library, problem, self.options.layout)  # before anything is computed
        backend = self._backend(library, logits)
        s = self._statistics(backend, problem, track, samples)
        result = self._evaluate(s, grad_scale)
        backend.gradient(problem, result.coefficients, view)
        if out is not None:
            library.written(out)
        return self._answer(library, problem, result.value, logits), grad, s

    def term_values(self, s: Statistics) -> tuple[np.float64 | NDArray[np.float64], ...]:
        """Return the value of each term, before its weight; no voxel is read."""
        return tuple(self._reduced(value) for value in self._evaluate(s, 1.0).terms)

    # Steps

    def _problem(
        self, logits: Any, targets: Any, mask: Any, weight_map: Any
    ) -> tuple[Library, Problem]:
        options = self.options
        activation = "probs" if options.activation is None else "sigmoid"
        threshold = 0.5 if options.activation is None else 0.0
        return make_problem(logits, targets, mask, weight_map, options, activation, threshold)

    @staticmethod
    def _backend(library: Library, logits: Any) -> Backend:
        return backend_of(library.device(logits))

    def _statistics(
        self,
        backend: Backend,
        problem: Problem,
        track: Sequence[str],
        samples: str | Sequence[str] | None,
    ) -> Statistics:
        families = self.families(track)
        sums = backend.statistics(problem, families)
        invalid = sums[:, :, _INVALID].sum()
        if invalid:
            raise_for_invalid(problem, int(invalid), int(sums[:, :, _COUNT].sum()))
        return Statistics._made(sums, columns(families), samples)

    def _evaluate(self, s: Statistics, grad_scale: Any) -> Evaluation:
        s.require(self.families())
        samples, classes = s.array.shape[:2]
        reduction = REDUCTIONS.index(self.options.reduction)
        shape = np.shape(grad_scale)
        if shape and (self.options.reduction != "none" or shape != (samples, classes)):
            wanted = f"(N, C) = {(samples, classes)}" if self.options.reduction == "none" else "()"
            raise ValueError(f"grad_scale must have shape {wanted}, got {shape}")
        table, weights = self._table(classes)
        scales = np.empty((samples, classes))
        scales[...] = grad_scale
        return backend_of("cpu").evaluate(
            table, weights, s.array, s.columns_of_terms(), reduction, scales
        )

    def _table(self, classes: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        from fastseg.terms import table_of

        cached = self.__dict__.get("_tables")
        if cached is None or cached[0] != classes:
            if self.options.reduction == "none" and any(
                getattr(term, "scope", "sample") == "batch" for _, term in self.parts
            ):
                raise ValueError(
                    'reduction="none" keeps the samples apart, scope="batch" joins them; choose one'
                )
            cached = (classes, table_of(self.parts, classes))
            self.__dict__["_tables"] = cached
        return cached[1]

    def _reduced(self, value: NDArray[np.float64]) -> np.float64 | NDArray[np.float64]:
        return value if self.options.reduction == "none" else np.float64(value[0, 0])

    def _answer(
        self, library: Library, problem: Problem, value: NDArray[np.float64], like: Any
    ) -> Any:
        dtype = "float64" if problem.logits.dtype == "float64" else "float32"
        return library.array(np.asarray(self._reduced(value)), dtype, like)


@dataclass(frozen=True, repr=False)
class WeightedSum(Loss):
    """A weighted sum of terms with options: what ``+``, ``*`` and `Loss.replace` return."""

    _parts: tuple[tuple[float, Term], ...]
    _options: Options = DEFAULTS

    @property
    def parts(self) -> tuple[tuple[float, Term], ...]:
        """Return the terms with their weights."""
        return self._parts

    @property
    def options(self) -> Options:
        """Return the options of the whole loss."""
        return self._options

    def __repr__(self) -> str:
        terms = " + ".join(
            repr(term) if weight == 1.0 else f"{weight!r} * {term!r}" for weight, term in self.parts
        )
        given = self.options.given()
        if not given:
            return terms
        options = ", ".join(f"{name}={value!r}" for name, value in given.items())
        formula = f"({terms})" if len(self.parts) > 1 or self.parts[0][0] != 1.0 else terms
        return f"{formula}.replace({options})"

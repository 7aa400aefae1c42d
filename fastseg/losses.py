"""Losses: sums of terms, and the three verbs that evaluate them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from fastseg.dispatch import Backend, backend_of
from fastseg.formula import Formula, implied_activation
from fastseg.invalid_values import raise_for_sums
from fastseg.libraries import library_of
from fastseg.libraries.base import Library
from fastseg.options import DEFAULTS, Options
from fastseg.outputs import check_out, place_of
from fastseg.problems import make_problem, stand_in
from fastseg.small_calls import Known, SmallCalls
from fastseg.statistics import Statistics
from fastseg_kernels.constants import BASE_COLUMNS, columns
from fastseg_kernels.problem import Evaluation, Problem
from fastseg_kernels.views import View

if TYPE_CHECKING:
    from fastseg.terms import Term

_INVALID = BASE_COLUMNS.index("invalid")


class Loss(Formula):
    """A loss: one term, or a weighted sum of terms. Immutable.

    Three verbs, each of which reads the volume at most once:

    ``statistics(logits, targets) -> s``
        the sums of every sample and class; statistics of chunks add up,
    ``value(s) -> L``
        reads nothing but ``s``,
    ``gradient(logits, targets, s) -> dL/dlogits``
        one read and one write.

    Calling the loss is the first two, `value_and_grad` and `evaluate` are all three.

    Arrays are of NumPy, CuPy or PyTorch, or have ``__cuda_array_interface__`` (answers are CuPy's
    then); answers are of the same library and on the same device. Logits are
    ``(N, C, *spatial)``, or as ``layout`` says, of dtype float32, float64, float16 or bfloat16.
    Targets have the same shape (the class axis may be absent for one class) and any boolean,
    integer or floating dtype. ``mask`` (boolean or integer, 0 leaves a voxel out) and
    ``weight_map`` (at least 0) have the shape of the logits, or lack the class axis. A voxel that
    is left out contributes nothing, whatever is stored there, and its gradient is 0. One of weight
    0 has no part in the loss either, but counts where voxels are counted.

    Raises
    ------
    TypeError
        For arrays of a wrong kind, dtype, library or device.
    ValueError
        For wrong shapes and options, and for targets outside the allowed values. On a GPU, where
        nothing waits for the voxels to be read, such targets make the value and the gradient NaN,
        and `Statistics.check` raises.

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

    # The three verbs, and all of them together

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
        self._require_sums("statistics")
        families = self.families(track)
        library, problem = self._problem(logits, targets, mask, weight_map, families)
        backend = backend_of(library, logits)
        sums = self._sums(backend, problem, families)
        library.used(problem.owners)
        return Statistics._made(sums, columns(families), backend, samples)

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

        Targets are not checked again: that `statistics` did.

        Parameters
        ----------
        logits, targets, mask, weight_map
            The volume, or a part of it: ``s`` may sum up more than these voxels.
        s
            Statistics of all voxels of the loss.
        rows
            Which samples of ``s`` these are; all by default.
        out
            Where to write the gradient (it may be ``logits``); a new array like ``logits`` by
            default. Any floating dtype, which the gradient is rounded to; float32 or float64 for
            float64 logits.
        grad_scale
            Multiplied into the gradient before it is rounded to its dtype: the scale of mixed
            precision, or the gradient that comes from above. (N, C) for reduction "none".
        """
        self._require_sums("gradient")
        library, problem = self._problem(logits, targets, mask, weight_map, self.families())
        samples, classes = problem.shape[:2]
        total, known = s.shape
        chosen = range(total)[slice(None) if rows is None else rows]
        if len(chosen) != samples or known != classes:
            raise ValueError(
                f"s must have the statistics of these {samples} samples and {classes} classes, got "
                f"{len(chosen)} and {known}"
                + ("" if rows is not None else "; rows= says which samples of a larger s they are")
            )
        if rows is not None and chosen.step != 1:
            raise ValueError(f"rows must be a slice of step 1, got {rows}")
        grad = library.empty_like(logits) if out is None else out
        view = check_out(grad, logits, library, problem, self.options.layout)
        backend = backend_of(library, logits)
        result = self._evaluate(backend, s._sums_for(backend), s.names, grad_scale)
        coefficients = result.coefficients[chosen.start : chosen.stop]
        backend.gradient(problem, coefficients, view, self.families())
        library.used(problem.owners)
        if out is not None:
            library_of(out, "out").written((out,))
        return grad

    def __call__(
        self, logits: Any, targets: Any, *, mask: Any = None, weight_map: Any = None
    ) -> Any:
        """Return the value, as a scalar of the caller's library ((N, C) for reduction "none").

        float32 for float16, bfloat16 and float32 logits, float64 for float64 (see
        ``compute_dtype`` in `fastseg.Options`).
        """
        families = self.families()
        library, problem = self._problem(logits, targets, mask, weight_map, families)
        backend = backend_of(library, logits)
        sums = self._sums(backend, problem, families)
        dtype = problem.arrangement.real
        result = self._evaluate(backend, sums, columns(families), 1.0, dtype)
        value = self._with_sorted(backend, problem, sums, result, False)[0].value
        library.used(problem.owners)
        return library.array(self._reduced(value), dtype, logits)

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
        """Return the value and its gradient with respect to the logits; options as the verbs'.

        After an error about invalid targets, which are found on the way, ``out`` is as it was, or
        NaN throughout.
        """
        value, grad, _ = self._run(logits, targets, mask, weight_map, (), out, grad_scale)
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

        Where targets are invalid ``out`` is left as `value_and_grad` leaves it.

        With ``track=("hard",)`` a training step has its hard Jaccard index without another pass:
        ``s.jaccard_index()``, which on a GPU waits for this one.
        """
        value, grad, made = self._run(logits, targets, mask, weight_map, track, out, grad_scale)
        return value, grad, Statistics._made(*made, samples)

    # Steps

    def _run(
        self,
        logits: Any,
        targets: Any,
        mask: Any,
        weight_map: Any,
        track: Sequence[str],
        out: Any,
        grad_scale: Any,
    ) -> tuple[Any, Any, tuple[Any, tuple[str, ...], Backend]]:
        """Run the three verbs on one problem; return value, gradient, and sums with their names."""
        calls = self.__dict__.get("_small_calls")
        if calls is None:
            calls = self.__dict__.setdefault("_small_calls", SmallCalls())
        usual = mask is weight_map is None and not track and type(grad_scale) is float
        again = calls.repeat(logits, targets, out, grad_scale) if usual else None
        if again is not None:
            was, sums, value, grad = again
            answer = was.library.array(self._reduced(value), was.dtype, logits)
            return answer, grad, (sums, was.names, was.backend)
        families = self.families(track)
        own = self.families() if track else families
        library, problem = self._problem(logits, targets, mask, weight_map, families)
        grad = library.empty_like(logits) if out is None else out
        # Everything is checked before anything is computed.
        view = check_out(grad, logits, library, problem, self.options.layout)
        backend, dtype = backend_of(library, logits), problem.arrangement.real
        names, small = columns(families), None
        if type(grad_scale) is float:
            make_table = partial(self._prepare, backend, names, problem.shape[1])
            small = calls.find(backend, problem, view, families, own, make_table)
        if small is not None:
            sums, value = small(problem.addresses, view.address, grad_scale)
            if value is None:
                raise_for_sums(problem, sums, families, view if small.kept else None)
            if usual and type(logits) is np.ndarray:
                place = None if out is None else place_of(problem.arrangement, view.layout, "NC")
                call = Known(small, place, library, dtype, names, backend)
                calls.remember(logits, targets, out, call)
        else:
            sums, value = self._one_by_one(backend, problem, view, families, own, grad_scale)
        library.used(problem.owners)
        if out is not None and type(out) is not np.ndarray:
            library_of(out, "out").written((out,))
        return library.array(self._reduced(value), dtype, logits), grad, (sums, names, backend)

    def _one_by_one(
        self,
        backend: Backend,
        problem: Problem,
        out: View,
        families: frozenset[str],
        own: frozenset[str],
        grad_scale: Any,
    ) -> tuple[Any, Any]:
        """Take the steps one after the other; return the sums and the value."""
        kept = backend.keeps(problem, own, out)
        sums = self._sums(backend, problem, families, out if kept else None)
        dtype = problem.arrangement.real
        result = self._evaluate(backend, sums, columns(families), grad_scale, dtype)
        result, slopes = self._with_sorted(backend, problem, sums, result, True)
        backend.gradient(problem, result.coefficients, out, own, slopes, kept)
        return sums, result.value

    def _with_sorted(
        self, backend: Backend, problem: Problem, sums: Any, result: Evaluation, with_slopes: bool
    ) -> tuple[Evaluation, Any]:
        """Return an evaluation with the value of the term that sorts, and its slopes."""
        if not self._sorting:
            return result, None
        batch = self._sorting[0].scope == "batch"
        return backend.sorted_slopes(problem, sums, result, batch, with_slopes)

    def _check_arrays(self, *arrays: Any) -> None:
        """Raise for the shapes and dtypes of logits, targets, mask and weight map.

        Of arrays that are not there yet, as those that a compiler traces.
        """
        logits, targets, mask, weight_map = map(stand_in, arrays)
        self._problem(logits, targets, mask, weight_map, self.families())

    def _problem(
        self, logits: Any, targets: Any, mask: Any, weight_map: Any, families: frozenset[str]
    ) -> tuple[Library, Problem]:
        activation = self.activation
        threshold = 0.5 if activation == "probs" else 0.0
        if weight_map is not None:
            self._check_weights(families)
        return make_problem(logits, targets, mask, weight_map, self.options, activation, threshold)

    def _sums(
        self,
        backend: Backend,
        problem: Problem,
        families: frozenset[str],
        keep: View | None = None,
    ) -> Any:
        """Read the volume; what is on the host is checked at once, elsewhere the value is NaN."""
        sums = backend.statistics(problem, families, keep)
        if type(sums) is np.ndarray and np.count_nonzero(sums[:, :, _INVALID]):
            raise_for_sums(problem, sums, families, keep)
        return sums


def checked_loss(loss: Any) -> Loss:
    """Return ``loss``, the argument of that name, if it is one."""
    if not isinstance(loss, Loss):
        raise TypeError(f"loss must be a fastseg loss, got {type(loss).__name__}")
    return loss


@dataclass(frozen=True, repr=False)
class WeightedSum(Loss):
    """A weighted sum of terms with options: what ``+``, ``*`` and `Loss.replace` return."""

    _parts: tuple[tuple[float, Term], ...]
    _options: Options = DEFAULTS

    def __post_init__(self) -> None:
        """Check that one activation serves all terms."""
        implied_activation(self._parts, self._options)

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

"""Losses: sums of terms, and the three verbs that evaluate them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastseg.dispatch import Backend, SmallCall, backend_of, cpu
from fastseg.libraries import Library, device_number, library_of
from fastseg.options import DEFAULTS, Options
from fastseg.problems import check_out, make_problem, raise_for_invalid, stand_in
from fastseg.statistics import Statistics, picks, require
from fastseg_kernels.constants import (
    BASE_COLUMNS,
    CURVES,
    FAMILY_COLUMNS,
    FOCAL,
    HISTOGRAMS,
    REDUCTIONS,
    columns,
    histograms,
)
from fastseg_kernels.problem import Evaluation, Problem
from fastseg_kernels.views import View

if TYPE_CHECKING:
    from fastseg.lovasz import LovaszTerm
    from fastseg.terms import Term

_OF_CLASSES, _OF_LABELS = frozenset({"ce", "ce_uniform"}), frozenset({"bce", "bce_split"})
NOT_SUMMED = {
    "sigmoid": _OF_CLASSES,
    "probs": _OF_CLASSES | {"bce_flipped"},
    "softmax": _OF_LABELS | {"bce_flipped"},
}
"""Families of sums that no kernel of an activation adds up."""
_INVALID = BASE_COLUMNS.index("invalid")
_COUNT = BASE_COLUMNS.index("count")
MOST_SMALL_CALLS = 64
"""Arrangements of small volumes that a loss remembers; each has a few kilobytes."""
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

    @property
    def parts(self) -> tuple[tuple[float, Term], ...]:
        """Return the terms with their weights."""
        raise NotImplementedError  # Term and WeightedSum say

    @property
    def options(self) -> Options:
        """Return the options of the whole loss."""
        return DEFAULTS

    @property
    def activation(self) -> str:
        """Return how logits become probabilities: "sigmoid", "softmax", or "probs": they are."""
        known = self.__dict__.get("_activation")
        if known is None:
            known = self.__dict__["_activation"] = implied_activation(self.parts, self.options)
        return known

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
        known = self.__dict__.setdefault("_families", {})
        if not isinstance(track, tuple | str):
            track = tuple(track)
        if track in known:
            return known[track]  # type: ignore[no-any-return]
        wanted = set().union(*(term.needs() for _, term in self.parts))
        summed = (name for name, members in FAMILY_COLUMNS.items() if members)
        allowed = (*(name for name in summed if name not in FOCAL), "curve")
        if isinstance(track, str) or not {*track} <= {*allowed, *HISTOGRAMS} - {*CURVES}:
            raise ValueError(f"track must be a tuple of {', '.join(allowed)}, got {track!r}")
        strange = {*track} & NOT_SUMMED[self.activation]
        if strange:
            raise ValueError(
                f"track names sums that there are not with {self.activation}, "
                f"{', '.join(sorted(strange))}"
            )
        wanted.update(track)
        if "curve" in wanted:
            wanted.remove("curve")
            wanted.add("logit_curve" if self.activation == "sigmoid" else "prob_curve")
        errors = {*histograms(frozenset(wanted))} - {*CURVES}
        if errors:
            wanted.add("labels")
        if "sorted" in wanted and (errors or len(self._sorting) > 1):
            raise ValueError("a loss has one Lovasz term that sorts, and then none with bins")
        measure = {"sigmoid": "hinge", "softmax": "errors"}.get(self.activation)
        if len(errors) > 1 or any(HISTOGRAMS[family].measure != measure for family in errors):
            raise ValueError(
                "the Lovasz terms of a loss must have the same bins, and errors of its activation, "
                f"{self.activation}; got {', '.join(sorted(errors))}"
            )
        focal = {family for family in wanted if family.rpartition("_")[0] in FOCAL}
        if len(focal) > 1:
            listed = ", ".join(sorted(focal))
            raise ValueError(f"the focal terms of a loss must have the same gamma, got {listed}")
        if "bce_flipped" in wanted:
            wanted.add("bce_split")
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
        self._require_sums("statistics")
        families = self.families(track)
        library, problem = self._problem(logits, targets, mask, weight_map, families)
        backend = backend_of(library, logits)
        sums = self._sums(backend, problem, families)
        library.used(problem.owners)
        return Statistics._made(sums, columns(families), backend, samples)

    def value(self, s: Statistics) -> Any:
        """Return the loss of the voxels that ``s`` sums up: float64, (N, C) for reduction "none".

        ``s`` must hold at least the families that the terms need. The answer is NumPy's; for
        statistics that a GPU made it is an array of their library, on their device. Statistics that
        were added up, joined or unpickled are on the host, wherever they come from.
        """
        self._require_sums("value")
        return self._value_of(s, "float64")

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

    # Together

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

    def term_values(self, s: Statistics) -> tuple[Any, ...]:
        """Return the value of each term, before its weight, as `value` does; no voxel is read."""
        self._require_sums("term_values")
        backend, sums = self._place_of(s)
        terms = self._evaluate(backend, sums, s.names, 1.0, by_term=True).terms
        return tuple(self._reduced(terms[k]) for k in range(len(self.parts)))

    def bounds(self, s: Statistics) -> tuple[Any, Any]:
        """Return two numbers between which the loss lies, were no Lovász term counted in bins.

        For losses without such terms both are the value. A Lovász term is never below what its bins
        give, and above it by no more than their voxels' errors can move within them. (The rounding
        of the errors themselves, 6e-8 of each in float32, is not counted.) On the host; (N, C) each
        for reduction "none".
        """
        from fastseg.bounds import excess
        from fastseg.lovasz import LovaszTerm

        self._require_sums("bounds")
        value = np.asarray(self._value_of(s._fetched(), "float64"))
        low, high = value, value
        for weight, term in self.parts:
            if isinstance(term, LovaszTerm) and term.histogram is not None and weight != 0:
                above = weight * excess(term, s._fetched(), self.options.reduction)
                low, high = low + np.minimum(above, 0), high + np.maximum(above, 0)
        return low[()], high[()]

    # Steps

    @property
    def _sorting(self) -> tuple[LovaszTerm, ...]:
        """Return the terms that sort."""
        known = self.__dict__.get("_that_sort")
        if known is None:
            terms = (term for _, term in self.parts if getattr(term, "histogram", "") is None)
            known = self.__dict__["_that_sort"] = tuple(terms)
        return known

    def _require_sums(self, verb: str) -> None:
        """Raise a TypeError for a loss that is no function of sums."""
        if self._sorting:
            name = type(self._sorting[0]).__name__
            raise TypeError(
                f"{verb} needs a loss that is a function of sums, and {name}() sorts its voxels: "
                f"give it bins=4096, or call value_and_grad"
            )

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
        families = self.families(track)
        own = self.families() if track else families
        library, problem = self._problem(logits, targets, mask, weight_map, families)
        grad = library.empty_like(logits) if out is None else out
        view = check_out(
            grad, logits, library, problem, self.options.layout
        )  # before anything is computed
        backend, dtype = backend_of(library, logits), problem.arrangement.real
        small = None
        if type(grad_scale) is float:
            small = self._small_call(backend, problem, families, own, view)
        if small is not None:
            sums, value = small(problem, view, grad_scale)
            if value is None:
                self._raise_for_invalid(problem, sums, families, view if small.kept else None)
        else:
            kept = backend.keeps(problem, own, view)
            sums = self._sums(backend, problem, families, view if kept else None)
            result = self._evaluate(backend, sums, columns(families), grad_scale, dtype)
            result, slopes = self._with_sorted(backend, problem, sums, result, True)
            backend.gradient(problem, result.coefficients, view, own, slopes, kept)
            value = result.value
        library.used(problem.owners)
        if out is not None and type(out) is not np.ndarray:
            library_of(out, "out").written((out,))
        answer = library.array(self._reduced(value), dtype, logits)
        return answer, grad, (sums, columns(families), backend)

    def _small_call(
        self,
        backend: Backend,
        problem: Problem,
        families: frozenset[str],
        own: frozenset[str],
        out: View,
    ) -> SmallCall | None:
        """Return what does all steps of this call at once, if there is something that does."""
        known = self.__dict__.setdefault("_small_calls", {})
        key = backend, problem.arrangement, out.layout, families
        try:
            small: SmallCall | None = known[key]
        except KeyError:
            if len(known) >= MOST_SMALL_CALLS:
                known.clear()
            table = self._prepare(backend, columns(families), problem.shape[1])
            small = known[key] = backend.small_call(problem, out, table, families, own)
        same = small is not None and small.kept and out.address == problem.addresses[0]
        return None if same else small

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
        if weight_map is not None and "labels" in families:
            names = (type(term).__name__ for _, term in self.parts if hasattr(term, "histogram"))
            listed = ", ".join(dict.fromkeys(names)) or "counts of Lovasz errors"
            raise ValueError(
                f"weight_map has no meaning for {listed}, which are of a set of voxels; use mask="
            )
        if weight_map is not None and activation == "softmax" and "prob_curve" in families:
            raise ValueError("with softmax a curve cannot be counted with a weight_map")
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
            self._raise_for_invalid(problem, sums, families, keep)
        return sums

    @staticmethod
    def _raise_for_invalid(
        problem: Problem, sums: NDArray[np.float64], families: frozenset[str], keep: View | None
    ) -> None:
        """Raise for what sums on the host count as invalid; ``keep``: where something was kept."""
        if keep is not None:  # what was kept is no gradient, and must not be taken for one
            owner: Any = keep.owner
            owner[...] = np.nan
        rows = sums[:, :1] if problem.arrangement.indexed else sums
        invalid, total = rows[:, :, (_INVALID, _COUNT)].sum(axis=(0, 1)).astype(int)
        raise_for_invalid(problem, invalid, total, labels="labels" in families)

    def _value_of(self, s: Statistics, dtype: str) -> Any:
        """Return the value where statistics are; ``dtype`` is for those on a GPU alone."""
        backend, sums = self._place_of(s)
        return self._reduced(self._evaluate(backend, sums, s.names, 1.0, dtype).value)

    @staticmethod
    def _place_of(s: Statistics) -> tuple[Backend, Any]:
        """Return where statistics are, and the sums there."""
        backend = cpu() if s._on_device is None else s._on_device.backend
        return backend, s._sums_for(backend)

    def _evaluate(
        self,
        backend: Backend,
        sums: Any,
        names: tuple[str, ...],
        grad_scale: Any,
        dtype: str = "float64",
        by_term: bool = False,
    ) -> Evaluation:
        samples, classes = sums.shape[:2]
        table, scale = self._prepare(backend, names, classes), grad_scale
        if type(scale) is not float:
            scale = self._scale(backend, grad_scale, (samples, classes))
        result = backend.evaluate(table, sums, scale, dtype, by_term)
        if type(scale) is View:
            library_of(scale.owner, "grad_scale").used((scale.owner,))
        return result

    def _prepare(self, backend: Backend, names: tuple[str, ...], classes: int) -> Any:
        """Return the table of terms for sums of these columns, made once."""
        prepared = self.__dict__.setdefault("_prepared", {})
        table = prepared.get((names, classes, backend))
        if table is None:
            require(names, self.families())
            reduction = REDUCTIONS.index(self.options.reduction)
            table = backend.prepare(*self._table(classes, names), picks(names), reduction)
            prepared[names, classes, backend] = table
        return table

    def _scale(
        self, backend: Backend, grad_scale: Any, rows: tuple[int, int]
    ) -> float | NDArray[np.float64] | View:
        """Return the factor of all gradients, or float64 (N, C), or a view of the device."""
        wanted = rows if self.options.reduction == "none" else ()

        def check(shape: tuple[int, ...]) -> None:
            if shape not in ((), wanted):
                named = f"(N, C) = {wanted}" if wanted else "()"
                raise ValueError(f"grad_scale must have shape {named}, got {shape}")

        view = device_number(backend, grad_scale, "grad_scale")
        if view is not None:
            check(view.shape)
            return view
        if hasattr(grad_scale, "detach"):  # a tensor, bfloat16 included
            grad_scale = grad_scale.detach().double()
        scale = np.asarray(grad_scale)
        if scale.dtype.kind not in "fiu":
            raise TypeError(f"grad_scale must be a number or an array of them, got {grad_scale!r}")
        check(scale.shape)
        return float(scale) if scale.ndim == 0 else np.array(scale, np.float64, order="C")

    def _table(
        self, classes: int, names: tuple[str, ...]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        from fastseg.terms import table_of

        if self.options.reduction == "none" and any(
            getattr(term, "scope", "sample") == "batch" for _, term in self.parts
        ):
            raise ValueError(
                'reduction="none" keeps the samples apart, scope="batch" joins them; choose one'
            )
        return table_of(self.parts, classes, names)

    def _reduced(self, value: Any) -> Any:
        return value if value.ndim == 0 or self.options.reduction == "none" else value[0, 0]


def checked_loss(loss: Any) -> Loss:
    """Return ``loss``, the argument of that name, if it is one."""
    if not isinstance(loss, Loss):
        raise TypeError(f"loss must be a fastseg loss, got {type(loss).__name__}")
    return loss


def implied_activation(parts: tuple[tuple[float, Term], ...], options: Options) -> str:
    """Return the activation of a loss; ValueError where its terms do not fit together, or it."""
    wanted = {term.ACTIVATION: type(term).__name__ for _, term in parts if term.ACTIVATION}
    if len(wanted) > 1:
        raise ValueError(
            f"one loss has one activation: {wanted['sigmoid']} needs sigmoid and "
            f"{wanted['softmax']} softmax"
        )
    given = "probs" if options.activation is None else options.activation
    for implied, name in wanted.items():
        # The binary cross-entropy is that of probabilities too.
        needy = next((repr(term) for _, term in parts if term.needs_logits), None)
        takes_probs = implied == "sigmoid" and needy is None
        if given not in ("auto", implied) and not (given == "probs" and takes_probs):
            needy = name if needy is None else needy
            raise ValueError(f"{needy} needs {implied}, got activation={options.activation!r}")
        return implied if given == "auto" else given
    return "sigmoid" if given == "auto" else given


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

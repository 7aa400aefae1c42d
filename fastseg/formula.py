"""What a loss is: terms, options, the sums that they need, and their value as a function of these.

No voxel is read here: `fastseg.losses` has what does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastseg.bounds import excess
from fastseg.columns import picks, require
from fastseg.curves import first_column
from fastseg.dispatch import Backend, cpu
from fastseg.libraries import device_number, library_of
from fastseg.options import DEFAULTS, Options
from fastseg.statistics import Statistics
from fastseg_kernels.constants import (
    CURVES,
    FAMILY_COLUMNS,
    FOCAL,
    HISTOGRAMS,
    REDUCTIONS,
    TERM_FIELDS,
    histograms,
)
from fastseg_kernels.problem import Evaluation
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
_FIELDS = ("_parts", "_options")  # of WeightedSum; what else is private is remembered results


class Formula:
    """A weighted sum of terms with options, as a function of sums."""

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

    def value(self, s: Statistics) -> Any:
        """Return the loss of the voxels that ``s`` sums up: float64, (N, C) for reduction "none".

        ``s`` must hold at least the families that the terms need. The answer is NumPy's; for
        statistics that a GPU made it is an array of their library, on their device. Statistics that
        were added up, joined or unpickled are on the host, wherever they come from.
        """
        self._require_sums("value")
        return self._value_of(s, "float64")

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
        self._require_sums("bounds")
        value = np.asarray(self._value_of(s._fetched(), "float64"))
        low, high = value, value
        for weight, term in self.parts:
            if getattr(term, "histogram", None) is not None and weight != 0:
                lovasz: Any = term
                above = weight * excess(lovasz, s._fetched(), self.options.reduction)
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

    def _check_weights(self, families: frozenset[str]) -> None:
        """Raise where a weight map has no meaning for the sums that are asked for."""
        if "labels" in families:
            names = (type(term).__name__ for _, term in self.parts if hasattr(term, "histogram"))
            listed = ", ".join(dict.fromkeys(names)) or "counts of Lovasz errors"
            raise ValueError(
                f"weight_map has no meaning for {listed}, which are of a set of voxels; use mask="
            )
        if self.activation == "softmax" and "prob_curve" in families:
            raise ValueError("with softmax a curve cannot be counted with a weight_map")

    def _require_sums(self, verb: str) -> None:
        """Raise a TypeError for a loss that is no function of sums."""
        if self._sorting:
            name = type(self._sorting[0]).__name__
            raise TypeError(
                f"{verb} needs a loss that is a function of sums, and {name}() sorts its voxels: "
                f"give it bins=4096, or call value_and_grad"
            )

    def _value_of(self, s: Statistics, dtype: str) -> Any:
        """Return the value where statistics are; ``dtype`` is for those on a GPU alone."""
        backend, sums = self._place_of(s)
        return self._reduced(self._evaluate(backend, sums, s.names, 1.0, dtype).value)

    @staticmethod
    def _place_of(s: Statistics) -> tuple[Backend, Any]:
        """Return where statistics are, and the sums there."""
        if not isinstance(s, Statistics):
            raise TypeError(f"s must be Statistics, got {type(s).__name__}")
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
        if self.options.reduction == "none" and any(
            getattr(term, "scope", "sample") == "batch" for _, term in self.parts
        ):
            raise ValueError(
                'reduction="none" keeps the samples apart, scope="batch" joins them; choose one'
            )
        return table_of(self.parts, classes, names)

    def _reduced(self, value: Any) -> Any:
        return value if value.ndim == 0 or self.options.reduction == "none" else value[0, 0]


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


def table_of(
    parts: tuple[tuple[float, Term], ...], classes: int, names: tuple[str, ...]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the table of terms (T, fields) and the class weights (T, C); ``names`` of columns."""
    table = np.zeros((len(parts), len(TERM_FIELDS)))
    weights = np.empty((len(parts), classes))
    for k, (weight, term) in enumerate(parts):
        for name, value in {"weight": weight, **term.row()}.items():
            table[k, TERM_FIELDS.index(name)] = value
        histogram = getattr(term, "histogram", None)
        if histogram is not None:
            table[k, TERM_FIELDS.index("histogram")] = first_column(names, histogram)
        weights[k] = term.weights_of_classes(classes)
    return table, weights

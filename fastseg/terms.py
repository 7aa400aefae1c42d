"""The terms of a loss: what each is, as a row of numbers.

To add a region loss, write a class that returns its row (see `RegionTerm`): no kernel, no
derivative. ``tests/test_terms.py`` checks every class found here against finite differences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from fastseg.curves import first_column
from fastseg.losses import Loss
from fastseg_kernels.constants import (
    EMPTY,
    FORMS,
    KINDS,
    LINKS,
    NORMALIZE,
    SCOPES,
    TERM_FIELDS,
)

Form = Literal["product", "l1", "squared"]
Link = Literal["one_minus", "negative", "log", "power"]
Empty = Literal["formula", "one", "zero", "skip"]
Scope = Literal["sample", "batch", "image", "class"]


def choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raise a ValueError if a value is not one of ``choices``."""
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {listed}, got {value!r}")


def _not_negative(term: object, *names: str) -> None:
    """Check the numbers of a term and store them as Python's floats."""
    for name in names:
        value = getattr(term, name)
        number = float(value) if isinstance(value, Real) else math.nan
        if isinstance(value, bool) or not (math.isfinite(number) and number >= 0):
            raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")
        object.__setattr__(term, name, number)


def _at_most(term: object, name: str, most: float) -> None:
    """Check the upper end of a number that `_not_negative` has checked."""
    value = getattr(term, name)
    if value > most:
        raise ValueError(f"{name} must be in [0, {most:g}], got {value}")


MOST_GAMMA = 1000.0
"""Of a focal loss; with it a voxel that has 0.99 of its mass on the wrong side counts by 4e-5."""


def _check_gamma(term: FocalBCE | FocalCrossEntropy) -> None:
    """Check the exponent of a focal loss; -0 becomes 0, as it stands in the names of its sums."""
    _not_negative(term, "gamma")
    _at_most(term, "gamma", MOST_GAMMA)
    object.__setattr__(term, "gamma", term.gamma + 0.0)


def _tuple_of(term: object, name: str, kind: type, what: str) -> None:
    """Check a sequence of numbers, or None, and store it as a tuple."""
    value = getattr(term, name)
    if value is None:
        return
    array = np.asarray(value)
    entries = tuple(array.tolist()) if array.ndim == 1 else ()
    if not entries or any(isinstance(e, bool) or not isinstance(e, kind) for e in entries):
        raise ValueError(f"{name} must be a sequence of {what}, or None, got {value!r}")
    object.__setattr__(term, name, entries)


@dataclass(frozen=True)
class Term(Loss):
    """One term. It is a loss by itself; terms add up and are multiplied by numbers.

    Parameters
    ----------
    classes
        Indices of the classes that count; None for all. Negative indices count from the end.
    include_background
        False: all classes count but the first.
    class_weights
        One factor per class of the logits, or None. The mean still divides by the number of
        classes (or voxels), not by the sum of the factors.

    Raises
    ------
    ValueError, TypeError
        For an option that is out of its range or of another kind; the message names it.

    Examples
    --------
    >>> import fastseg as fs
    >>> loss = 0.5 * fs.BCE() + fs.SoftDice(include_background=False)
    >>> [(weight, type(term).__name__) for weight, term in loss.parts]
    [(0.5, 'BCE'), (1.0, 'SoftDice')]
    """

    classes: tuple[int, ...] | None = None
    class_weights: tuple[float, ...] | None = None
    include_background: bool = True

    ACTIVATION: ClassVar[str] = ""
    """The activation that the term needs: "sigmoid", "softmax", or "": it takes either."""

    def __post_init__(self) -> None:
        """Check the options and make sequences hashable."""
        if not isinstance(self.classes, str):  # a rule of the subclass
            _tuple_of(self, "classes", Integral, "indices")
        _tuple_of(self, "class_weights", Real, "numbers")
        if self.class_weights is not None and not all(
            math.isfinite(weight) and weight >= 0 for weight in self.class_weights
        ):
            raise ValueError(f"class_weights must be finite and >= 0, got {self.class_weights}")
        object.__setattr__(self, "include_background", bool(self.include_background))
        if isinstance(self.classes, tuple) and not self.include_background:
            raise ValueError(
                f"include_background=False says which classes count, and so does "
                f"classes={self.classes}; choose one"
            )

    @property
    def parts(self) -> tuple[tuple[float, Term], ...]:
        """Return the term itself, once."""
        return ((1.0, self),)

    @property
    def needs_logits(self) -> bool:
        """Whether a term of "sigmoid" does not take probabilities."""
        return False

    def needs(self) -> frozenset[str]:
        """Return the families of sums that the term is made of."""
        raise NotImplementedError  # every class below says so

    def row(self) -> dict[str, float]:
        """Return the term's entries in the table (see `constants.TERM_FIELDS`)."""
        raise NotImplementedError  # every class below says so

    def weights_of_classes(self, count: int) -> NDArray[np.float64]:
        """Return the factor of each of ``count`` classes, NaN for those that do not count."""
        weights = np.ones(count)
        if self.class_weights is not None:
            if len(self.class_weights) != count:
                raise ValueError(
                    f"class_weights must have one entry per class, got "
                    f"{len(self.class_weights)} for {count} classes"
                )
            weights[:] = self.class_weights
        if not self.include_background:
            if count == 1:
                raise ValueError("include_background=False leaves none of 1 class")
            weights[0] = np.nan
        if isinstance(self.classes, tuple):
            if not all(-count <= c < count for c in self.classes):
                raise ValueError(f"classes must be in [0, {count}), got {self.classes}")
            chosen = np.full(count, np.nan)
            for c in self.classes:
                chosen[c] = weights[c]
            weights = chosen
        return weights

    def __repr__(self) -> str:
        given = (
            f"{field.name}={getattr(self, field.name)!r}"
            for field in fields(self)
            if getattr(self, field.name) != field.default
        )
        return f"{type(self).__name__}({', '.join(given)})"


@dataclass(frozen=True, repr=False)
class BCE(Term):
    r"""Binary cross-entropy, the negative log-likelihood of every voxel.

    .. math:: -\sum_i w\, p_i \log q_i + (1 - p_i) \log(1 - q_i)

    with the weight w = ``pos_weight`` of the foreground.

    Parameters
    ----------
    pos_weight
        Factor of the foreground's part, at least 0.
    label_smoothing
        How far targets are moved towards 1/2, in [0, 1]: p (1 - s) + s / 2 is the target. Of
        logits only.
    normalize
        "valid": divide by the number of valid voxels (of the batch for ``reduction="mean"``, of
        each row else); "all": by the number of all voxels; None: the sum per sample and class, as
        the source defines it; ``reduction="mean"`` then averages these sums.
    classes, class_weights
        See `Term`.

    Notes
    -----
    Probabilities of exactly 0 and 1 (``activation=None``) have their logarithms clamped at -100,
    as in PyTorch. A weight map multiplies the voxels' losses; the divisor stays the number of
    voxels.

    Examples
    --------
    >>> import numpy as np, fastseg as fs
    >>> logits = np.array([[[0.0, 2.0]]], np.float32)  # (1, 1, 2)
    >>> targets = np.array([[[0, 1]]], np.uint8)
    >>> round(float(fs.BCE()(logits, targets)), 5)
    0.41004
    """

    pos_weight: float = 1.0
    normalize: Literal["valid", "all"] | None = "valid"
    label_smoothing: float = 0.0

    ACTIVATION: ClassVar[str] = "sigmoid"

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        _not_negative(self, "pos_weight", "label_smoothing")
        _at_most(self, "label_smoothing", 1)
        choice("normalize", self.normalize, ("valid", "all", None))

    @property
    def needs_logits(self) -> bool:
        """Probabilities have no smoothed labels."""
        return self.label_smoothing > 0

    def needs(self) -> frozenset[str]:
        """Need the two sums apart only where they are weighted apart."""
        if self.label_smoothing:
            return frozenset({"bce_split", "bce_flipped"})
        return frozenset({"bce" if self.pos_weight == 1.0 else "bce_split"})

    def row(self) -> dict[str, float]:
        """Return the term's entries in the table."""
        return {
            "kind": KINDS.index("bce"),
            "pos_weight": self.pos_weight,
            "neg_weight": 1.0,
            "normalize": NORMALIZE.index(self.normalize or "sum"),
            "smoothing": self.label_smoothing,
        }


@dataclass(frozen=True, repr=False)
class FocalBCE(Term):
    r"""Focal loss: the binary cross-entropy of every voxel, less of it where the network is right.

    .. math:: -\sum_i \alpha\, p_i (1 - q_i)^\gamma \log q_i
              + (1 - \alpha) (1 - p_i)\, q_i^\gamma \log(1 - q_i)

    Parameters
    ----------
    gamma
        Exponent, from 0 (which makes it the BCE) to 1000.
    alpha
        Factor of the foreground's part, in [0, 1], that of the background's being 1 - alpha; None
        for 1 and 1.
    normalize, classes, class_weights
        As in `BCE`.

    Notes
    -----
    For soft targets it is linear in p: the mean of both labels' losses. A loss has one gamma.

    References
    ----------
    Lin, Goyal, Girshick, He and Dollar, Focal loss for dense object detection, ICCV 2017,
    equation 5.

    Examples
    --------
    >>> import numpy as np, fastseg as fs
    >>> probs = np.array([[[0.9, 0.9]]])  # (1, 1, 2): one right, one wrong
    >>> loss = fs.FocalBCE(normalize=None).replace(activation=None)
    >>> round(float(loss(probs, np.array([[[1, 0]]]))), 5)  # 0.01 * 0.10536 + 0.81 * 2.30259
    1.86615
    """

    gamma: float = 2.0
    alpha: float | None = None
    normalize: Literal["valid", "all"] | None = "valid"

    ACTIVATION: ClassVar[str] = "sigmoid"

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        _check_gamma(self)
        if self.alpha is not None:
            _not_negative(self, "alpha")
            _at_most(self, "alpha", 1)
        choice("normalize", self.normalize, ("valid", "all", None))

    def needs(self) -> frozenset[str]:
        """Need the sums of this gamma."""
        return frozenset({f"focal_bce_{self.gamma}"})

    def row(self) -> dict[str, float]:
        """Return the term's entries in the table."""
        return {
            "kind": KINDS.index("focal_bce"),
            "gamma": self.gamma,
            "pos_weight": 1.0 if self.alpha is None else self.alpha,
            "neg_weight": 1.0 if self.alpha is None else 1.0 - self.alpha,
            "normalize": NORMALIZE.index(self.normalize or "sum"),
        }


@dataclass(frozen=True, repr=False)
class CrossEntropy(Term):
    r"""Cross-entropy of the classes of a voxel, the negative log-likelihood of a softmax.

    .. math:: -\sum_i \sum_c w_c\, p'_{ic} \log q_{ic},
              \qquad p' = (1 - \epsilon)\, p + \epsilon / C

    with q the softmax of the logits over the classes, and p 1 for the class of the target and 0 for
    the others, or soft.

    Parameters
    ----------
    label_smoothing
        The share epsilon of every target that is spread over all classes, in [0, 1].
    normalize
        "valid": divide by the number of valid voxels (of the batch for ``reduction="mean"``, of
        each sample else); "all": by the number of all voxels; "weights": by the sum of the weights
        of the voxels' classes, as PyTorch does for class indices; None: the sum per sample;
        ``reduction="mean"`` then averages these sums.
    classes, class_weights
        See `Term`. Voxels of other classes than ``classes`` have no part in it.

    Notes
    -----
    ``reduction="none"`` gives the part of each class, whose sum is the sample's loss.

    Examples
    --------
    >>> import numpy as np, fastseg as fs
    >>> logits = np.array([[[2.0], [0.0], [0.0]]], np.float32)  # (1, 3, 1)
    >>> round(float(fs.CrossEntropy()(logits, np.array([[0]]))), 5)
    0.23954
    """

    label_smoothing: float = 0.0
    normalize: Literal["valid", "all", "weights"] | None = "valid"

    ACTIVATION: ClassVar[str] = "softmax"

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        _not_negative(self, "label_smoothing")
        _at_most(self, "label_smoothing", 1)
        choice("normalize", self.normalize, ("valid", "all", "weights", None))

    def needs(self) -> frozenset[str]:
        """Need the sum over all classes only where targets are smoothed."""
        return frozenset({"ce", "ce_uniform"} if self.label_smoothing else {"ce"})

    def row(self) -> dict[str, float]:
        """Return the term's entries in the table."""
        return {
            "kind": KINDS.index("cross_entropy"),
            "normalize": NORMALIZE.index(self.normalize or "sum"),
            "smoothing": self.label_smoothing,
        }


@dataclass(frozen=True, repr=False)
class FocalCrossEntropy(Term):
    r"""Focal loss of the classes of a voxel: less cross-entropy where the network is right.

    .. math:: -\sum_i \sum_c w_c\, p_{ic} (1 - q_{ic})^\gamma \log q_{ic}

    with q the softmax of the logits over the classes.

    Parameters
    ----------
    gamma
        Exponent, from 0 (which makes it the cross-entropy) to 1000.
    normalize, classes, class_weights
        As in `CrossEntropy`.

    Notes
    -----
    ``reduction="none"`` gives the part of each class, whose sum is the sample's loss. A loss has
    one gamma.

    References
    ----------
    As `FocalBCE`.

    Examples
    --------
    >>> import numpy as np, fastseg as fs
    >>> logits = np.array([[[2.0], [0.0], [0.0]]], np.float32)  # (1, 3, 1)
    >>> round(float(fs.FocalCrossEntropy()(logits, np.array([[0]]))), 5)  # 0.21299^2 * 0.23954
    0.01087
    """

    gamma: float = 2.0
    normalize: Literal["valid", "all", "weights"] | None = "valid"

    ACTIVATION: ClassVar[str] = "softmax"

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        _check_gamma(self)
        choice("normalize", self.normalize, ("valid", "all", "weights", None))

    def needs(self) -> frozenset[str]:
        """Need the sum of this gamma."""
        return frozenset({f"focal_ce_{self.gamma}"})

    def row(self) -> dict[str, float]:
        """Return the term's entries in the table."""
        return {
            "kind": KINDS.index("focal_cross_entropy"),
            "gamma": self.gamma,
            "normalize": NORMALIZE.index(self.normalize or "sum"),
        }


@dataclass(frozen=True, repr=False)
class RegionTerm(Term):
    """A loss that is a quotient of sums over a region.

    With P = sum p, F = sum p (1 - q) (missed) and G = sum (1 - p) q (false alarms), a subclass
    names in ``ERRORS`` the (F, G) coefficients of its numerator's complement, and in ``SIZES`` the
    (P, F, G) coefficients of its denominator:

        score = 1 - (ERRORS . (F, G) + smooth_den - smooth_num) / max(SIZES . (P, F, G)
                + smooth_den, eps)

    Parameters
    ----------
    form
        How targets and probabilities overlap. "product": sum p q, as in the papers; right for
        binary targets. "l1": sum min(p, q), with F = sum max(p - q, 0) and G = sum max(q - p, 0).
        For binary targets it is the same; for soft ones its least value is at q = p, where the
        product's is at a corner: use it for soft targets, label smoothing and distillation.
        "squared": sum p q over sums of squares, P = sum p^2 and Q = sum q^2 (V-Net's Dice score);
        its least value is at q = p too. Of F and G it knows the sum alone,
        sum (p - q)^2, so both must count alike.
    smooth_num, smooth_den
        Added to the numerator and to the denominator of the score. No smoothing by default.
    eps
        Least value of the denominator (and of the score in ``link="log"``).
    link
        The loss as a function of the score: "one_minus" 1 - score, "negative" -score, "log"
        -log(score), "power" (1 - score)^gamma.
    gamma
        Exponent of ``link="power"``, and 1 otherwise.
    scope
        "batch": a score per class, over all voxels of the batch. The others take one per sample and
        class and differ in the mean where rows are left out (by ``empty="skip"``, or without a
        voxel): "sample": the mean of all; "image": of each sample, and of these; "class": of each
        class, and of these.
    empty
        Score of a row without foreground (P = 0): "formula" (what the formula gives; NaN at 0/0),
        "one" (loss 0), "zero", or "skip" (left out of the mean).
    classes, class_weights
        See `Term`.

    Examples
    --------
    The share of the foreground that is missed, F / P:

    >>> import numpy as np, fastseg as fs
    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True, repr=False)
    ... class MissedShare(fs.RegionTerm):
    ...     ERRORS = (1.0, 0.0)
    ...     SIZES = (1.0, 0.0, 0.0)
    >>> probs, targets = np.array([[[0.25, 1.0, 0.5]]]), np.array([[[1, 1, 0]]])
    >>> float(MissedShare().replace(activation=None)(probs, targets))
    0.375
    """

    form: Form = "product"
    smooth_num: float = 0.0
    smooth_den: float = 0.0
    eps: float = 0.0
    link: Link = "one_minus"
    gamma: float = 1.0
    scope: Scope = "sample"
    empty: Empty = "formula"

    ERRORS: ClassVar[tuple[float, float]]
    SIZES: ClassVar[tuple[float, float, float]]

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        choice("form", self.form, FORMS)
        _not_negative(self, "smooth_num", "smooth_den", "eps", "gamma")
        choice("link", self.link, LINKS)
        if self.gamma != 1.0 and self.link != "power":
            raise ValueError(
                f"gamma must be 1 unless link='power', got gamma={self.gamma} with "
                f"link={self.link!r}"
            )
        choice("scope", self.scope, SCOPES)
        choice("empty", self.empty, EMPTY)
        if self.form == "squared":
            self.row()  # which raises where it has none

    def needs(self) -> frozenset[str]:
        """Need the overlap sums of the form."""
        return frozenset({"overlap" if self.form == "product" else f"overlap_{self.form}"})

    def errors(self) -> tuple[float, float]:
        """Return the coefficients of (F, G) in denominator - numerator."""
        return self.ERRORS

    def sizes(self) -> tuple[float, float, float]:
        """Return the coefficients of (P, F, G) in the denominator."""
        return self.SIZES

    def row(self) -> dict[str, float]:
        """Return the term's entries in the table."""
        errors_f, errors_g = self.errors()
        size_p, size_f, size_g = self.sizes()
        # The hits are what the errors leave of the size, in I, F and G (P = I + F). In this order
        # beta - (beta - 1) is exactly 1, and F has no part in the hits of a Tversky index.
        hits_f, hits_g = size_p - (errors_f - size_f), size_g - errors_g
        if self.form == "squared":
            if errors_f != errors_g or hits_f != 0 or hits_g != 0:
                raise ValueError(
                    "form='squared' needs missed foreground and false alarms that count alike, "
                    f"got {self!r}"
                )
            errors_f = 0.0
        return {
            "kind": KINDS.index("region"),
            "hits_i": size_p,
            "hits_f": hits_f,
            "hits_g": hits_g,
            "hits_0": self.smooth_num,
            "errors_f": errors_f,
            "errors_g": errors_g,
            "errors_0": self.smooth_den - self.smooth_num,
            "eps": self.eps,
            "link": LINKS.index(self.link),
            "gamma": self.gamma,
            "scope": SCOPES.index(self.scope),
            "empty": EMPTY.index(self.empty),
            "form": FORMS.index(self.form),
        }


@dataclass(frozen=True, repr=False)
class SoftJaccard(RegionTerm):
    r"""One minus the soft Jaccard index.

    .. math:: 1 - \frac{I}{P + Q - I} = \frac{F + G}{P + G}

    with I = sum p q, P = sum p, Q = sum q; options as in `RegionTerm`.

    References
    ----------
    Rahman and Wang, Optimizing intersection-over-union in deep neural networks for image
    segmentation, ISVC 2016, equation 3.

    Examples
    --------
    >>> import numpy as np, fastseg as fs
    >>> probs = np.array([[[0.5, 1.0, 0.0]]])  # (1, 1, 3)
    >>> targets = np.array([[[True, True, False]]])
    >>> float(fs.SoftJaccard().replace(activation=None)(probs, targets))  # 1 - 1.5 / 2
    0.25
    """

    ERRORS: ClassVar[tuple[float, float]] = (1.0, 1.0)
    SIZES: ClassVar[tuple[float, float, float]] = (1.0, 0.0, 1.0)


@dataclass(frozen=True, repr=False)
class SoftDice(RegionTerm):
    r"""One minus the soft Dice score.

    .. math:: 1 - \frac{2 I}{P + Q} = \frac{F + G}{2 P - F + G}

    ``smooth_num`` is added to 2 I and ``smooth_den`` to P + Q; options as in `RegionTerm`.

    References
    ----------
    Milletari, Navab and Ahmadi, V-Net, 3DV 2016 (theirs is ``form="squared"``).

    Examples
    --------
    >>> import numpy as np, fastseg as fs
    >>> probs = np.array([[[0.5, 1.0, 0.0]]])  # (1, 1, 3)
    >>> targets = np.array([[[True, True, False]]])
    >>> round(float(fs.SoftDice().replace(activation=None)(probs, targets)), 6)  # 1 - 3 / 3.5
    0.142857
    """

    ERRORS: ClassVar[tuple[float, float]] = (1.0, 1.0)
    SIZES: ClassVar[tuple[float, float, float]] = (2.0, -1.0, 1.0)


@dataclass(frozen=True, repr=False)
class Tversky(RegionTerm):
    r"""One minus the Tversky index.

    .. math:: 1 - \frac{I}{I + \alpha\, G + \beta\, F}
              = \frac{\beta F + \alpha G}{P + (\beta - 1) F + \alpha G}

    ``alpha`` weighs false alarms (G) and ``beta`` missed foreground (F): 1 and 1 give the Jaccard
    index, 0.5 and 0.5 Dice. With ``link="power"`` it is the focal Tversky loss. Further options as
    in `RegionTerm`.

    References
    ----------
    Salehi, Erdogmus and Gholipour, Tversky loss function for image segmentation using 3D fully
    convolutional deep networks, MLMI 2017, equation 3.

    Examples
    --------
    >>> import numpy as np, fastseg as fs
    >>> probs = np.array([[[0.5, 1.0, 0.0]]])  # (1, 1, 3)
    >>> targets = np.array([[[True, True, False]]])
    >>> loss = fs.Tversky(alpha=0.3, beta=0.7).replace(activation=None)
    >>> round(float(loss(probs, targets)), 6)  # 1 - 1.5 / (1.5 + 0.7 * 0.5)
    0.189189
    """

    alpha: float = 0.5
    beta: float = 0.5

    def __post_init__(self) -> None:
        """Check the options."""
        _not_negative(self, "alpha", "beta")
        super().__post_init__()

    def errors(self) -> tuple[float, float]:
        """Return the coefficients of (F, G) in denominator - numerator."""
        return (self.beta, self.alpha)

    def sizes(self) -> tuple[float, float, float]:
        """Return the coefficients of (P, F, G) in the denominator."""
        return (1.0, self.beta - 1.0, self.alpha)


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

"""Region terms: losses that are quotients of sums over a region, each as a row of numbers.

To add one, write a class that returns its row (see `RegionTerm`): no kernel, no derivative.
``tests/test_terms.py`` checks every class found here against finite differences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from fastseg.terms import Empty, Scope, Term, choice, not_negative
from fastseg_kernels.constants import EMPTY, FORMS, KINDS, LINKS, SCOPES

Form = Literal["product", "l1", "squared"]
Link = Literal["one_minus", "negative", "log", "power"]


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
        not_negative(self, "smooth_num", "smooth_den", "eps", "gamma")
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
        not_negative(self, "alpha", "beta")
        super().__post_init__()

    def errors(self) -> tuple[float, float]:
        """Return the coefficients of (F, G) in denominator - numerator."""
        return (self.beta, self.alpha)

    def sizes(self) -> tuple[float, float, float]:
        """Return the coefficients of (P, F, G) in the denominator."""
        return (1.0, self.beta - 1.0, self.alpha)

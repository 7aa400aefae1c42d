"""The Lovász losses: surrogates of the hard Jaccard index, by sorting errors or counting them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from fastseg.terms import Empty, Scope, Term, choice
from fastseg_kernels.constants import EMPTY, HISTOGRAMS, KINDS, LOVASZ_BINS, SCOPES


@dataclass(frozen=True, repr=False)
class LovaszTerm(Term):
    """What the Lovász losses have in common.

    Parameters
    ----------
    bins
        None: the errors are sorted, and the value is exact. It is then a function of no sums:
        `Loss.statistics` has none, and `Loss.value_and_grad` needs two to three times the memory
        of the gradient beside it.
        A number (1024, 2048, 4096 or 8192): errors are counted in so many bins, 16 to 128 for each
        factor of two, with the sum of those in each. Counts add up, and the volume is read as
        often as for any other loss. The value is never above the exact one, and below it by far
        less than a bin's width: `Loss.bounds` says by how much at the most.
    scope
        As in `RegionTerm`: "batch" sorts the voxels of all samples together.
    classes, class_weights
        See `Term`.

    Notes
    -----
    Voxels of equal errors have equal gradients: the mean of both orders, foreground first and
    background first. Weights are made of counts, never of differences of Jaccard indices, which
    have lost all their digits in float32 at 20 million voxels.

    A weight map has no meaning for a set of voxels, and is an error.
    """

    bins: int | None = None
    scope: Scope = "sample"

    MEASURE: ClassVar[str]
    """What an error is: a measure of `fastseg_kernels.constants.Histogram`."""

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        choice("bins", self.bins, (None, *LOVASZ_BINS))
        if self.bins is not None:
            object.__setattr__(self, "bins", int(self.bins))  # 4096.0 is 4096
        choice("scope", self.scope, SCOPES)

    @property
    def histogram(self) -> str | None:
        """Return the family of counts that the term is made of, or None: it sorts."""
        return None if self.bins is None else f"{self.MEASURE}_{self.bins}"

    def needs(self) -> frozenset[str]:
        """Need the counts of errors, or what sorts them; soft targets are no set."""
        if self.histogram is not None:
            return frozenset({self.histogram, "labels"})
        # A rule for empty rows must not hide a prediction that is NaN: "hard" counts them.
        ruled = self._empty_rule() != "formula"
        return frozenset({"sorted", "labels", "hard"} if ruled else {"sorted", "labels"})

    def _empty_rule(self) -> str:
        """Return what is done with rows without foreground, one of `constants.EMPTY`."""
        raise NotImplementedError  # both classes below say so

    def row(self) -> dict[str, float]:
        """Return the term's entries in the table; the place of its histogram is filled in later."""
        row: dict[str, float] = {
            "kind": KINDS.index("lovasz"),
            "scope": SCOPES.index(self.scope),
            "empty": EMPTY.index(self._empty_rule()),
        }
        if self.histogram is not None:
            histogram = HISTOGRAMS[self.histogram]
            row.update(bins=histogram.bins, lowest=histogram.lowest)
        return row


@dataclass(frozen=True, repr=False)
class LovaszHinge(LovaszTerm):
    r"""Lovász hinge loss, a convex surrogate of the hard Jaccard index of one class.

    .. math:: \overline{\Delta_J}(\max(e, 0)),\qquad e_i = 1 - x_i (2 p_i - 1)

    with the Lovász extension :math:`\overline{\Delta_J}` of the Jaccard loss: errors in descending
    order, each times what its voxel adds to the Jaccard loss of those before it. Errors below 0
    (voxels that are right by a margin of 1) have no gradient.

    Parameters
    ----------
    bins, scope, classes, class_weights
        See `LovaszTerm`. "sample" is what others call per image.
    empty
        As in `RegionTerm`. The formula gives a row without foreground its largest error.

    Notes
    -----
    With ``bins``, errors from 2^40 on are counted as 2^40.

    References
    ----------
    Berman, Rannen Triki and Blaschko, The Lovász-Softmax loss, CVPR 2018, equation 8.

    Examples
    --------
    >>> import numpy as np, fastseg as fs
    >>> logits = np.array([[[0.5, -3.0, 2.0]]], np.float32)  # errors 0.5, -2, -1
    >>> targets = np.array([[[1, 0, 1]]], np.uint8)
    >>> float(fs.LovaszHinge(bins=4096)(logits, targets))  # 0.5 times 1 / 2
    0.25
    """

    empty: Empty = "formula"

    ACTIVATION: ClassVar[str] = "sigmoid"

    @property
    def needs_logits(self) -> bool:
        """The hinge is one of logits."""
        return True

    MEASURE: ClassVar[str] = "hinge"

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        choice("empty", self.empty, EMPTY)

    def _empty_rule(self) -> str:
        """Return ``empty``."""
        return self.empty


@dataclass(frozen=True, repr=False)
class LovaszSoftmax(LovaszTerm):
    r"""Lovász softmax loss, a surrogate of the hard Jaccard indices of several classes.

    .. math:: \overline{\Delta_J}(e_c),\qquad e_{ic} = |p_{ic} - q_{ic}|

    for each class c, with q the softmax of the logits; then the mean over classes (and samples).

    Parameters
    ----------
    classes
        "present": the classes that have a voxel in the row (the sample, or the batch); "all"; or a
        sequence of indices, all of which count.
    bins, scope, class_weights
        See `LovaszTerm`. "image" is what others call per image.

    Notes
    -----
    Targets ``(N, C, *spatial)`` must be one-hot; what each voxel adds up to is not checked.

    References
    ----------
    Berman, Rannen Triki and Blaschko, The Lovász-Softmax loss, CVPR 2018, equation 11.

    Examples
    --------
    >>> import numpy as np, fastseg as fs
    >>> logits = np.array([[[0.0, 1.0], [0.0, 1.0]]], np.float32)  # (1, 2, 2), all q are 0.5
    >>> targets = np.array([[0, 0]])
    >>> float(fs.LovaszSoftmax(bins=4096)(logits, targets))  # of class 0; there is no class 1
    0.5
    """

    classes: Literal["present", "all"] | Sequence[int] | None = "present"  # type: ignore[assignment]

    ACTIVATION: ClassVar[str] = "softmax"
    MEASURE: ClassVar[str] = "errors"

    def __post_init__(self) -> None:
        """Check the options."""
        if self.classes is None:
            object.__setattr__(self, "classes", "all")
        if isinstance(self.classes, str):
            choice("classes", self.classes, ("present", "all"))
        super().__post_init__()

    def _empty_rule(self) -> str:
        """Leave classes without a voxel out, for "present"."""
        return "skip" if self.classes == "present" else "formula"

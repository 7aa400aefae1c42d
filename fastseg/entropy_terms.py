"""Cross-entropies and focal losses, of labels and of classes, each as a row of numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from fastseg.terms import Term, at_most, choice, not_negative
from fastseg_kernels.constants import KINDS, NORMALIZE

MOST_GAMMA = 1000.0
"""Of a focal loss; with it a voxel that has 0.99 of its mass on the wrong side counts by 4e-5."""


def _check_gamma(term: FocalBCE | FocalCrossEntropy) -> None:
    """Check the exponent of a focal loss; -0 becomes 0, as it stands in the names of its sums."""
    not_negative(term, "gamma")
    at_most(term, "gamma", MOST_GAMMA)
    object.__setattr__(term, "gamma", term.gamma + 0.0)


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
        not_negative(self, "pos_weight", "label_smoothing")
        at_most(self, "label_smoothing", 1)
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
            not_negative(self, "alpha")
            at_most(self, "alpha", 1)
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
        not_negative(self, "label_smoothing")
        at_most(self, "label_smoothing", 1)
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

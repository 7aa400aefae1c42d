"""The float64 reference: every formula once, in NumPy, to be read against the mathematics.

Slow and obvious on purpose. Every function casts its inputs to float64; nothing here is fused,
parallel or dispatched, and nothing here depends on another package than NumPy. Arrays are
(N, C, *spatial); a row is one (sample, class); a sum runs over the spatial axes and gives (N, C).
"""

from .cross_entropy import (
    bce,
    bce_gradient,
    bce_mean,
    bce_per_image,
    bce_with_logits,
    bce_with_logits_gradient,
    focal_bce,
    focal_bce_gradient,
    focal_bce_with_logits,
    focal_bce_with_logits_gradient,
)
from .curves import jaccard_curve
from .hard import confusion_counts, hard_dice_score, hard_jaccard_index
from .links import LINKS, link_derivative, link_value
from .logistic import sigmoid, sigmoid_gradient, softplus
from .lovasz import (
    group_weight_bounds,
    group_weights,
    jaccard_loss_of_counts,
    lovasz_extension,
    lovasz_hinge,
    lovasz_softmax,
    lovasz_weights,
    lovasz_weights_exact,
)
from .lovasz_bins import lovasz_from_histogram, lovasz_range_of_histogram
from .multiclass import (
    cross_entropy_gradient,
    focal_nll,
    focal_steepness,
    one_hot,
    softmax,
    softmax_gradient,
    softmax_nll,
)
from .overlap import error_sums, gradient_wrt_logits, overlap_sums
from .region_scores import (
    soft_dice_score,
    soft_dice_score_gradient,
    soft_jaccard_index,
    soft_jaccard_index_gradient,
    tversky_index,
    tversky_index_gradient,
)
from .updates import adam, amsgrad, gradient_descent, momentum, momentum_pytorch

__all__ = [
    "LINKS",
    "adam",
    "amsgrad",
    "bce",
    "bce_gradient",
    "bce_mean",
    "bce_per_image",
    "bce_with_logits",
    "bce_with_logits_gradient",
    "confusion_counts",
    "cross_entropy_gradient",
    "error_sums",
    "focal_bce",
    "focal_bce_gradient",
    "focal_bce_with_logits",
    "focal_bce_with_logits_gradient",
    "focal_nll",
    "focal_steepness",
    "gradient_descent",
    "gradient_wrt_logits",
    "group_weight_bounds",
    "group_weights",
    "hard_dice_score",
    "hard_jaccard_index",
    "jaccard_curve",
    "jaccard_loss_of_counts",
    "link_derivative",
    "link_value",
    "lovasz_extension",
    "lovasz_from_histogram",
    "lovasz_hinge",
    "lovasz_range_of_histogram",
    "lovasz_softmax",
    "lovasz_weights",
    "lovasz_weights_exact",
    "momentum",
    "momentum_pytorch",
    "one_hot",
    "overlap_sums",
    "sigmoid",
    "sigmoid_gradient",
    "soft_dice_score",
    "soft_dice_score_gradient",
    "soft_jaccard_index",
    "soft_jaccard_index_gradient",
    "softmax",
    "softmax_gradient",
    "softmax_nll",
    "softplus",
    "tversky_index",
    "tversky_index_gradient",
]

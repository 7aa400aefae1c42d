"""The contract's rows that the CUDA backend must keep too: the CPU's own tests, imported.

Swapped and unaligned arrays are left out (conftest.py): no device has them.
"""

import sys

from test_accuracy import (  # noqa: F401
    test_a_confident_network_keeps_its_digits,
    test_a_focal_loss_of_classes_of_one_logit,
    test_a_focal_loss_of_one_logit,
    test_a_score_near_0_keeps_its_digits,
    test_constant_logits_do_not_drift,
    test_extreme_logits_have_their_limits,
    test_gradient_of_bce_and_jaccard_is_within_4_ulp_of_itself,
    test_nan_in_nan_out,
    test_tversky_of_a_network_that_is_sure_and_wrong,
)
from test_contract import *  # noqa: F403
from test_curves import *  # noqa: F403
from test_exclusion import *  # noqa: F403
from test_forms import *  # noqa: F403
from test_lovasz import *  # noqa: F403
from test_metrics import *  # noqa: F403
from test_optimizer_options import *  # noqa: F403
from test_optimizers import *  # noqa: F403
from test_softmax import *  # noqa: F403
from test_terms import test_scope_says_which_rows_are_averaged_together  # noqa: F401

MODULES = (
    "test_contract",
    "test_curves",
    "test_exclusion",
    "test_forms",
    "test_lovasz",
    "test_metrics",
    "test_optimizer_options",
    "test_optimizers",
    "test_softmax",
)
_rows = [name for module in MODULES for name in vars(sys.modules[module]) if name[:5] == "test_"]
assert len(set(_rows)) == len(_rows), "two of these modules have a test of one name: one is lost"
__all__ = [name for name in globals() if name.startswith("test_")]

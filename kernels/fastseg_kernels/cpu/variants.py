"""Which machine code a call runs: what of it is decided before it is compiled."""

from __future__ import annotations

from typing import NamedTuple

from fastseg_kernels.constants import (
    FAMILY_COLUMNS,
    SLOPE_FAMILIES,
    lovasz_histogram,
    without_gamma,
)
from fastseg_kernels.cpu.compiled import compile_target

HAS_MASKS = bool(compile_target()["features"].get("avx512f"))
"""Whether the CPU has registers of masks, and 32 vectors: the same bits come by other ways then."""


class Variant(NamedTuple):
    """Which machine code: the element type, the kinds of inputs, the families of sums."""

    real: str  # "float32" or "float64": the type that a voxel is computed in
    targets: str  # "binary", "soft" or "weighted" (soft, with a weight per voxel)
    activation: str  # "sigmoid" or "probs"
    families: frozenset[str] = frozenset()  # of what is code of its own in a kernel
    kept: bool = False  # statistics keep for the gradient what it would compute anew

    @property
    def of_binary_logits(self) -> bool:
        """Tell whether logits meet labels of one byte."""
        return self.targets == "binary" and self.activation == "sigmoid"

    def adding(self, families: frozenset[str]) -> Variant:
        """Return the variant that adds up the sums of ``families``.

        Histograms have kernels of their own, and labels of whole numbers are checked in any case.
        """
        labels = {"labels"} if self.targets in ("soft", "weighted", "weighted_soft") else set()
        added = {name for name, sums in FAMILY_COLUMNS.items() if sums} | labels
        return self._replace(families=without_gamma(families) & added)

    def sloping(self, families: frozenset[str]) -> Variant:
        """Return the variant that writes the gradient of a loss made of ``families``.

        With softmax the slopes of Lovasz terms, "given", come in the middle of the kernel.
        """
        own = without_gamma(families) & SLOPE_FAMILIES
        if self.activation == "softmax" and ("sorted" in families or lovasz_histogram(families)):
            own |= {"given"}
        return self._replace(families=own)

    def name(self, verb: str) -> str:
        """Name the kernel of one verb."""
        parts = [verb, self.real, self.targets, self.activation, *sorted(self.families)]
        return "-".join([*parts, "kept"] if self.kept else parts)

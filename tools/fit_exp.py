"""Print the float32 coefficients of exp(r) = 1 + r + r^2 (c2 + c3 r + ...), |r| <= ln(2) / 2.

Minimises the largest relative error by iteratively reweighted least squares (Lawson's algorithm)
in float64, which is exact enough for a polynomial that is then rounded to float32.
"""

from __future__ import annotations

import numpy as np

DEGREES = (5, 6)


def fit(degree: int) -> tuple[np.ndarray, float]:
    """Return the coefficients c2, c3, ... and the largest relative error of the fit."""
    r = np.cos(np.linspace(0.0, np.pi, 4001)) * (np.log(2.0) / 2 * 1.0001)
    powers = np.stack([r**k for k in range(2, degree + 1)], axis=1) / np.exp(r)[:, None]
    target = (np.exp(r) - 1 - r) / np.exp(r)
    weight = np.full(r.size, 1.0 / r.size)
    for _ in range(200):
        root = np.sqrt(weight)
        coefficients = np.linalg.lstsq(powers * root[:, None], target * root, rcond=None)[0]
        error = np.abs(powers @ coefficients - target)
        weight *= error + 1e-300
        weight /= weight.sum()
    return coefficients.astype(np.float32), float(error.max())


if __name__ == "__main__":
    for degree in DEGREES:
        coefficients, error = fit(degree)
        print(degree, [float(np.format_float_positional(c)) for c in coefficients], f"{error:.2g}")

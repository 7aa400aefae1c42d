"""Losses for JAX: differentiable, under jit and vmap. Importing this module imports jax.

>>> import jax, jax.numpy as jnp, fastseg as fs, fastseg.jax
>>> criterion = fastseg.jax.Loss(fs.BCE() + fs.SoftJaccard())
>>> logits, targets = jnp.zeros((1, 1, 4, 4)), jnp.ones((1, 1, 4, 4))
>>> value, grad = jax.jit(jax.value_and_grad(criterion))(logits, targets)
>>> round(float(value), 5), grad.shape
(1.19315, (1, 1, 4, 4))

XLA calls the kernels (``fastseg/xla.py``), which read and write its buffers and compute on the CPU:
where JAX computes on a GPU, its arrays are brought to the host for that, and the gradient back.
Outside jit, `value_and_grad` needs no call by XLA, and a GPU's arrays stay there:

    logits, pull = jax.vjp(model, params)
    value, grad = fastseg.jax.value_and_grad(loss, logits, targets)
    (gradient_of_params,) = pull(grad)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import dtypes

from fastseg.dispatch import cpu
from fastseg.losses import Loss as _Loss
from fastseg.losses import checked_loss
from fastseg.statistics import Statistics
from fastseg.xla import call
from fastseg_kernels.constants import columns

__all__ = ["Loss", "compute_loss", "value_and_grad"]

_Others = tuple[jax.Array, jax.Array | None, jax.Array | None]
"""Targets, mask and weight map."""
MOST_LOSSES = 256
"""Losses whose functions are remembered; a weight that is scheduled makes a new one each step."""
ALIGNMENT = 64
"""Of the memory of JAX's arrays on the CPU, in bytes."""
_Like: Any = jax.ShapeDtypeStruct


@dataclass(frozen=True)
class Loss:
    """A fastseg loss as a function of JAX arrays: ``criterion(logits, targets)``.

    Differentiable with respect to the logits, once, in reverse mode. The gradient is computed in
    the backward pass, by one read of logits and targets and one write; what comes from above is
    multiplied in before the gradient is rounded to the logits' dtype. Equal losses are equal, so
    that one may be an argument that jit holds static.

    Parameters
    ----------
    loss
        Any `fastseg.Loss`.

    Notes
    -----
    vmap calls the kernels once for each of what it maps over; give the loss a batch instead where
    you can.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, fastseg as fs, fastseg.jax
    >>> criterion = fastseg.jax.Loss(fs.SoftDice())
    >>> logits, targets = jnp.zeros((1, 1, 4)), jnp.array([[[1, 1, 0, 0]]])
    >>> float(jax.jit(criterion)(logits, targets))
    0.5
    """

    loss: _Loss

    def __post_init__(self) -> None:
        checked_loss(self.loss)

    def __call__(
        self,
        logits: jax.Array,
        targets: jax.Array,
        *,
        mask: jax.Array | None = None,
        weight_map: jax.Array | None = None,
    ) -> jax.Array:
        """Return the loss, 0-d (or (N, C)), float32, or float64 where JAX has it.

        ``targets`` and the rest have no gradient: to ask for it raises a TypeError.
        """
        return compute_loss(self.loss, logits, targets, mask=mask, weight_map=weight_map)


def compute_loss(
    loss: _Loss,
    logits: jax.Array,
    targets: jax.Array,
    *,
    mask: jax.Array | None = None,
    weight_map: jax.Array | None = None,
) -> jax.Array:
    """Return a loss that JAX can differentiate: the function to `Loss`.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, fastseg as fs, fastseg.jax
    >>> ones = jnp.ones((1, 1, 4))
    >>> grad = jax.grad(lambda x: fastseg.jax.compute_loss(fs.BCE(), x, ones))(0 * ones)
    >>> float(grad[0, 0, 0])
    -0.125
    """
    given = (logits, targets, mask, weight_map)
    x, *others = (None if array is None else jnp.asarray(array) for array in given)
    checked_loss(loss)._check_arrays(x, *others)  # in a callback it would be an error of XLA's
    value: jax.Array = _differentiable(loss)(x, tuple(others))
    return value


def value_and_grad(
    loss: _Loss,
    logits: jax.Array,
    targets: jax.Array,
    *,
    mask: jax.Array | None = None,
    weight_map: jax.Array | None = None,
    grad_scale: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """Return value and gradient of arrays that exist, outside jit and grad, reading them in place.

    Parameters
    ----------
    loss
        Any `fastseg.Loss`.
    logits, targets, mask, weight_map
        JAX arrays, all on the CPU or all on one NVIDIA GPU. On a GPU CuPy reads them through
        DLPack, and its stream is waited for; this has not yet run on one.
    grad_scale
        Multiplied into the gradient before it is rounded.

    Returns
    -------
    value, grad
        As `fastseg.Loss.value_and_grad`; arrays of JAX on the device of the logits.

    Raises
    ------
    TypeError
        For what is traced by jit, grad or vmap, and for arrays on several devices.

    Examples
    --------
    >>> import jax.numpy as jnp, fastseg as fs, fastseg.jax
    >>> ones = jnp.ones((1, 1, 4))
    >>> value, grad = fastseg.jax.value_and_grad(fs.BCE(), 0 * ones, ones)
    >>> round(float(value), 5), float(grad[0, 0, 0])
    (0.69315, -0.125)
    """
    checked_loss(loss)
    given = {"logits": logits, "targets": targets, "mask": mask, "weight_map": weight_map}
    arrays = {name: array for name, array in given.items() if array is not None}
    devices = set()
    for name, array in arrays.items():
        if isinstance(array, jax.core.Tracer):
            raise TypeError(
                f"{name} is traced by a transformation of JAX, got {type(array).__name__}; use "
                "fastseg.jax.Loss there"
            )
        if not isinstance(array, jax.Array):
            raise TypeError(f"{name} must be a JAX array, got {type(array).__name__}")
        devices |= _devices(array)
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise TypeError(f"arrays must be on one device, got {names}")
    (device,) = devices
    read = np.asarray if device.platform == "cpu" else _cupy().from_dlpack
    views = {name: read(array) for name, array in arrays.items()}
    out = _aligned(views["logits"]) if read is np.asarray else None
    value, grad = loss.value_and_grad(**views, grad_scale=grad_scale, out=out)
    if out is None:
        _cupy().cuda.get_current_stream().synchronize()  # JAX may free what it reads
        return jax.dlpack.from_dlpack(value), jax.dlpack.from_dlpack(grad)
    return jax.device_put(value, device), jax.device_put(grad, device, may_alias=True)


def _devices(array: jax.Array) -> set[Any]:
    return array.devices()


def _cupy() -> Any:
    from fastseg_kernels.cuda.installation import cupy_module

    return cupy_module()


def _aligned(like: Any) -> Any:
    """Return an empty array of NumPy's that JAX can take over as it is."""
    memory = np.empty(like.nbytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + like.nbytes].view(like.dtype).reshape(like.shape)


@lru_cache(maxsize=MOST_LOSSES)
def _differentiable(loss: _Loss) -> Any:
    """Return a loss as a function that JAX knows how to differentiate.

    It is made once: JAX traces anew for a function that it has not seen.
    """
    verb, like = (_value_and_grad, _grad_like) if loss._sorting else (_evaluate, _sums_like)

    @jax.custom_vjp
    def value(logits: jax.Array, others: _Others) -> jax.Array:
        return call(_value, loss, (_value_like(loss, logits),), logits, others)[0]

    def forward(logits: Any, others: Any) -> tuple[Any, Any]:
        for name, primal in zip(("targets", "mask", "weight_map"), others, strict=True):
            if primal is not None and primal.perturbed:
                raise TypeError(
                    f"{name} must not be differentiated; pass jax.lax.stop_gradient({name})"
                )
        logits, others = jax.tree.map(
            lambda primal: primal.value, (logits, others), is_leaf=lambda p: hasattr(p, "perturbed")
        )
        shapes = _value_like(loss, logits), like(loss, logits)
        number, kept = call(verb, loss, shapes, logits, others)
        return number, (logits, others, kept)

    def backward(held: Any, upstream: Any) -> tuple[Any, None]:
        logits, others, kept = held
        if loss._sorting:
            scale = loss.options.beside_voxels(upstream, kept.ndim)
            return (kept * scale).astype(logits.dtype), None
        shapes = (_Like(logits.shape, logits.dtype),)
        return call(_gradient, loss, shapes, logits, others, kept, upstream)[0], None

    value.defvjp(forward, backward, symbolic_zeros=True)
    return value


# What the results are like


def _real(loss: _Loss, logits: Any) -> Any:
    return dtypes.canonicalize_dtype(np.dtype(loss.options.real_of(logits.dtype.name)))


def _value_like(loss: _Loss, logits: Any) -> Any:
    shape = loss.options.rows_of(logits.shape) if loss.options.reduction == "none" else ()
    return _Like(shape, _real(loss, logits))


def _grad_like(loss: _Loss, logits: Any) -> Any:
    return _Like(logits.shape, _real(loss, logits))


def _sums_like(loss: _Loss, logits: Any) -> Any:
    """Return the shape of the sums: two uint32 for each float64, which JAX may not have."""
    names = columns(loss.families())
    return _Like((*loss.options.rows_of(logits.shape), 2 * len(names)), np.dtype(np.uint32))


# What XLA calls: NumPy arrays in, and those that are to be written


def _named(others: Any) -> tuple[Any, dict[str, Any]]:
    targets, mask, weight_map = others
    return targets, {"mask": mask, "weight_map": weight_map}


def _value(loss: _Loss, logits: Any, others: Any, *, out: Any) -> None:
    targets, options = _named(others)
    out[0][...] = loss(logits, targets, **options)


def _evaluate(loss: _Loss, logits: Any, others: Any, *, out: Any) -> None:
    targets, options = _named(others)
    s = loss.statistics(logits, targets, **options)
    out[0][...] = loss.value(s)
    out[1][...] = np.ascontiguousarray(s.array).view(np.uint32)


def _value_and_grad(loss: _Loss, logits: Any, others: Any, *, out: Any) -> None:
    targets, options = _named(others)
    out[0][...] = loss.value_and_grad(logits, targets, out=out[1], **options)[0]


def _gradient(loss: _Loss, logits: Any, others: Any, sums: Any, upstream: Any, *, out: Any) -> None:
    targets, options = _named(others)
    array = np.ascontiguousarray(sums).view(np.float64)
    s = Statistics._made(array, columns(loss.families()), cpu(), None)
    scale = np.asarray(upstream, np.float64)
    number = float(scale) if scale.ndim == 0 else scale
    loss.gradient(logits, targets, s, grad_scale=number, out=out[0], **options)

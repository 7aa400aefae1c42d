"""The verbs as operators of PyTorch, which autograd and torch.compile know.

    fastseg::statistics(logits, targets, ...) -> sums        one read
    fastseg::value(logits, targets, ..., sums) -> value      reads no voxel; differentiable
    fastseg::gradient(logits, targets, ..., sums, upstream) -> dL/dlogits

`fastseg::evaluate` is the first two, where nothing comes between them: a call of an operator costs
more than all else around the kernels. A loss that sorts has no sums that are enough: there is
`fastseg::sort`, whose gradient is known with its value, and `fastseg::scale`. Operators take
tensors, numbers and text: a loss is named by its formula.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fastseg.dispatch import Backend, backend_of
from fastseg.libraries import library_of
from fastseg.losses import Loss
from fastseg.statistics import Statistics
from fastseg_kernels.constants import columns

_losses: dict[str, Loss] = {}


def name_of(loss: Loss) -> str:
    """Return the name by which operators know a loss: its formula, and a number if it needs one."""
    known: str | None = loss.__dict__.get("_operator_name")
    if known is not None:
        return known
    formula = name = repr(loss)
    number = 1
    while _losses.setdefault(name, loss) != loss:  # of another class with the same name
        number += 1
        name = f"{formula} ({number})"
    loss.__dict__["_operator_name"] = name
    return name


def families_of(name: str, track: str) -> frozenset[str]:
    """Return the families of sums of a named loss, and of a list of others."""
    return _losses[name].families(tuple(track.split()))


def statistics_of(sums: torch.Tensor, name: str, track: str) -> Statistics:
    """Wrap sums that an operator made."""
    array: Any = sums.numpy() if sums.is_cpu else sums
    return Statistics._made(array, columns(families_of(name, track)), _backend(sums), None)


def _backend(tensor: torch.Tensor) -> Backend:
    return backend_of(library_of(tensor, "logits"), tensor)


def _real(loss: Loss, logits: torch.Tensor) -> torch.dtype:
    """Return the dtype in which a loss of these logits is computed."""
    kind: torch.dtype = getattr(torch, loss.options.real_of(_name_of_dtype(logits.dtype)))
    return kind


def _name_of_dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _like_value(loss: Loss, logits: torch.Tensor) -> torch.Tensor:
    """Return an empty value, () or (N, C)."""
    none = loss.options.reduction == "none"
    shape = loss.options.rows_of(logits.shape) if none else ()
    return logits.new_empty(shape, dtype=_real(loss, logits))


def _tensor(array: Any) -> torch.Tensor:
    made: torch.Tensor = torch.from_numpy(array) if isinstance(array, np.ndarray) else array
    return made


_ARRAYS = "Tensor targets, Tensor? mask, Tensor? weight_map"
_READ = f"Tensor logits, {_ARRAYS}, str loss, str track"


@torch.library.custom_op("fastseg::statistics", mutates_args=(), schema=f"({_READ}) -> Tensor")
def statistics(*arguments: Any) -> torch.Tensor:
    """Return the sums of every row, float64 (N, C, K)."""
    return _statistics(*arguments)


def _statistics(
    logits: torch.Tensor, targets: Any, mask: Any, weight_map: Any, loss: str, track: str
) -> torch.Tensor:
    known, families = _losses[loss], families_of(loss, track)
    library, problem = known._problem(logits.detach(), targets, mask, weight_map, families)
    return _tensor(known._sums(backend_of(library, logits), problem, families))


@statistics.register_fake
def _like_sums(
    logits: torch.Tensor, targets: Any, mask: Any, weight_map: Any, loss: str, track: str
) -> torch.Tensor:
    rows = _losses[loss].options.rows_of(logits.shape)
    shape = (*rows, len(columns(families_of(loss, track))))
    return logits.new_empty(shape, dtype=torch.float64)


@torch.library.custom_op("fastseg::value", mutates_args=())
def value(
    logits: torch.Tensor,
    targets: torch.Tensor,
    mask: torch.Tensor | None,
    weight_map: torch.Tensor | None,
    sums: torch.Tensor,
    loss: str,
    track: str,
    first: int,
    factor: float,
    overwrite: bool,
) -> torch.Tensor:
    """Return the loss of the sums. ``first``: the row of ``sums`` that these logits begin at.

    ``factor`` is multiplied into the gradient alone; ``overwrite`` puts that into the logits.
    """
    return _value(logits, sums, loss, track)


def _value(logits: torch.Tensor, sums: torch.Tensor, loss: str, track: str) -> torch.Tensor:
    known = _losses[loss]
    dtype = _real(known, logits)
    s = statistics_of(sums, loss, track)
    number = known._value_of(s, _name_of_dtype(dtype))
    return torch.as_tensor(number, dtype=dtype, device=logits.device)


@value.register_fake
def _(logits: Any, targets: Any, mask: Any, weight_map: Any, sums: Any, loss: str, *_: Any) -> Any:
    return _like_value(_losses[loss], logits)


@torch.library.custom_op(
    "fastseg::evaluate", mutates_args=(), schema=f"({_READ}, bool overwrite) -> (Tensor, Tensor)"
)
def evaluate(logits: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return value and sums; ``overwrite`` as in `value`."""
    sums = _statistics(logits, *arguments[:-1])
    return _value(logits, sums, *arguments[3:5]), sums


@evaluate.register_fake
def _(logits: torch.Tensor, *arguments: Any) -> Any:
    return _like_value(_losses[arguments[3]], logits), _like_sums(logits, *arguments[:-1])


_GRADIENT = (
    f"logits, {_ARRAYS}, Tensor sums, Tensor upstream, str loss, str track, int first, "
    "float factor)"
)


@torch.library.custom_op(
    "fastseg::gradient", mutates_args=(), schema=f"(Tensor {_GRADIENT} -> Tensor"
)
def gradient(*arguments: Any) -> torch.Tensor:
    """Return dL/dlogits, where L is the loss of the sums, times what comes from above."""
    return _gradient(None, *arguments)


@torch.library.custom_op(
    "fastseg::gradient_", mutates_args=("logits",), schema=f"(Tensor(a!) {_GRADIENT} -> ()"
)
def gradient_(*arguments: Any) -> None:
    """As `gradient`, written over the logits."""
    _gradient(arguments[0], *arguments)


def _gradient(
    out: torch.Tensor | None,
    logits: torch.Tensor,
    targets: torch.Tensor,
    mask: torch.Tensor | None,
    weight_map: torch.Tensor | None,
    sums: torch.Tensor,
    upstream: torch.Tensor,
    loss: str,
    track: str,
    first: int,
    factor: float,
) -> torch.Tensor:
    known, s = _losses[loss], statistics_of(sums, loss, track)
    count = known.options.rows_of(logits.shape)[0]
    scale = upstream.detach() if factor == 1.0 else upstream.detach() * factor
    grad: torch.Tensor = known.gradient(
        logits.detach(),
        targets,
        s,
        mask=mask,
        weight_map=weight_map,
        rows=slice(first, first + count),
        out=None if out is None else out.detach(),
        grad_scale=scale,
    )
    return grad


@gradient.register_fake
def _(logits: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(logits)


@torch.library.custom_op(
    "fastseg::sort", mutates_args=(), schema=f"({_READ}) -> (Tensor, Tensor, Tensor)"
)
def sort(
    logits: torch.Tensor, targets: Any, mask: Any, weight_map: Any, loss: str, track: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return value, gradient and sums of a loss that sorts; the gradient in what it computes in.

    It is yet to be scaled, and rounded to the logits' dtype.
    """
    known, x = _losses[loss], logits.detach()
    out = torch.empty_like(x, dtype=_real(known, logits))
    number, grad, made = known._run(x, targets, mask, weight_map, tuple(track.split()), out, 1.0)
    return number, grad, _tensor(made[0])


@sort.register_fake
def _(logits: torch.Tensor, *arguments: Any) -> Any:
    known = _losses[arguments[3]]
    grad = torch.empty_like(logits, dtype=_real(known, logits))
    return _like_value(known, logits), grad, _like_sums(logits, *arguments)


def scaled(
    grad: torch.Tensor, upstream: torch.Tensor, loss: Loss, dtype: torch.dtype
) -> torch.Tensor:
    """Multiply a gradient by what comes from above, () or (N, C), and round it."""
    made: torch.Tensor = grad * loss.options.beside_voxels(upstream, grad.ndim)
    return made.to(dtype)


@torch.library.custom_op("fastseg::scale", mutates_args=())
def scale(
    logits: torch.Tensor, grad: torch.Tensor, upstream: torch.Tensor, loss: str
) -> torch.Tensor:
    """Return the gradient of the logits from that of `sort`."""
    return scaled(grad, upstream, _losses[loss], logits.dtype)


@scale.register_fake
def _(logits: torch.Tensor, grad: torch.Tensor, upstream: torch.Tensor, loss: str) -> torch.Tensor:
    return scaled(grad, upstream, _losses[loss], logits.dtype)


# Autograd


def _save_value(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:5])
    *ctx.rest, ctx.overwrite = inputs[5:]


def _backward_of_value(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    # While a graph is made or compiled the logits stay: the gradient's values are the same.
    if ctx.overwrite and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        logits = ctx.saved_tensors[0]
        gradient_(*ctx.saved_tensors, upstream, *ctx.rest)
        return logits.detach(), *(None,) * 9
    return gradient(*ctx.saved_tensors, upstream, *ctx.rest), *(None,) * 9


def _save_evaluate(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:4], output[1])
    loss, track, ctx.overwrite = inputs[4:]
    ctx.rest = [loss, track, 0, 1.0]
    ctx.set_materialize_grads(False)


def _backward_of_evaluate(ctx: Any, upstream: torch.Tensor | None, _: Any) -> tuple[Any, ...]:
    return (None,) * 7 if upstream is None else _backward_of_value(ctx, upstream)[:7]


def _save_sort(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[0], output[1])
    ctx.loss = inputs[4]
    ctx.set_materialize_grads(False)


def _backward_of_sort(ctx: Any, upstream: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    return scale(*ctx.saved_tensors, upstream, ctx.loss), *(None,) * 5


def _refuse(ctx: Any, *upstream: Any) -> Any:
    raise RuntimeError("fastseg losses can be differentiated once, not twice")


value.register_autograd(_backward_of_value, setup_context=_save_value)
evaluate.register_autograd(_backward_of_evaluate, setup_context=_save_evaluate)
sort.register_autograd(_backward_of_sort, setup_context=_save_sort)
gradient.register_autograd(_refuse)
scale.register_autograd(_refuse)

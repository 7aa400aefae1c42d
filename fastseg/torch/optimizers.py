"""Optimisers of PyTorch whose step is fastseg's: its groups, states, hooks and checkpoints.

Each class is a subclass of the one of torch.optim that it stands for. What a step does to the
arrays is `fastseg.updater`; which parameters share it, `buckets`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import hypot, inf
from typing import Any, ClassVar, NamedTuple

import torch

from fastseg.dispatch import UpdateTable
from fastseg.parameters import check_state_dtype, checked_max_norm
from fastseg.torch.buckets import Bucket, Buckets
from fastseg.updater import MovedError
from fastseg_kernels import updates
from fastseg_kernels.updates import Guard, Rule

OPTIONS = ("max_norm", "skip_non_finite", "zero_grads", "state_dtype")


class _Part(NamedTuple):
    """A bucket whose arrays were checked for a step."""

    bucket: Bucket
    table: UpdateTable
    grads: list[torch.Tensor]
    replaced: list[torch.Tensor]  # gradients in whose place copies are
    rule: Rule
    lr: Any
    sign: float


class _Step:
    """What replaces the step of torch.optim's classes.

    Subclasses say how a group's hyper-parameters are a rule, and what its states are called.
    """

    _step_supports_amp_scaling = True  # as a class attribute: GradScaler asks for it

    param_groups: list[dict[str, Any]]
    state: Any
    grad_norm: torch.Tensor | None = None
    """Norm of the gradients of the last step, before it was clipped, if the step needed it."""

    def __init__(
        self,
        *arguments: Any,
        max_norm: float | None = None,
        skip_non_finite: bool = False,
        zero_grads: bool = False,
        state_dtype: str | None = None,
        **options: Any,
    ) -> None:
        check_state_dtype(state_dtype)
        if max_norm is not None:
            checked_max_norm(max_norm)
        self.max_norm, self.skip_non_finite = max_norm, skip_non_finite
        self.zero_grads, self.state_dtype = zero_grads, state_dtype
        self._forget()
        super().__init__(*arguments, **options)

    def _forget(self) -> None:
        """Forget what is derived from the groups and states."""
        self._buckets = Buckets(self._steps_taken)
        if _Step._update is None:  # Dynamo would look into it, and breaks its graph here instead
            outside: Any = torch.compiler.disable
            _Step._update = outside(_Step._update_all)

    _update: ClassVar[Any] = None

    def __getstate__(self) -> dict[str, Any]:
        state: Any = super().__getstate__()
        return {**state, **{name: getattr(self, name) for name in OPTIONS}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._forget()
        super().__setstate__(state)  # type: ignore[misc]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step; ``closure`` computes the loss anew, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update()
        return loss

    @torch.no_grad()
    def _update_all(self) -> None:
        parts = []  # everything is checked before anything is written
        for index, group in enumerate(self.param_groups):
            parts += self._checked(index, group)
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        scale, norm = 1.0 if scale is None else _reciprocal(scale), None
        self.grad_norm = None
        if parts and (self.max_norm is not None or self.skip_non_finite):
            norm = _combined([part.table.norm() for part in parts])
            self.grad_norm = _scaled(norm, scale)
        may_be_dropped = found_inf is not None or self.skip_non_finite
        for part in parts:
            bucket, number = part.bucket, part.bucket.updater.number
            device = bucket.steps.device
            guard = Guard(
                None if norm is None else number("norm", _to(norm, device), finite=False),
                inf if self.max_norm is None else float(self.max_norm),
                self.skip_non_finite,
                number(
                    "found_inf", 0.0 if found_inf is None else _to(found_inf, device), finite=False
                ),
            )
            scaled = number("grad_scale", _to(scale * part.sign, device), finite=False)
            taken = bucket.updater.step(
                part.table,
                part.grads,
                part.rule,
                bucket.counter,
                part.lr,
                scaled,
                self.zero_grads,
                guard,
            )
            bucket.count(taken, may_be_dropped or bucket.updater.backend.is_recording())
            if self.zero_grads:
                for grad in part.replaced:
                    grad.zero_()

    def _checked(self, index: int, group: dict[str, Any]) -> list[_Part]:
        """Return the buckets of the parameters of a group that have a gradient, checked."""
        if group.get("differentiable"):
            raise ValueError(
                "differentiable must be False: fastseg's step is no operation that autograd follows"
            )
        params = [param for param in group["params"] if param.grad is not None]
        rule, lr = self._rule_of(group), _on_host(group["lr"])
        sign = -1.0 if group["maximize"] else 1.0
        found = index, params, self._names(group), self.state, self.state_dtype
        while True:
            parts: list[_Part] = []
            for bucket in self._buckets.of_group(*found):
                grads = [param.grad for param in bucket.params]
                replaced: list[torch.Tensor] = []
                prepare = partial(_lay_as, bucket.params, grads, replaced)
                try:
                    table = bucket.updater.point_table(grads, self.zero_grads, prepare)
                except MovedError:  # to another device, dtype or memory format
                    self._buckets.forget(bucket)
                    break
                except (TypeError, ValueError) as error:
                    error.add_note(
                        f"(params[i] and grads[i] count the parameters of group {index} that have "
                        "a gradient and took as many steps)"
                    )
                    raise
                number = bucket.updater.number("lr", lr, at_least=0)
                parts.append(_Part(bucket, table, grads, replaced, rule, number, sign))
            else:
                return parts

    def state_dict(self) -> dict[str, Any]:
        """Return the groups and states, as torch.optim's optimiser has them.

        A parameter of 2 bytes has a float32 ``master_param`` beside them, and float32 states.
        """
        packed: dict[str, Any] = super().state_dict()  # type: ignore[misc]
        states = {}
        for key, state in packed["state"].items():
            states[key] = dict(state)
            if "step" in state:  # of its own: torch.optim counts each up
                states[key]["step"] = state["step"].to("cpu", torch.float32, copy=True)
        return {**packed, "state": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state of this class or of torch.optim's, on any device; it is copied."""
        seen: list[dict[str, Any]] = []

        def restore(_: Any) -> None:
            """Put the states in that PyTorch has rounded to the dtype of their parameter."""
            keys = [key for group in seen[0]["param_groups"] for key in group["params"]]
            params = [param for group in self.param_groups for param in group["params"]]
            for key, param in zip(keys, params, strict=True):
                for name, value in seen[0]["state"].get(key, {}).items():
                    if isinstance(value, torch.Tensor):
                        self.state[param][name] = value.detach().clone()

        this: Any = self
        handles = [
            this.register_load_state_dict_pre_hook(lambda _, given: seen.append(given)),
            this.register_load_state_dict_post_hook(restore, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)  # type: ignore[misc]
        finally:
            for handle in handles:
                handle.remove()

    def _names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Return the names of the states of a group's parameters."""
        raise NotImplementedError

    def _rule_of(self, group: dict[str, Any]) -> Rule:
        """Return the rule with the hyper-parameters of a group."""
        raise NotImplementedError

    @staticmethod
    def _steps_taken(state: dict[str, Any]) -> int:
        """Return how many steps a parameter took, by its entry of the state."""
        return int(state.get("step", 0))


def _lay_as(
    params: Sequence[torch.Tensor], grads: list[torch.Tensor], replaced: list[torch.Tensor]
) -> None:
    """Put copies in the place of gradients that lie otherwise than their parameters."""
    for i, (grad, param) in enumerate(zip(grads, params, strict=True)):
        if grad.layout is torch.strided and grad.stride() != param.stride():
            replaced.append(grad)
            grads[i] = torch.empty_strided(
                param.shape, param.stride(), dtype=grad.dtype, device=grad.device
            ).copy_(grad)


def _on_host(number: Any) -> Any:
    """Return a tensor of the CPU as a number."""
    return number.item() if isinstance(number, torch.Tensor) and number.is_cpu else number


def _to(number: Any, device: torch.device) -> Any:
    """Return a number where a device can read it; from a GPU to the CPU it is waited for."""
    return _on_host(number.to(device)) if isinstance(number, torch.Tensor) else number


def _reciprocal(scale: Any) -> Any:
    if isinstance(scale, torch.Tensor) and not scale.is_cpu:
        return scale.double().reciprocal()
    return 1.0 / float(scale) if scale else inf


def _scaled(norm: Any, scale: Any) -> torch.Tensor:
    """Return the norm of scaled gradients as a tensor, on the device of the norm."""
    if isinstance(norm, torch.Tensor):
        made: torch.Tensor = norm * abs(_to(scale, norm.device))
        return made
    return torch.tensor(norm * abs(float(scale)), dtype=torch.float64)


def _combined(norms: list[Any]) -> Any:
    """Return the norm of arrays whose norms these are; they may be on several devices."""
    if all(isinstance(norm, float) for norm in norms):
        return hypot(*norms)
    if len(norms) == 1:
        return norms[0].reshape(())
    device = next(norm.device for norm in norms if isinstance(norm, torch.Tensor))
    there = [torch.as_tensor(norm, dtype=torch.float64).reshape(1) for norm in norms]
    return torch.linalg.vector_norm(torch.cat([norm.to(device) for norm in there]))


class _AdamStep(_Step):
    def _names(self, group: dict[str, Any]) -> tuple[str, ...]:
        moments = ("exp_avg", "exp_avg_sq")
        return (*moments, "max_exp_avg_sq") if group["amsgrad"] else moments

    def _rule_of(self, group: dict[str, Any]) -> Rule:
        decoupled = isinstance(self, torch.optim.AdamW) or group.get("decoupled_weight_decay")
        beta1, beta2 = map(float, group["betas"])
        return updates.adam(
            beta1,
            beta2,
            float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
            decoupled=bool(decoupled),
            amsgrad=group["amsgrad"],
        )


class Adam(_AdamStep, torch.optim.Adam):
    """torch.optim.Adam in one pass over memory, and one launch for the parameters of a dtype.

    (Of a group, as far as they took the same steps.) A checkpoint of one loads into the other: what
    torch.optim.Adam has no place for, the arguments below, is not in it, and where it rounds states
    to the dtype of the parameter, those of masters lose their digits. It takes the arguments of
    torch.optim.Adam, and

    Parameters
    ----------
    max_norm : float, optional
        Clip (if infinite: measure) the norm of all gradients of all groups together to it, as
        ``torch.nn.utils.clip_grad_norm_`` would, for one more reading of the gradients instead of a
        reading and a pass over them. After a step ``grad_norm`` is what the norm was: a tensor for
        which nobody has waited.
    skip_non_finite : bool
        Drop steps whose gradients are not all finite; the same reading serves both.
    zero_grads : bool
        Write zeros to the gradients in the pass that reads them; zero_grad() is not needed then.
    state_dtype : "bfloat16", optional
        Keep the moments in 2 bytes, as `fastseg.Adam` does.

    Notes
    -----
    Parameters of float16 and bfloat16 have float32 masters (``master_param`` in their state).
    GradScaler's step hands over its scale and what it found: the gradients are unscaled by the step
    itself. On a GPU nobody is waited for, and a step may be recorded into a CUDA graph (with the
    lr of then, unless that is a tensor on the GPU). ``foreach`` and ``fused`` change nothing;
    ``differentiable=True`` is refused.

    A parameter whose ``grad`` is None is left alone, its states and number of steps too. States may
    be exchanged and changed in place, as torch.optim's may; but "step" is one tensor for all the
    parameters that took as many, so exchange it.

    Examples
    --------
    >>> import torch, fastseg.torch
    >>> model = torch.nn.Linear(3, 1)
    >>> opt = fastseg.torch.Adam(model.parameters(), lr=1e-3, max_norm=1.0, zero_grads=True)
    >>> model(torch.ones(4, 3)).square().mean().backward()
    >>> opt.step()
    >>> opt.state[model.bias]["exp_avg"].shape
    torch.Size([1])
    """


class AdamW(_AdamStep, torch.optim.AdamW):
    """torch.optim.AdamW; beside its arguments those of `Adam`.

    Examples
    --------
    >>> import torch, fastseg.torch
    >>> weights = torch.nn.Parameter(torch.ones(3))
    >>> opt = fastseg.torch.AdamW([weights], lr=0.1, weight_decay=0.5)
    >>> weights.sum().backward()
    >>> opt.step()
    >>> weights.data  # 0.1 down, and by a twentieth before
    tensor([0.8500, 0.8500, 0.8500])
    """


class SGD(_Step, torch.optim.SGD):
    """torch.optim.SGD, with momentum or without; beside its arguments those of `Adam`.

    Examples
    --------
    >>> import torch, fastseg.torch
    >>> weights = torch.nn.Parameter(torch.ones(3))
    >>> opt = fastseg.torch.SGD([weights], lr=0.5, momentum=0.9)
    >>> weights.sum().backward()
    >>> opt.step()
    >>> weights.data
    tensor([0.5000, 0.5000, 0.5000])
    """

    def _names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return () if group["momentum"] == 0 else ("momentum_buffer",)

    def _rule_of(self, group: dict[str, Any]) -> Rule:
        decay = float(group["weight_decay"])
        if group["momentum"] == 0:
            return updates.gradient_descent(weight_decay=decay)
        return updates.momentum_pytorch(
            float(group["momentum"]),
            float(group["dampening"]),
            group["nesterov"],
            weight_decay=decay,
        )

    @staticmethod
    def _steps_taken(state: dict[str, Any]) -> int:
        # Without a buffer the next step is the first, of momentum; torch.optim counts none.
        began = state.get("momentum_buffer") is not None
        return int(state.get("step", 1)) if began else 0

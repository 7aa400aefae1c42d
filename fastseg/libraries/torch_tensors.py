"""PyTorch's tensors."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from fastseg.libraries.base import MOST_LAYOUTS, misaligned
from fastseg_kernels.constants import DTYPE_CODES, ITEM_SIZES
from fastseg_kernels.views import Layout, View


class Torch:
    """`torch.Tensor` on the CPU or a GPU, subclasses such as MONAI's MetaTensor included."""

    name, allocator = "torch", "torch"
    counts_writes = True

    def __init__(self) -> None:
        self._torch = sys.modules["torch"]
        names = {
            getattr(self._torch, name): name for name in DTYPE_CODES if hasattr(self._torch, name)
        }
        self._dtypes: dict[Any, str] = names
        self._layouts: dict[Any, Layout] = {}
        self._strided = self._torch.strided
        self._count = self._torch.autograd.graph.increment_version
        try:
            self._count([])
            self._counts_lists = True  # in one call, 0.3 instead of 1 us each
        except TypeError:
            self._counts_lists = False

    def view(self, array: Any, name: str, *, writable: bool = False) -> View:
        """Describe a tensor; one that requires grad is refused, not detached in silence."""
        torch = self._torch
        if type(array) is not torch.Tensor and hasattr(array, "to_local"):
            raise TypeError(f"{name} is a DTensor; pass its local part, {name}.to_local()")
        self.device(array, name)
        if array.requires_grad and torch.is_grad_enabled():
            raise TypeError(
                f"{name} requires grad: use fastseg.torch.Loss(loss), which autograd follows, or "
                f"pass {name}.detach()"
            )
        if array.layout is not self._strided:
            raise TypeError(f"{name} must be a dense tensor, got layout {array.layout}")
        if array.is_neg() or array.is_conj():
            if writable:
                raise ValueError(
                    f"{name} must hold its own values, got a negated or conjugated view, which "
                    "cannot be written in place"
                )
            array = array.resolve_conj().resolve_neg()
        address = array.data_ptr()
        key = array.dtype, array.shape, array.stride()
        layout = self._layouts.get(key) or self._new_layout(key, name)
        if address == 0 and 0 not in layout.shape:
            raise TypeError(
                f"{name} has no memory to be read, got a {type(array).__name__} whose storage is "
                "elsewhere or was freed"
            )
        if address & 7 and address % ITEM_SIZES[layout.dtype] and array.is_cuda:
            raise misaligned(name, ITEM_SIZES[layout.dtype])
        return View(address, layout, array)

    def _new_layout(self, key: tuple[Any, ...], name: str) -> Layout:
        """Make the layout of a tensor by dtype, shape and strides, and remember it."""
        dtype, shape, strides = key
        kind = self._dtypes.get(dtype)
        if kind is None:
            raise TypeError(
                f"{name} must have one of the dtypes {', '.join(self._dtypes.values())}, "
                f"got {dtype}"
            )
        if len(self._layouts) >= MOST_LAYOUTS:
            self._layouts.clear()
        size = ITEM_SIZES[kind]
        layout = Layout(tuple(shape), tuple([step * size for step in strides]), kind)
        return self._layouts.setdefault(key, layout)

    def empty_like(self, array: Any) -> Any:
        """Allocate a plain tensor in the same memory format."""
        plain = (
            array.as_subclass(self._torch.Tensor)
            if type(array) is not self._torch.Tensor
            else array
        )
        return self._torch.empty_like(plain.detach())

    def array(self, values: Any, dtype: str, like: Any) -> Any:
        """Convert; a scalar becomes a 0-d tensor."""
        dtype = getattr(self._torch, dtype)
        return self._torch.as_tensor(values, dtype=dtype, device=like.device)

    def device(self, array: Any, name: str = "array") -> str:
        """Return "cpu" or "cuda:0"; other devices have no backend."""
        if array.is_cpu:
            return "cpu"
        device = array.device
        if device.type != "cuda" or self._torch.version.hip:
            kind = "an AMD GPU" if device.type == "cuda" else device
            raise TypeError(
                f"{name} is on {kind}: fastseg computes on the CPU and on NVIDIA GPUs; pass "
                f"{name}.cpu()"
            )
        return f"cuda:{device.index}"

    def written(self, arrays: Sequence[Any]) -> None:
        """Bump the version counters, by which autograd notices that a saved tensor changed."""
        if self._counts_lists:
            self._count(arrays)
        else:
            for array in arrays:
                self._count(array)

    def used(self, arrays: Iterable[Any]) -> None:
        """Do nothing: tensors are used on PyTorch's current stream."""

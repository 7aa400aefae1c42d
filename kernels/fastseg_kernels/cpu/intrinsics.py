"""The few operations that Numba's Python subset cannot say, as LLVM instructions.

Each takes exactly the types that it names and nothing else: integer arithmetic in Numba widens
int32 to int64 without a word, and a bit pattern of the wrong width must not compile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
from llvmlite import ir
from numba import extending
from numba.core.errors import TypingError

# Untyped, or a type checker would take what is called inside a kernel for what is declared here.
intrinsic: Any = extending.intrinsic
_numba: Any = numba
carray, types = _numba.carray, _numba.types

BITS_TYPE = {types.float32: types.int32, types.float64: types.int64}
FLOAT_TYPE = {integer: real for real, integer in BITS_TYPE.items()}


def _require(condition: bool, name: str, got: object) -> None:
    if not condition:
        raise TypingError(f"{name} got {got}")


@intrinsic  # type: ignore[untyped-decorator]
def fma(typing_context: Any, a: Any, b: Any, c: Any) -> tuple[Any, Callable[..., Any]]:
    """Return ``a * b + c``, rounded once (one instruction where the CPU has it)."""
    _require(a in BITS_TYPE and a == b == c, "fma takes three floats of one type,", (a, b, c))

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fma(*args)

    return a(a, a, a), codegen


@intrinsic  # type: ignore[untyped-decorator]
def bits_of(typing_context: Any, x: Any) -> tuple[Any, Callable[..., Any]]:
    """Return the bits of a float as the signed integer of the same width."""
    _require(x in BITS_TYPE, "bits_of takes float32 or float64,", x)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(signature.return_type))

    return BITS_TYPE[x](x), codegen


@intrinsic  # type: ignore[untyped-decorator]
def has_sign(typing_context: Any, x: Any) -> tuple[Any, Callable[..., Any]]:
    """Tell whether the sign bit of a float is set, that of -0.0 and of NaN included."""
    _require(x in BITS_TYPE, "has_sign takes float32 or float64,", x)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = builder.bitcast(args[0], context.get_value_type(BITS_TYPE[x]))
        return builder.icmp_signed("<", bits, ir.Constant(bits.type, 0))

    return types.boolean(x), codegen


@intrinsic  # type: ignore[untyped-decorator]
def from_bits(typing_context: Any, x: Any) -> tuple[Any, Callable[..., Any]]:
    """Return the float whose bits are the signed integer ``x``: the inverse of `bits_of`."""
    _require(x in FLOAT_TYPE, "from_bits takes int32 or int64,", x)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(signature.return_type))

    return FLOAT_TYPE[x](x), codegen


@intrinsic  # type: ignore[untyped-decorator]
def widen_half_bits(typing_context: Any, bits: Any) -> tuple[Any, Callable[..., Any]]:
    """Return the float32 whose float16 has these bits: one instruction, of CPUs with F16C alone."""
    _require(bits == types.uint16, "widen_half_bits takes uint16,", bits)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(bits), codegen


@intrinsic  # type: ignore[untyped-decorator]
def round_to_half_bits(typing_context: Any, x: Any) -> tuple[Any, Callable[..., Any]]:
    """Return the bits of a float32 rounded to float16: as `widen_half_bits`."""
    _require(x == types.float32, "round_to_half_bits takes float32,", x)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(x), codegen


@intrinsic  # type: ignore[untyped-decorator]
def select(typing_context: Any, condition: Any, a: Any, b: Any) -> tuple[Any, Callable[..., Any]]:
    """Return ``a if condition else b`` without a branch.

    LLVM takes ``x[i] = a if condition else x[i]`` for a store under a condition, of which it makes
    shorter vectors or none.
    """
    _require(condition == types.boolean and a == b, "select takes two of one type,", (a, b))

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(*args)

    return a(condition, a, b), codegen


@intrinsic  # type: ignore[untyped-decorator]
def is_same(typing_context: Any, a: Any, b: Any) -> tuple[Any, Callable[..., Any]]:
    """Return ``a == b`` for integers of one type, compared in that type.

    Numba compares int32 in 64 bits, by which LLVM then halves the vectors of the loop.
    """
    _require(isinstance(a, types.Integer) and a == b, "is_same takes integers of one type,", (a, b))

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.icmp_signed("==", *args)

    return types.boolean(a, b), codegen


@intrinsic  # type: ignore[untyped-decorator]
def is_inside(typing_context: Any, a: Any, end: Any) -> tuple[Any, Callable[..., Any]]:
    """Return ``0 <= a < end`` for integers of one type (``end`` not negative); as `is_same`."""
    _require(
        isinstance(a, types.Integer) and a == end, "is_inside takes integers of one type,", (a, end)
    )

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.icmp_unsigned("<", *args)

    return types.boolean(a, end), codegen


@intrinsic  # type: ignore[untyped-decorator]
def scrambled(typing_context: Any, start: Any, i: Any) -> tuple[Any, Callable[..., Any]]:
    """Return a hash of ``start + i`` in 32 bits, each of which depends on all of these.

    That of C. Wellons, "Prospecting for hash functions", 2018. Numba would compute it in 64 bits,
    which costs three times as much on half as many numbers.
    """
    integers = isinstance(i, types.Integer) and start == types.uint32
    _require(integers, "scrambled takes uint32 and an index,", (start, i))

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(32)
        number = builder.add(args[0], builder.trunc(args[1], word))
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            number = builder.xor(number, builder.lshr(number, word(shift)))
            number = builder.mul(number, word(factor))
        return builder.xor(number, builder.lshr(number, word(16)))

    return start(start, types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def pointer_to(typing_context: Any, address: Any, dtype: Any) -> tuple[Any, Callable[..., Any]]:
    """Return ``address`` (an integer) as a pointer to elements of the NumPy type ``dtype``.

    Indexing a pointer neither checks bounds nor wraps negative indices, which is what lets the
    loops vectorise; every caller states why its indices are inside.
    """
    _require(isinstance(address, types.Integer), "pointer_to takes an integer address,", address)
    element = dtype.dtype if isinstance(dtype, types.DType) else dtype.instance_type
    pointer = types.CPointer(element)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return pointer(address, dtype), codegen


@intrinsic  # type: ignore[untyped-decorator]
def address_of(typing_context: Any, pointer: Any) -> tuple[Any, Callable[..., Any]]:
    """Return a pointer as an integer: the inverse of `pointer_to`."""
    _require(isinstance(pointer, types.CPointer), "address_of takes a pointer,", pointer)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ptrtoint(args[0], context.get_value_type(signature.return_type))

    return types.int64(pointer), codegen


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def stack_array(typing_context: Any, length: Any, dtype: Any) -> tuple[Any, Callable[..., Any]]:
    """Return a pointer to ``length`` elements on the stack, aligned to 64 bytes, not initialised.

    LLVM knows that nothing else points there, so stores to it never keep a loop from vectorising.
    """
    _require(isinstance(length, types.IntegerLiteral), "stack_array takes a constant,", length)
    count = length.literal_value
    kind = dtype.dtype if isinstance(dtype, types.DType) else dtype.instance_type
    pointer = types.CPointer(kind)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        element = context.get_data_type(kind)
        with builder.goto_entry_block():
            storage = builder.alloca(ir.ArrayType(element, count))
            storage.align = 64
        return builder.bitcast(storage, element.as_pointer())

    return pointer(length, dtype), codegen


@intrinsic  # type: ignore[untyped-decorator]
def wide_vectors(typing_context: Any) -> tuple[Any, Callable[..., Any]]:
    """Ask for 512-bit vectors in the calling function, where the CPU has them.

    LLVM prefers 256 bits on these CPUs; in these loops 512 are 1.3 to 1.5 times as fast. The
    attribute belongs to one function, so neither the environment nor other people's Numba code is
    touched. Where llvmlite changes its attribute set, the loops fall back to what LLVM prefers.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        attributes = builder.function.attributes
        if isinstance(attributes, set):  # llvmlite's own add() refuses what it does not list
            set.add(attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic  # type: ignore[untyped-decorator]
def prefetch(typing_context: Any, address: Any) -> tuple[Any, Callable[..., Any]]:
    """Ask for the cache line at an address, which may be anywhere: nothing is read."""
    _require(isinstance(address, types.Integer), "prefetch takes an integer address,", address)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        function = builder.module.declare_intrinsic("llvm.prefetch", (byte,), kind)
        to_read, into_all_caches, data = number(0), number(3), number(1)
        line = builder.inttoptr(args[0], byte)
        builder.call(function, (line, to_read, into_all_caches, data))
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def add_atomically(typing_context: Any, address: Any, value: Any) -> tuple[Any, Callable[..., Any]]:
    """Add to the int64 at ``address``, to which other threads may add; return what it was."""
    integers = all(isinstance(x, types.Integer) for x in (address, value))
    _require(integers, "add_atomically takes two integers,", (address, value))

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, args[1], "monotonic")

    return types.int64(types.int64, types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def call_kernel(
    typing_context: Any, address: Any, job: Any, first: Any, last: Any
) -> tuple[Any, Callable[..., Any]]:
    """Call the compiled kernel at ``address`` as ``void kernel(job, first, last)``."""
    integers = all(isinstance(x, types.Integer) for x in (address, job, first, last))
    _require(integers, "call_kernel takes four integers,", (address, job, first, last))

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(64)
        kernel = ir.FunctionType(ir.VoidType(), [word, word, word])
        function = builder.inttoptr(args[0], kernel.as_pointer())
        builder.call(function, args[1:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), codegen

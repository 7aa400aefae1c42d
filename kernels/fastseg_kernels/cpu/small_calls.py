"""Small volumes: all steps of a call in one compiled call, as starting three takes longer.

The kernels are those of large volumes, run one after the other on this thread, so the bits are too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from struct import Struct
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastseg_kernels.constants import columns, histograms
from fastseg_kernels.cpu.compiled import Kernel
from fastseg_kernels.cpu.evaluation import Table, evaluation_kernel
from fastseg_kernels.cpu.intrinsics import call_kernel, carray, pointer_to
from fastseg_kernels.cpu.jobs import JOB
from fastseg_kernels.cpu.memory import own_address
from fastseg_kernels.cpu.overlap import INVALID_COLUMN
from fastseg_kernels.cpu.passes import call_of_gradient, call_of_statistics, keeps
from fastseg_kernels.cpu.plans import plan_of
from fastseg_kernels.cpu.term_rows import EVALUATION
from fastseg_kernels.problem import Problem
from fastseg_kernels.views import View

WHOLE = np.dtype(
    [
        ("logits", np.int64),  # addresses of the arrays of a call
        ("targets", np.int64),
        ("mask", np.int64),
        ("weights", np.int64),
        ("out", np.int64),
        ("factor", np.float64),  # of the gradient
        ("invalid", np.int64),  # answer: 1 if something is, and then there is no gradient
        ("value", np.float64),  # answer: the first of the values
        ("tasks", np.int64),
        ("rows", np.int64),
        ("columns", np.int64),
        ("sums", np.int64),  # address of float64 (rows, columns)
        ("scale", np.int64),  # address of float64 (rows,)
        ("values", np.int64),  # address of what an evaluation gives
        ("statistics", np.int64),  # addresses of kernels, and of their records
        ("statistics_job", np.int64),
        ("evaluation", np.int64),
        ("gradient", np.int64),
        ("gradient_job", np.int64),
        ("evaluate", np.int64),
    ]
)
"""What `whole_kernel` is told."""
_CALL, _ANSWER = Struct("5qd"), Struct("qd")
_WORD = 8


@cache
def whole_kernel() -> Kernel:
    """Compile ``whole(record, unused, unused)`` of a `WHOLE`: sums, value and gradient."""

    def whole(address, first, last):  # type: ignore[no-untyped-def]
        own = carray(pointer_to(address, WHOLE), 1)[0]
        sums, scale = pointer_to(own.sums, np.float64), pointer_to(own.scale, np.float64)
        for job_address in (own.statistics_job, own.gradient_job):
            job = carray(pointer_to(job_address, JOB), 1)[0]
            job.logits.address, job.targets.address = own.logits, own.targets
            job.mask.address, job.weights.address = own.mask, own.weights
            job.out.address = own.out
        call_kernel(own.statistics, own.statistics_job, 0, own.tasks)
        own.invalid = 0
        for row in range(own.rows):
            scale[row] = own.factor
            if sums[own.columns * row + INVALID_COLUMN] != 0:
                own.invalid = 1
        if own.invalid == 0:
            call_kernel(own.evaluate, own.evaluation, 0, 0)
            own.value = pointer_to(own.values, np.float64)[0]
            call_kernel(own.gradient, own.gradient_job, 0, own.tasks)

    return Kernel(whole, "whole")


class _State(NamedTuple):
    """The records and results of one call at a time."""

    buffer: memoryview  # all of it
    address: int
    sums: NDArray[np.float64]
    values: NDArray[np.float64]


class SmallCall:
    """All steps for arrays of known layouts and a known loss.

    ``kept``: whether the statistics keep something in ``out``, which may then not be the logits.
    """

    def __init__(
        self,
        problem: Problem,
        out: View,
        table: Table,
        families: frozenset[str],
        own: frozenset[str],
    ) -> None:
        plan = plan_of(problem.arrangement, out.layout)
        self.kept = keeps(problem, own, out)
        first = plan if self.kept else plan_of(problem.arrangement, None)
        self._statistics = call_of_statistics(problem.arrangement, first, families, self.kept)
        self._gradient = call_of_gradient(plan, own, self.kept)
        self._table, self._tasks, self._whole = table, plan.tasks, whole_kernel()
        self._shape = (*problem.shape[:2], len(columns(families)))
        self._free: list[_State] = []

    def _new_state(self) -> _State:
        """Lay out the records and results of a call in one piece of memory."""
        rows, width = self._shape[0] * self._shape[1], self._shape[2]
        values = rows if self._table.per_row else 1
        parts = {
            "whole": WHOLE.itemsize // _WORD,
            "statistics_job": JOB.itemsize // _WORD,
            "gradient_job": JOB.itemsize // _WORD,
            "evaluation": EVALUATION.itemsize // _WORD,
            "sums": rows * width,
            "scale": rows,
            "values": values,  # and what else an evaluation gives, in its order
            "by_term": values * self._table.number,
            "coefficients": rows * self._table.width,
        }
        words = np.zeros(sum(parts.values()), np.int64)
        pieces = dict(zip(parts, np.split(words, np.cumsum([*parts.values()])[:-1]), strict=True))
        at = {name: own_address(piece) for name, piece in pieces.items()}
        for name, call in (("statistics", self._statistics), ("gradient", self._gradient)):
            pieces[f"{name}_job"][:] = call.words
        statistics, gradient = (
            pieces[name].view(JOB)[0] for name in ("statistics_job", "gradient_job")
        )
        statistics["sums"], gradient["coefficients"] = at["sums"], at["coefficients"]
        evaluation = self._table.record(self._shape, at["sums"], at["scale"], at["values"])
        pieces["evaluation"].view(np.uint8)[:] = np.frombuffer(evaluation, np.uint8)
        record: Any = pieces["whole"].view(WHOLE)[0]
        for name in ("sums", "scale", "values", "statistics_job", "gradient_job"):
            record[name] = at[name]
        record["tasks"], record["rows"], record["columns"] = self._tasks, rows, width
        record["statistics"] = self._statistics.kernel.address
        record["gradient"] = self._gradient.kernel.address
        record["evaluate"], record["evaluation"] = evaluation_kernel().address, at["evaluation"]
        shape = self._shape[:2] if self._table.per_row else (1, 1)
        return _State(
            words.data.cast("B"),
            own_address(words),
            pieces["sums"].view(np.float64).reshape(self._shape),
            pieces["values"].view(np.float64).reshape(shape),
        )

    def __call__(
        self, addresses: Sequence[int], out: int, factor: float
    ) -> tuple[NDArray[np.float64], NDArray[np.float64] | np.float64 | None]:
        """Write the gradient to the address ``out``; return the sums and the value.

        The value is None, and there is no gradient, where the sums count something invalid.
        """
        try:  # single steps, so that threads may share a call
            state = self._free.pop()
        except IndexError:
            state = self._new_state()
        _CALL.pack_into(state.buffer, 0, *addresses, out, factor)
        self._whole.call(state.address, 0, 0)
        invalid, first = _ANSWER.unpack_from(state.buffer, _CALL.size)
        sums, value = state.sums.copy(), None
        if not invalid:
            value = state.values.copy() if self._table.per_row else np.float64(first)
        self._free.append(state)
        return sums, value


def small_call(
    problem: Problem, out: View, table: Table, families: frozenset[str], own: frozenset[str]
) -> SmallCall | None:
    """Return the way in which all steps of a small call are one, or None if this is no such call.

    ``families`` are added up, the loss is made of ``own``.
    """
    plan = plan_of(problem.arrangement, out.layout)
    if plan.share or plan.blocks > 1 or plan.tasks == 0:
        return None
    if histograms(families) or "sorted" in families:
        return None
    return SmallCall(problem, out, table, families, own)

"""The kernel of `tcompile.determinant`: matrix by matrix, the rows below a pivot are reduced by it, and the pivots multiplied. Parallel over matrices."""

from __future__ import annotations

from typing import Any

from ...compiler.dialect.determinant import NAME
from ...compiler.tvm import T, relax, tirx
from ..common.legalize import Legalizer
from .emit import tasks
from .selection import Number, dims_of, function, when


def _determinant(builder: Any, call: Any) -> Any:
    kind = call.args[0].ty
    dtype, size = str(kind.dtype), int(kind.shape[1])
    (batch, *_) = dims_of(kind, "b", "n", "m")
    known = int(batch) if isinstance(batch, tirx.IntImm) else 1
    with function() as made:
        x, result = T.arg("x", T.buffer((batch, size, size), dtype)), T.arg("result", T.buffer((batch,), dtype))
        with T.sblock("root"), tasks(batch, known * size**3) as matrix:
            work = T.alloc_buffer((size, size), dtype)
            product, best = Number(1, dtype), Number()
            with T.serial(T.int64(size)) as i, T.serial(T.int64(size)) as j:
                T.buffer_store(work, x[matrix, i, j], [i, j])
            with T.serial(T.int64(size)) as column:
                best.set(column)
                with T.serial(T.int64(size) - column) as offset:
                    row = T.bind(column + offset)
                    when(tirx.abs(work[row, column]) > tirx.abs(work[best.now, column]), lambda row=row: best.set(row))

                def exchange(column: Any = column) -> None:
                    product.set(-product.now)
                    with T.serial(T.int64(size)) as j:
                        kept = Number(work[column, j], dtype)
                        T.buffer_store(work, work[best.now, j], [column, j])
                        T.buffer_store(work, kept.now, [best.now, j])

                when(best.now != column, exchange)
                product.set(product.now * work[column, column])

                def eliminate(column: Any = column) -> None:
                    with T.serial(T.int64(size) - column - 1) as offset:
                        row = T.bind(column + 1 + offset)
                        factor = T.bind(work[row, column] / work[column, column])
                        with T.serial(T.int64(size) - column) as step:
                            j = T.bind(column + step)
                            T.buffer_store(work, work[row, j] - factor * work[column, j], [row, j])

                when(work[column, column] != tirx.const(0, dtype), eliminate)
            T.buffer_store(result, product.now, [matrix])
    return relax.call_tir(builder.add_func(made.get(), "determinant"), list(call.args), call.ty)


OWN: dict[str, Legalizer] = {NAME: _determinant}

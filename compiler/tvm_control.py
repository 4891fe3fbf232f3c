"""Branches and loops that are decided while a model runs.

A compiled function calls a driver with the name of another function of the same library, its arguments, and the weights; the driver calls that function, for a loop
again and again, without recursion. Results never share memory with the arguments, whose memory the caller may use anew.
"""

from __future__ import annotations

import ctypes
import functools
import json
import math
import signal
import threading
from collections.abc import Callable, Sequence
from typing import Any

import tvm_ffi

from .control import BRANCH, FUNCTION_PREFIX, LOOP

_running = threading.local()
_allocate = tvm_ffi.get_global_func("runtime.TVMTensorAllocWithScope")


def entry(machine: Any) -> Callable[..., Any]:
    """The machine's `main`; where the program has functions for drivers, in such a way that they find the machine."""
    main = machine["main"]
    try:
        machine[f"{FUNCTION_PREFIX}0"]
    except AttributeError:
        return main

    def run(*args: Any) -> Any:
        outer = getattr(_running, "machine", None), getattr(_running, "signals", None)
        with _Signals() as signals:
            _running.machine, _running.signals = machine, signals
            try:
                return main(*args)
            except Exception:
                if signals.raised is None:
                    raise
            finally:
                _running.machine, _running.signals = outer
        raise signals.raised

    return run


class _Signals:
    """While a model with drivers runs, signals wait for the next step of a driver: an exception that a handler raises anywhere else
    inside of a callback from compiled code, where it may be of any class, is lost or breaks the heap."""

    def __init__(self) -> None:
        self.raised: BaseException | None = None
        self._handlers: dict[int, Any] = {}
        self._waiting: list[tuple[int, Any]] = []

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():  # no other one runs handlers
            self._handlers = {number: handler for number in signal.valid_signals() if callable(handler := signal.getsignal(number))}
        try:
            for number in self._handlers:
                signal.signal(number, lambda *occurrence: self._waiting.append(occurrence))
        except BaseException:  # of a handler that was still in place
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        _install(dict(self._handlers))
        for occurrence in self._waiting:
            self._handlers[occurrence[0]](*occurrence)

    def handle(self) -> None:
        """Call the handlers of the signals that came; what they raise is raised by `run` once the model is left."""
        while self._waiting:
            occurrence = self._waiting.pop(0)
            try:
                self._handlers[occurrence[0]](*occurrence)
            except BaseException as raised:
                self.raised = raised
                raise RuntimeError("interrupted") from None


def _install(handlers: dict[int, Any]) -> None:
    """Put all handlers in place, which become none: also when one that is in place already raises in between."""
    try:
        for number in tuple(handlers):
            signal.signal(number, handlers[number])
            del handlers[number]
    except BaseException:
        _install(handlers)
        raise


@tvm_ffi.register_global_func(BRANCH)
def branch(text: str, condition: Any, *args: Any) -> list[Any]:
    """One of two functions by a flag. args: the leading `counts[0]` are for the function of a true condition, the others for the other one, the last are the weights."""
    spec, weights, args = _spec(text), args[-1], args[:-1]
    first = spec["counts"][0]
    _running.signals.handle()
    chosen, (yes, no) = _scalar(condition, ctypes.c_bool), spec["functions"]
    results = _call(spec, "If", _running.machine[yes if chosen else no], args[:first] if chosen else args[first:], weights, "")
    return _own(results, args)


@tvm_ffi.register_global_func(LOOP)
def loop(text: str, trips: Any, condition: Any, shapes: Any, *args: Any) -> list[Any]:
    """function(context..., iteration, carried...) -> (condition, carried..., collected...) while the condition holds, `trips` times at most (without end if negative).

    args: what the function takes from around it (`context` of them), the carried tensors, the weights. shapes: those of one iteration's collected tensors, one behind
    the other, which matter where there is no iteration. Returns the carried tensors, and the collected ones along a new axis 0.
    """
    spec, weights, args = _spec(text), args[-1], args[:-1]
    function = _running.machine[spec["function"]]
    limit, going = _scalar(trips, ctypes.c_int64), _scalar(condition, ctypes.c_bool)
    context, carried = args[: spec["context"]], list(args[spec["context"] :])
    columns: list[list[Any]] = [[] for _ in spec["collected"]]
    done = 0
    while going and (limit < 0 or done < limit):
        _running.signals.handle()
        step = _new((), "int64")
        ctypes.c_int64.from_address(step.data_ptr()).value = done
        again, *results = _call(spec, "Loop", function, [*context, step, *carried], weights, f", iteration {done}")
        going = _scalar(again, ctypes.c_bool)
        carried = results[: len(carried)]
        for column, value in zip(columns, results[len(carried) :], strict=True):
            column.append(value)
        done += 1
    sizes = iter(shapes)
    empty = [tuple(next(sizes) for _ in range(rank)) for rank, _ in spec["collected"]]
    collected = [_stack(spec, column, shape, dtype) for column, shape, (_, dtype) in zip(columns, empty, spec["collected"], strict=True)]
    return [*_own(carried, args), *collected]


@functools.lru_cache(maxsize=4096)
def _spec(text: str) -> dict[str, Any]:
    return json.loads(text)


def _call(spec: dict[str, Any], operator: str, function: Any, args: Sequence[Any], weights: Any, where: str) -> Sequence[Any]:
    try:
        return function(*args, weights)
    except Exception as error:
        lines = str(error).strip().splitlines()
        reason = lines[-1] if lines else type(error).__name__
        if reason.startswith("node '"):
            raise
        raise RuntimeError(f"node '{spec['node']}' ({operator}{where}): {reason}") from error


def _scalar(tensor: Any, kind: Any) -> Any:
    return kind.from_address(tensor.data_ptr()).value


def _new(shape: Sequence[int], dtype: str) -> Any:
    return _allocate(tvm_ffi.Shape(shape), tvm_ffi.dtype(dtype), tvm_ffi.device("cpu", 0), None)


def _bytes(tensor: Any) -> int:
    return math.prod(tensor.shape) * tvm_ffi.dtype(str(tensor.dtype)).itemsize


def _own(results: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """The results, those copied that lie where an argument lies."""
    taken = {arg.data_ptr() for arg in args if isinstance(arg, tvm_ffi.Tensor)}
    return [_stacked([value], value.shape) if value.data_ptr() in taken else value for value in results]


def _stack(spec: dict[str, Any], values: list[Any], shape: tuple[int, ...], dtype: str) -> Any:
    """The values along a new axis 0. shape: that of each where there is none."""
    if not values:
        return _new((0, *shape), dtype)
    shape = tuple(values[0].shape)
    if any(tuple(value.shape) != shape for value in values):
        raise RuntimeError(f"node '{spec['node']}' (Loop): what it collects changes its shape from one iteration to the next")
    return _stacked(values, (len(values), *shape))


def _stacked(values: Sequence[Any], shape: Sequence[int]) -> Any:
    result = _new(shape, str(values[0].dtype))
    size = _bytes(values[0])
    for place, value in enumerate(values):
        ctypes.memmove(result.data_ptr() + place * size, value.data_ptr(), size)
    return result

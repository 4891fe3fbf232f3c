"""TVM's thread pool, sized per calling thread.

TVM keeps one pool for every thread that calls kernels; left alone it counts half the CPUs (as if each core had two hardware threads) and pins its
workers, and the caller too, to the first ones, where the pools of two callers pile up. So each calling thread tells its pool, before the
first kernel, how many workers to use, all free to run on every CPU of the process.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

from .errors import UsageError

#: CPUs of this process, before any library narrows the affinity of a thread
CPUS = sorted(os.sched_getaffinity(0))
#: TVM's "share all CPUs" mode of placing workers
_SHARE_ALL = -3

_state = threading.local()


def physical_cores() -> int:
    """Cores among this process's CPUs, hardware threads of one core counted once."""
    cores = set()
    for cpu in CPUS:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text().strip())
        except OSError:
            cores.add(str(cpu))
    return len(cores)


def checked(threads: int | None) -> int:
    """`threads`, or the number of physical cores for None; UsageError when this process cannot run so many at once."""
    if threads is None:
        return physical_cores()
    if not isinstance(threads, int) or not 1 <= threads <= len(CPUS):
        raise UsageError(f"threads must be 1 to {len(CPUS)}, the CPUs of this process, not {threads!r}")
    return threads


def use(threads: int, configure: Callable[..., object]) -> None:
    """Let the calling thread's kernels run on `threads` workers; `configure` is TVM's `runtime.config_threadpool`."""
    if getattr(_state, "threads", 0) != threads:
        configure(_SHARE_ALL, threads, [str(cpu) for cpu in CPUS])
        _state.threads = threads

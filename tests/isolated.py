"""Jobs in processes of their own: a crash, a hang or too much memory is a result, not the end of the run."""

from __future__ import annotations

import json
import os
import resource
import selectors
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

Job = TypeVar("Job")


@dataclass(frozen=True)
class Outcome:
    """value: what the job returned, through JSON. fault: how its process ended instead ("SIGSEGV", "no answer in 60 s"), empty otherwise.
    seconds: wall time. peak_bytes: the largest resident size of its process."""

    value: Any
    fault: str
    seconds: float
    peak_bytes: int


def run_isolated(
    jobs: Iterable[Job],
    work: Callable[[Job], Any],
    *,
    processes: int | None = None,
    seconds: float = 60.0,
    cpu_seconds: int | None = None,
    address_space: int | None = None,
) -> Iterator[tuple[Job, Outcome]]:
    """Fork once per job, `processes` at a time (all CPUs by default); outcomes come as they end.

    The caller imports what `work` needs first, so that a child starts within milliseconds. work: returns what JSON can hold. seconds: wall time allowed
    to one job. cpu_seconds: time of all its threads, which a busy machine does not stretch ("no answer in 10 s of CPU time"). address_space: bytes that a child may map. An exception that leaves `work` is the fault "raised TYPE: text".
    """
    waiting, running = iter(jobs), {}
    limit = processes or os.cpu_count() or 1
    with selectors.DefaultSelector() as selector:
        exhausted = False
        while running or not exhausted:
            while not exhausted and len(running) < limit:
                try:
                    job = next(waiting)
                except StopIteration:
                    exhausted = True
                    break
                child = _Child(job, work, cpu_seconds, address_space)
                running[child.pipe] = child
                selector.register(child.pipe, selectors.EVENT_READ)
            for key, _ in selector.select(timeout=0.2):
                running[key.fd].read()
            now = time.monotonic()
            for pipe, child in list(running.items()):
                if not child.open or now - child.started > seconds:
                    selector.unregister(pipe)
                    del running[pipe]
                    yield child.job, child.end(f"no answer in {seconds:g} s")


class _Child:
    """One forked job and the pipe its answer comes through."""

    def __init__(self, job: Any, work: Callable[[Any], Any], cpu_seconds: int | None, address_space: int | None):
        self.job, self.started, self.open, self.answer = job, time.monotonic(), True, b""
        self.cpu_seconds = cpu_seconds
        self.pipe, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.pipe)
            _work_and_exit(job, work, write, cpu_seconds, address_space)
        os.close(write)

    def read(self) -> None:
        part = os.read(self.pipe, 1 << 16)
        self.answer += part
        self.open = bool(part)

    def end(self, late: str) -> Outcome:
        """Collect the process, which is killed if it still runs."""
        if self.open:
            os.kill(self.pid, signal.SIGKILL)
        _, status, usage = os.wait4(self.pid, 0)
        os.close(self.pipe)
        seconds, peak = time.monotonic() - self.started, usage.ru_maxrss * 1024
        if self.open:
            return Outcome(None, late, seconds, peak)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
            return Outcome(None, f"no answer in {self.cpu_seconds} s of CPU time", seconds, peak)
        if os.WIFSIGNALED(status):
            return Outcome(None, signal.Signals(os.WTERMSIG(status)).name, seconds, peak)
        try:
            value, fault = json.loads(self.answer)
        except ValueError:
            return Outcome(None, f"exit code {os.waitstatus_to_exitcode(status)} without an answer", seconds, peak)
        return Outcome(value, fault, seconds, peak)


def _work_and_exit(job: Any, work: Callable[[Any], Any], pipe: int, cpu_seconds: int | None, address_space: int | None) -> None:
    code = 1
    try:
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):  # C++ libraries write there, too
            os.dup2(null, stream)
        if cpu_seconds is not None:
            resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 1))
        if address_space is not None:
            resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))
        try:
            answer = [work(job), ""]
        except Exception as error:
            text = str(error).strip().splitlines() or [""]
            answer = [None, f"raised {type(error).__name__}: {text[-1][:200]}"]
        with os.fdopen(pipe, "wb") as stream:
            stream.write(json.dumps(answer).encode())
        code = 0
    finally:
        os._exit(code)  # no clean-up of what belongs to the parent

"""Jobs in processes of one thread each, in their order and each behind those it needs, with the time that is left."""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from s2t_models.errors import UserError
from s2t_models.threads import use_threads


@dataclass(frozen=True)
class Job:
    """A call in another process; `after` are the names of jobs that have to end first, and `size` is what it takes as
    against the others."""

    name: str
    work: Callable[..., Any]
    arguments: tuple[Any, ...]
    after: frozenset[str] = frozenset()
    size: float = 1.0


def run(jobs: Sequence[Job], processes: int, say: Callable[[Job, Any], str] = lambda job, result: job.name) -> int:
    """Run the jobs, in this process where `processes` is 1; each that ends is a line on stderr, with what `say` says of
    it. One that raises a UserError is named, and costs the others nothing. Returns how many did."""
    began, done, total, failed = time.monotonic(), 0.0, sum(job.size for job in jobs), 0
    ended = _here(jobs) if processes == 1 else _spread(jobs, processes)
    for number, (job, future) in enumerate(ended, 1):
        try:
            line = say(job, future.result())
        except UserError as error:
            line, failed = str(error), failed + 1
        done += job.size
        seconds = time.monotonic() - began
        left = seconds * (total / done - 1)
        print(
            f"label_efficiency: {number}/{len(jobs)}, {seconds / 60:.1f} min, about {left / 60:.0f} min left: {line}",
            file=sys.stderr,
            flush=True,
        )
    return failed


def _here(jobs: Sequence[Job]) -> Iterator[tuple[Job, Future[Any]]]:
    for job in jobs:
        future: Future[Any] = Future()
        try:
            future.set_result(job.work(*job.arguments))
        except UserError as error:
            future.set_exception(error)
        yield job, future


def _spread(jobs: Sequence[Job], processes: int) -> Iterator[tuple[Job, Future[Any]]]:
    waiting, running = list(jobs), dict[Future[Any], Job]()
    spawn = multiprocessing.get_context("spawn")
    # A process a job: what engines hold of its memory goes back with it.
    with ProcessPoolExecutor(processes, spawn, use_threads, (1,), max_tasks_per_child=1) as pool:
        while waiting or running:
            unfinished = {job.name for job in (*waiting, *running.values())}
            ready = [job for job in waiting if not job.after & unfinished]
            for job in ready[: processes - len(running)]:
                running[pool.submit(job.work, *job.arguments)] = job
                waiting.remove(job)
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future

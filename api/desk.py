"""Work that takes a processor, in threads: a bounded number at once, a bounded number waiting."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from api.errors import ApiError

_T = TypeVar("_T")


class Desk:
    """`threads` jobs run, `waiting` more wait; who comes beyond them gets 503 with Retry-After."""

    def __init__(self, name: str, *, threads: int, waiting: int, retry_after_s: int) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._limit = threads + waiting
        self._retry_after_s = retry_after_s
        self._lock = threading.Lock()
        self._inside = 0

    async def run(self, work: Callable[[], _T]) -> _T:
        """What `work` returns or raises. Raises ApiError 503 when the desk is full."""
        with self._lock:
            if self._inside >= self._limit:
                raise ApiError(
                    503,
                    f"{self._inside} requests are being worked on or wait already; try again later.",
                    kind="busy",
                    headers={"Retry-After": str(self._retry_after_s)},
                )
            self._inside += 1
        try:
            future = self._executor.submit(work)
        except RuntimeError:  # shut down between the check and here
            self._leave(None)
            raise ApiError(503, "The service is shutting down.", kind="busy") from None
        # Counted until the work has ended, not until its caller has gone away.
        future.add_done_callback(self._leave)
        return await asyncio.wrap_future(future)

    def _leave(self, _: Future[_T] | None) -> None:
        with self._lock:
            self._inside -= 1

    def close(self) -> None:
        """Drop what waits; what runs is asked to stop by its own means."""
        self._executor.shutdown(wait=False, cancel_futures=True)

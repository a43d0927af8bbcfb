"""A thread that seals shards while the next ones are computed."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

Job = Callable[[], None]
Give = Callable[[], None]


class Sealer:
    """Runs jobs one after the other, in a thread behind a bounded queue or (with no queue) at once.

    Once a job has failed the ones behind it are given up, as they may build on it; the error is raised by the
    next call of :meth:`submit`, :meth:`wait` or :meth:`close`, and by every later one.
    """

    def __init__(self, waiting: int) -> None:
        """Keep at most ``waiting`` jobs waiting; 0 runs each job in :meth:`submit`."""
        self._queue: queue.Queue[tuple[Job, Give] | None] | None = queue.Queue(waiting) if waiting else None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def submit(self, job: Job, give_up: Give) -> None:
        """Have a job done; waits while the queue is full.

        Args:
            job: to run.
            give_up: what to do in its place where an earlier job has failed.

        Raises:
            BaseException: what an earlier job raised, or, without a queue, this one.
        """
        if self._queue is None:
            job()
            return
        try:
            self.check()
        except BaseException:
            give_up()
            raise
        if self._thread is None:
            # a daemon: an interpreter that ends without close() must not wait for the medium for ever
            self._thread = threading.Thread(target=self._run, name="fisherscope-sealer", daemon=True)
            self._thread.start()
        self._queue.put((job, give_up))

    def wait(self) -> None:
        """Wait until every job is done.

        Raises:
            BaseException: what a job raised.
        """
        if self._queue is not None:
            self._queue.join()
        self.check()

    def check(self) -> None:
        """Raise what a job raised, if one did.

        Raises:
            BaseException: that.
        """
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Let the thread end after the jobs that it has; a second call does nothing.

        Raises:
            BaseException: what a job raised.
        """
        thread, self._thread = self._thread, None
        if thread is not None and self._queue is not None:
            try:
                self._queue.put(None)
                thread.join()
            except BaseException:
                # whoever interrupts must not close files under the thread
                self._queue.put(None)
                thread.join()
                raise
        self.check()

    def _run(self) -> None:
        assert self._queue is not None
        while (entry := self._queue.get()) is not None:
            job, give_up = entry
            try:
                if self._error is None:
                    job()
                else:
                    give_up()
            except BaseException as error:
                self._error = self._error or error
            finally:
                self._queue.task_done()
        self._queue.task_done()

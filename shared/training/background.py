"""Work beside the training: one thread, one piece of work after the other."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)


class Background:
    """Does work in a thread, in the order in which it is given. The thread stops when no work is left.

    It is a daemon thread: a second Ctrl-C stops the process without waiting for it. Leaving the context waits.

    Args:
        name: of the thread.
        on_error: receives each error, in the thread. Without it `wait`, `raise_if_failed` or the end of the context
            raises the first error, once. If another error leaves the context, the first error is logged.
    """

    def __init__(self, name: str = "saving", on_error: Callable[[Exception], None] | None = None):
        self.name = name
        self._on_error = on_error or self._keep
        self._changed = threading.Condition()
        self._waiting: deque[Callable[[], None]] = deque()
        self._works = False
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    @property
    def is_idle(self) -> bool:
        return not self._works

    def begin(self, work: Callable[[], None]) -> None:
        """Does `work` after what was given before."""
        with self._changed:
            self._waiting.append(work)
            if not self._works:
                self._works = True
                self._thread = threading.Thread(target=self._work, name=self.name, daemon=True)
                self._thread.start()

    def wait(self, seconds: float | None = None) -> bool:
        """Waits until all work is done, at most `seconds`. Returns whether it is."""
        with self._changed:
            is_done, thread = self._changed.wait_for(lambda: not self._works, seconds), self._thread
        if is_done and thread is not None:
            thread.join()  # a program that exits while a thread frees tensors is aborted
        self.raise_if_failed()
        return is_done

    def raise_if_failed(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _keep(self, error: Exception) -> None:
        self._error = self._error or error

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._waiting:
                    self._works = False
                    self._changed.notify_all()
                    return
                work = self._waiting.popleft()
            try:
                work()
            except Exception as error:
                self._on_error(error)
            del work  # and the tensors that it holds, before the work counts as done

    def __enter__(self) -> Background:
        return self

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        try:
            self.wait()
        except Exception as own:
            if error is None:
                raise
            logger.error("%s failed: %s: %s", self.name, type(own).__name__, own)

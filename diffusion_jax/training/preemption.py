"""SIGTERM: a machine that is about to be taken away asks first."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Leave(BaseException):
    """Raised inside `Preemption.leaving_at_once` when SIGTERM comes; no `except Exception` may swallow it."""


class Preemption:
    """Notes SIGTERM from its construction on.

    Training asks `asked` between dispatches, saves and leaves; what comes after training may be left at once.
    """

    def __init__(self) -> None:
        self._asked = self._at_once = False
        signal.signal(signal.SIGTERM, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        if self._at_once:
            raise Leave

    def asked(self) -> bool:
        """Whether SIGTERM has come."""
        return self._asked

    @contextmanager
    def leaving_at_once(self) -> Iterator[None]:
        """Within, SIGTERM raises `Leave` where it comes: for work that can be done again."""
        if self._asked:
            raise Leave
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

"""A SIGTERM that rank 0 ends by in good order, once it is clear that nothing else has happened."""

from __future__ import annotations

import math
import time

from mnemosyne.parallel.trouble import Trouble


class Termination:
    """Signals heard, and when: a rank that is lost makes a launcher send SIGTERM as well."""

    def __init__(self) -> None:
        self.trouble: Trouble | None = None  # of the rank that heard it first
        self._asked_s = math.inf
        self._is_done = False

    def ask(self, trouble: Trouble) -> None:
        """Begin; a second SIGTERM changes nothing."""
        if self.trouble is None:
            self.trouble, self._asked_s = trouble, time.monotonic()

    def is_due(self, settle_s: float) -> bool:
        """True once: others have had time to tell why it came."""
        if self._is_done or time.monotonic() - self._asked_s < settle_s:
            return False
        self._is_done = True
        return True

    def is_overdue(self, limit_s: float) -> bool:
        """Return whether it has not brought the end in time."""
        return time.monotonic() - self._asked_s > limit_s

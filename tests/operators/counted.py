"""A set of operators that counts its calls and computes as another does."""

from __future__ import annotations

from collections import Counter
from typing import Any

from mnemosyne.operators import Operators


class Counted:
    """Another set, and how often each of its operators was called.

    Args:
        inner: computes.
    """

    def __init__(self, inner: Operators) -> None:
        self.inner = inner
        self.calls: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        """Take an attribute of the other set; an operator counts its calls."""
        found = getattr(self.inner, name)
        if not callable(found):
            return found

        def call(*arguments: Any, **keywords: Any) -> Any:
            self.calls[name] += 1
            return found(*arguments, **keywords)

        return call

"""A predictor of the user's, whose failures end no request."""

from __future__ import annotations

import logging
import math
from numbers import Real

from mnemosyne.schedule.predictor import LearningPredictor, LinearPredictor, Predictor
from mnemosyne.schedule.work import StepWork

log = logging.getLogger(__name__)

MAX_PREDICTED_S = 1e9  # 32 years; sums of predictions stay finite


class ForeignPredictor:
    """Asks a predictor that is not ours, until it fails; ours takes its place then.

    A prediction decides chunk sizes and deadlines, never tokens, so no request ends for one. The
    first exception, and the first value that is no number in [0, 1e9], is logged, and the
    predictor is not asked any more.

    Args:
        predictor: of the user.
        ours: takes its place; it learns from each step meanwhile.
    """

    def __init__(self, predictor: Predictor, ours: LinearPredictor) -> None:
        self._theirs: Predictor | None = predictor
        self._ours = ours

    def predict(self, work: StepWork) -> float:
        """Seconds, finite and not negative."""
        if self._theirs is not None:
            try:
                return _checked(self._theirs.predict(work))
            except Exception as error:  # noqa: BLE001  # code of the user
                self._leave(error)
        return self._ours.predict(work)

    def observe(self, work: StepWork, seconds: float) -> None:
        self._ours.observe(work, seconds)
        if isinstance(self._theirs, LearningPredictor):
            try:
                self._theirs.observe(work, seconds)
            except Exception as error:  # noqa: BLE001  # code of the user
                self._leave(error)

    def _leave(self, error: Exception) -> None:
        self._theirs = None
        log.error(
            "the predictor that was given failed and is not asked any more; step times are "
            "predicted from the peaks of the machine and the steps that run",
            exc_info=error,
        )


def check_predictor(predictor: object) -> None:
    """Refuse an object at the start that could never predict.

    Raises:
        ValueError: if it has no method ``predict``.
    """
    if not callable(getattr(predictor, "predict", None)):
        raise ValueError(
            f"predictor must have a method predict(work) -> seconds, got {predictor!r}; "
            "leave it out for the one that is fitted here"
        )


def _checked(seconds: object) -> float:
    number = float(seconds) if isinstance(seconds, Real) else math.nan
    if 0 <= number <= MAX_PREDICTED_S:  # which nan is not
        return number
    raise ValueError(
        f"predict must return seconds in [0, {MAX_PREDICTED_S:.0e}], got {seconds!r}; "
        "return a float"
    )

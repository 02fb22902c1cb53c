"""Requests that have ended engines are known again, whoever sends them."""

from __future__ import annotations

import numpy as np
import pytest

from mnemosyne.request import SamplingParams
from mnemosyne.server.backend import Job
from mnemosyne.server.condemned import Condemned


def job(*ids: int, **params: object) -> Job:
    given = SamplingParams(**params)  # type: ignore[arg-type]
    return Job(job_id="job", prompt_ids=np.array(ids), params=given)


def test_a_request_that_ended_engines_is_refused_to_every_key() -> None:
    condemned = Condemned()

    condemned.add(job(5, 6, max_tokens=3, cache_salt="of one key"))

    for salt in ("of another key", "of one key", None):
        with pytest.raises(ValueError, match="got one that ended it twice"):
            condemned.check(job(5, 6, max_tokens=3, cache_salt=salt))
    condemned.check(job(5, 7, max_tokens=3))
    condemned.check(job(5, 6, max_tokens=4))

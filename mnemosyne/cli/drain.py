"""``mnemosyne drain URL``: lets a server finish what runs, for a hook that comes before its end."""

from __future__ import annotations

import json
import time
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from mnemosyne.config_serve import DrainConfig
from mnemosyne.process import say

POLL_S = 0.2
LOOK_S = 5.0  # for one look at whether it still answers
DRAINED, CUT_OFF = 0, 1  # exit statuses


def drain(config: DrainConfig) -> int:
    """Have a server take no new request, and wait until it has ended.

    Args:
        config: which one.

    Returns:
        The exit status: 0 if all its requests finished, 1 if some were cut off.

    Raises:
        ValueError: if there is no such server, or it refuses.
    """
    if urlsplit(config.url).scheme not in ("http", "https"):
        raise ValueError(f"url must begin with http:// or https://, got {config.url!r}")
    url, end_s = config.url.rstrip("/"), time.monotonic() + float(config.timeout)
    say(f"draining {url}")
    try:
        request = Request(f"{url}/drain", data=b"", headers=_headers(config.api_key))
        with urlopen(request, timeout=float(config.timeout)) as response:
            is_whole = bool(json.load(response)["drained"])
    except HTTPError as error:
        raise ValueError(
            f"url must be of a server that this client may drain, got {url} ({error.code}: "
            f"{error.read(1000).decode(errors='replace')}); name a key with api_key=FILE"
        ) from error
    except (OSError, HTTPException, ValueError, KeyError) as error:
        raise ValueError(
            f"url must be of a server that answers, got {url} ({error}); see its log"
        ) from error
    while _answers(url) and time.monotonic() < end_s:
        time.sleep(POLL_S)
    say("drained" if is_whole else "ended; some requests were cut off")
    return DRAINED if is_whole else CUT_OFF


def _headers(path: str | None) -> dict[str, str]:
    """Headers that show a key, the first line of a file."""
    if path is None:
        return {}
    try:
        lines = Path(path).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"api_key must be a readable file, got {path!r}") from error
    if not lines:
        raise ValueError(f"api_key must hold a key, got {path!r}, which is empty")
    return {"Authorization": f"Bearer {lines[0]}"}


def _answers(url: str) -> bool:
    try:
        with urlopen(f"{url}/health", timeout=LOOK_S):
            return True
    except HTTPError:
        return True
    except (OSError, HTTPException):
        return False

"""The programs and requests of docs/serving.md, at a server that is there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from unittest.mock import patch

import httpx
import pytest
from fastapi import FastAPI

from tests.doc_blocks import ROOT, blocks, commands
from tools.live_server import Live

PAGE = ROOT / "docs" / "serving.md"
HERE = "http://127.0.0.1:8000"


def test_the_client_of_the_page_gets_an_answer(
    live: Live, capsys: pytest.CaptureFixture[str]
) -> None:
    (text,) = (b.text for b in blocks(PAGE) if "from openai import" in b.text)

    exec(text.replace(HERE, live.url).replace('"smollm2"', '"needle"'), {})  # it is our own

    assert capsys.readouterr().out.endswith("\n")


def test_the_line_of_curl_is_answered(http: httpx.Client, live: Live) -> None:
    (line,) = (c for b in blocks(PAGE) for c in commands(b.text) if c.startswith("curl"))
    found = re.match(rf"curl {HERE}(\S+) -d '(.*)'$", line)

    assert found is not None, line
    answer = http.post(found[1], json=json.loads(found[2]))
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["finish_reason"] in ("length", "stop")


def test_an_app_of_ones_own_is_made_and_run() -> None:
    (text,) = (b.text for b in blocks(PAGE) if "import uvicorn" in b.text)

    with patch("uvicorn.run") as run:
        exec(text.replace('"smollm2"', '"needle"'), {})  # it is our own

    (app,) = run.call_args.args
    assert isinstance(app, FastAPI)
    assert Path(PAGE).is_file()

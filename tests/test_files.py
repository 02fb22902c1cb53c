"""Files of others are read within bounds; what they hold is shown in one harmless line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from mnemosyne.files import is_there, printable, read_bytes, read_object, read_text, shown


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "config.json"


def refusal(file: Path) -> str:
    with pytest.raises(ValueError, match=r"config\.json .*must .*, got ") as caught:
        read_object(file)
    said = str(caught.value)
    assert said.isprintable()
    assert len(said) < 1000
    return said


def test_entries_are_read_as_they_are(file: Path) -> None:
    entries = {"a": [1, 2.5, None, True], "b": {"c": "\x1b[31m"}, "no limit": int(1e30)}
    file.write_text(json.dumps(entries))

    assert read_object(file) == entries
    assert read_object(file.with_name("absent.json")) == {}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "valid JSON"),
        (b"{", "valid JSON"),
        (b"\xef\xbb\xbf{}", "valid JSON"),
        (b"\xff\xfe\x00", "must be UTF-8"),
        (b"[1, 2]", "must hold a JSON object"),
        (b'{"a": 1, "b": 2, "a": 1}', "'a' is there twice"),
        (b'{"b": {"a": 1, "a": 1}}', "'a' is there twice"),
        (b'{"\\u001b[31m": 1, "\\u001b[31m": 2}', r"\x1b[31m"),
        (b'{"a": {"b": [0, NaN]}}', "a.b.1 in"),
        (b'{"a": -Infinity}', "a in"),
        (b'{"a": 1e999}', "must be finite"),
        (b'{"a": 1' + b"0" * 50 + b"}", "a in"),
        (b'{"a": 1' + b"0" * 9999 + b"}", "must be finite and at most 1e+40"),
        (b"[" * 100_000, "nested at most 64"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "nested at most 64"),
        (b'{"a": [' + b"[]," * 300_000 + b"0]}", "at most 500,000 values"),
        (b'{"a": "' + b"b" * (4 << 20) + b'"}', "at most 4,194,304 bytes"),
    ],
    ids=lambda value: value[:20] if isinstance(value, bytes) else "",
)
def test_what_is_no_settings_file_is_refused_in_a_sentence(
    file: Path, content: bytes, said: str
) -> None:
    file.write_bytes(content)

    assert said in refusal(file)


def test_nesting_up_to_the_bound_is_read(file: Path) -> None:
    file.write_bytes(b'{"a":' * 64 + b"1" + b"}" * 64)

    assert list(read_object(file)) == ["a"]


def test_what_stands_in_the_place_of_a_file_is_refused_without_waiting(file: Path) -> None:
    os.mkfifo(file)
    assert "a device or a pipe" in refusal(file)
    file.unlink()
    file.mkdir()
    assert "a directory" in refusal(file)
    file.rmdir()
    file.symlink_to("nowhere")
    assert "a link that leads nowhere" in refusal(file)
    file.unlink()
    file.symlink_to(file)
    assert "must be a file that can be read" in refusal(file)


def test_a_pipe_that_came_after_the_look_keeps_nobody_waiting(file: Path) -> None:
    os.mkfifo(file)

    assert read_bytes(file) == b""  # nobody writes


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_is_closed_to_us_is_refused(file: Path) -> None:
    file.write_text("{}")
    file.chmod(0)

    assert "must be a file that can be read" in refusal(file)


def test_a_link_to_a_file_is_a_file(file: Path) -> None:
    file.with_name("blob").write_text('{"a": 1}')
    file.symlink_to("blob")

    assert is_there(file)
    assert read_text(file) == '{"a": 1}'


def test_foreign_text_is_shown_in_one_short_harmless_line() -> None:
    assert shown("\x1b[2J\n\u202e") == r"'\x1b[2J\n\u202e'"
    assert shown("a" * 10**6).startswith("'aaa")
    assert len(shown(["b" * 10**4] * 10**4)) < 120
    assert len(shown({"k": {"k": {"k": {"k": {"k": 1}}}}})) < 60
    assert printable("tensor\x07 \ud800\nname") == r"tensor\x07 \ud800\nname"
    assert len(printable("x" * 10**6)) < 410

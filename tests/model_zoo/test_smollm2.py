"""The model that speaks: made once, whole or not at all, and right."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from mnemosyne import cli
from mnemosyne.model_zoo import smollm2 as room
from mnemosyne.model_zoo.fetch import Unavailable
from mnemosyne.model_zoo.smollm2 import DIGESTS, write_smollm2

CONTENT = {name: f"content of {name}".encode() for name in DIGESTS}


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Stand-ins for the download and the conversion; where each download was made."""
    folders: list[Path] = []

    def fetch(source: object, folder: Path, progress: object) -> Path:
        folders.append(folder)
        return folder / "file.gguf"

    def convert(file: Path, folder: Path) -> None:
        folder.mkdir()
        for name, content in CONTENT.items():
            (folder / name).write_bytes(content)

    digests = {name: hashlib.sha256(content).hexdigest() for name, content in CONTENT.items()}
    monkeypatch.setattr(room, "fetch", fetch)
    monkeypatch.setattr(room, "_convert", convert)
    monkeypatch.setattr(room, "DIGESTS", digests)
    return folders


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def left_in(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def test_it_is_fetched_once(tmp_path: Path, fetched: list[Path]) -> None:
    for _ in range(2):
        write_smollm2(tmp_path / "smollm2")

    assert contents(tmp_path / "smollm2") == CONTENT
    assert len(fetched) == 1
    assert left_in(tmp_path) == {"smollm2", ".smollm2.lock"}


def test_those_who_ask_together_wait_for_one_download(tmp_path: Path, fetched: list[Path]) -> None:
    threads = [
        threading.Thread(target=write_smollm2, args=(tmp_path / "smollm2",)) for _ in range(4)
    ]

    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(fetched) == 1
    assert contents(tmp_path / "smollm2") == CONTENT


@pytest.mark.parametrize("name", sorted(DIGESTS))
def test_a_file_that_was_changed_is_never_used(
    name: str, tmp_path: Path, fetched: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = write_smollm2(tmp_path / "smollm2")
    (path / name).write_bytes(CONTENT[name][:-1] + b"!")

    write_smollm2(path)

    assert contents(path) == CONTENT
    assert "was not as it should be; it is made again" in caplog.text


def test_an_interrupted_download_leaves_nothing_that_looks_like_a_model(
    tmp_path: Path, fetched: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(source: object, folder: Path, progress: object) -> Path:
        (folder / "half a file").write_bytes(b"x")
        raise KeyboardInterrupt

    monkeypatch.setattr(room, "fetch", interrupted)

    with pytest.raises(KeyboardInterrupt):
        write_smollm2(tmp_path / "smollm2")

    assert left_in(tmp_path) == {".smollm2.lock"}


def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path, fetched: list[Path]) -> None:
    (tmp_path / ".smollm2-left").mkdir()
    (tmp_path / ".smollm2-left" / "part").write_bytes(b"x")

    write_smollm2(tmp_path / "smollm2")

    assert left_in(tmp_path) == {"smollm2", ".smollm2.lock"}


def test_a_conversion_that_comes_out_otherwise_is_refused(
    tmp_path: Path, fetched: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "DIGESTS", DIGESTS)

    with pytest.raises(ValueError, match=r"^config\.json must have the SHA-256"):
        write_smollm2(tmp_path / "smollm2")

    assert left_in(tmp_path) == {".smollm2.lock"}


def test_without_the_reader_of_its_file_one_sentence_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(room, "find_spec", lambda name: None)

    status = cli.main(["generate", "model=smollm2", "prompt=x"])

    assert status == cli.FAILED
    assert "error: model=smollm2 must have the package gguf" in capsys.readouterr().err
    with pytest.raises(Unavailable, match=r"pip install gguf$"):
        write_smollm2(tmp_path / "smollm2")


def test_its_tokenizer_keeps_any_text_and_splits_numbers_into_digits(smollm2: Path) -> None:
    tokenizer = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    text = "In 2026 a naïve café sold 12345 crêpes.\n\n\tfor i in range(10): 日本 🎉"

    encoded = tokenizer.encode(text)

    assert tokenizer.decode(encoded.ids) == text
    assert [token for token in encoded.tokens if token.isdigit()] == [*"2026", *"12345", *"10"]
    assert tokenizer.encode("<|im_start|>user\nHi<|im_end|>").tokens == [
        *("<|im_start|>", "user", "Ċ", "Hi", "<|im_end|>"),
    ]


def test_a_newcomer_gets_an_answer(
    smollm2: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(smollm2.parent.parent))

    status = cli.main(
        [
            *("generate", "model=smollm2", "chat=true", "prompt=What is the capital of France?"),
            *("schedule=fixed", "cache.max_tokens=1K"),  # no sweep, little memory
        ]
    )

    assert status == cli.OK
    assert capsys.readouterr().out == "The capital of France is Paris.\n"

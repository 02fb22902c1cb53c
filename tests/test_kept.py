"""Files written for the next start are used as they were written, or made again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mnemosyne.kept import kept_folder, read_kept, write_kept


@pytest.mark.parametrize("content", [b"", b"text", b"\n\n", bytes(range(256)) * 5])
def test_a_file_comes_back_as_it_was_written(tmp_path: Path, content: bytes) -> None:
    write_kept(tmp_path / "file", content)

    assert read_kept(tmp_path / "file") == content
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_in_which_any_byte_has_changed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_kept(path, b"some text")
    whole = path.read_bytes()

    for index in range(len(whole)):
        path.write_bytes(whole[:index] + bytes([whole[index] ^ 1]) + whole[index + 1 :])
        with pytest.raises(ValueError, match="not as it was written"):
            read_kept(path)
        path.write_bytes(whole[:index])
        with pytest.raises(ValueError, match="not as it was written"):
            read_kept(path)


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_can_write_is_refused(tmp_path: Path, mode: int) -> None:
    write_kept(tmp_path / "file", b"")
    (tmp_path / "file").chmod(mode)

    with pytest.raises(ValueError, match="other users can write to it"):
        read_kept(tmp_path / "file")


def make(times: list[Path]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        folder.mkdir()
        (folder / "a").write_text("alpha")
        (folder / "b").write_text("beta")
        times.append(folder)

    return write


def damage(folder: Path, how: str) -> None:
    match how:
        case "changed":
            (folder / "a").write_text("alphb")
        case "torn":
            (folder / "b").write_text("be")
        case "lost":
            (folder / "b").unlink()
        case "no seal":
            (folder / "kept.json").unlink()
        case "open to others":
            folder.chmod(0o777)


@pytest.mark.parametrize("how", ["changed", "torn", "lost", "no seal", "open to others"])
def test_a_folder_is_made_once_and_again_when_it_is_damaged(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    made: list[Path] = []
    for _ in range(2):
        folder = kept_folder(tmp_path / "kept", "recipe 1", make(made))
    assert len(made) == 1

    damage(folder, how)
    for _ in range(2):
        kept_folder(tmp_path / "kept", "recipe 1", make(made))

    assert len(made) == 2
    assert caplog.text.count("is made again") == 1
    assert ((folder / "a").read_text(), (folder / "b").read_text()) == ("alpha", "beta")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_folder_of_another_recipe_is_made_again(tmp_path: Path) -> None:
    made: list[Path] = []
    for recipe in ("1", "2", "2"):
        kept_folder(tmp_path / "kept", recipe, make(made))

    assert len(made) == 2


def test_a_folder_that_another_process_made_meanwhile_stays(tmp_path: Path) -> None:
    made: list[Path] = []

    def write_slowly(folder: Path) -> None:
        kept_folder(tmp_path / "kept", "1", make(made))
        (tmp_path / "kept" / "kept.json").touch()
        make(made)(folder)

    first = kept_folder(tmp_path / "kept", "1", write_slowly)

    assert len(made) == 2
    assert made[0].parent != first
    assert (first / "a").read_text() == "alpha"

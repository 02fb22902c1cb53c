"""A snapshot that other tools have downloaded is found by its id; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from mnemosyne.hub import hub_folder, is_hub_id
from mnemosyne.joining.checkpoint import find_checkpoint, path_on_disk
from tests.model_zoo.tiny import tiny_checkpoint

COMMIT = "0123456789abcdef" * 2 + "01234567"
ID = "some-org/Tiny-1.5B"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub with one snapshot, whose files are links as the tools make them."""
    folder = tmp_path / "hub" / "models--some-org--Tiny-1.5B"
    blobs = tiny_checkpoint(folder / "blobs")
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return folder


def test_the_snapshot_of_the_main_branch_is_the_model(hub: Path) -> None:
    checkpoint = find_checkpoint(ID)

    assert checkpoint.path == hub / "snapshots" / COMMIT
    assert checkpoint.name == ID
    assert checkpoint.spec.width == 32
    assert path_on_disk(ID, "auto") == checkpoint.path


def test_a_directory_of_the_same_name_comes_first(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_checkpoint(tmp_path / ID)
    monkeypatch.chdir(tmp_path)

    assert find_checkpoint(ID).path == Path(ID)


def test_a_model_that_is_not_there_is_refused_with_the_way_to_get_it(hub: Path) -> None:
    with pytest.raises(ValueError, match=r"got 'other/model'; download it first: hf download "):
        find_checkpoint("other/model")


@pytest.mark.parametrize("ref", [None, "", "main", "../../blobs", "f" * 40, "é"])
def test_a_branch_that_names_no_snapshot_is_refused(hub: Path, ref: str | None) -> None:
    if ref is None:
        (hub / "refs" / "main").unlink()
    else:
        (hub / "refs" / "main").write_text(ref, encoding="utf-8")

    with pytest.raises(ValueError, match=r"^model must be an id whose main branch is in .*; downl"):
        find_checkpoint(ID)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}, "/a"),
        ({"HUGGINGFACE_HUB_CACHE": "/a", "HF_HOME": "/b"}, "/a"),
        ({"HF_HOME": "/b", "XDG_CACHE_HOME": "/c"}, "/b/hub"),
        ({"XDG_CACHE_HOME": "/c", "HOME": "/d"}, "/c/huggingface/hub"),
        ({"HOME": "/d"}, "/d/.cache/huggingface/hub"),
    ],
)
def test_the_cache_of_the_hub_is_where_its_tools_look(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    assert hub_folder() == Path(expected)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/model", True),
        ("Org_1/Model-2.5", True),
        ("model", False),
        ("../model", False),
        ("org/..", False),
        ("/org/model", False),
        ("a/b/c", False),
        ("./needle", False),
        ("~/model", False),
        ("org/model\n", False),
    ],
)
def test_what_may_be_an_id(name: str, expected: bool) -> None:
    assert is_hub_id(name) is expected

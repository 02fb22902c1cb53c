"""The picture of the rooms shows the imports that there are."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

from tests.import_table import TABLE
from tools import rooms_picture

ROOT = Path(__file__).parents[1]


def test_the_committed_picture_is_that_of_the_sources() -> None:
    committed = rooms_picture.PICTURE.read_text(encoding="utf-8")
    found = re.search(r"commit ([0-9a-f]{7,})", committed)

    assert found is not None
    graph = rooms_picture.reduced(rooms_picture.read_imports(ROOT / "mnemosyne"))
    assert rooms_picture.draw(graph, found[1]) == committed, "draw it again: make picture"


def test_every_folder_with_a_rule_is_a_room_of_the_picture() -> None:
    folders = {path.name for path in (ROOT / "mnemosyne").iterdir() if path.is_dir()} & set(TABLE)

    assert folders - set(rooms_picture.REMARKS) == {"conf"}


def test_a_longer_way_replaces_an_arrow_and_rooms_lie_below_those_that_import_them() -> None:
    graph = {room: set[str]() for room in rooms_picture.REMARKS}
    graph |= {"cli": {"llm", "serve"}, "llm": {"serve"}, "serve": {"cache"}}

    reduced = rooms_picture.reduced(graph)

    assert reduced["cli"] == {"llm"}
    boxes, ways = rooms_picture.place(reduced)
    assert boxes["cli"].y < boxes["llm"].y < boxes["serve"].y < boxes["cache"].y
    assert ["cli", "llm"] in ways


def test_the_picture_is_well_formed() -> None:
    root = ElementTree.parse(rooms_picture.PICTURE).getroot()

    texts = {element.text for element in root.iter() if element.tag.endswith("text")}
    assert set(rooms_picture.REMARKS) <= texts

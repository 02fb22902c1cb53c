"""Pages for people: what they link to is there, and what the first one shows runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools import doc_references

ROOT = Path(__file__).parents[1]
PAGES = doc_references.pages()
MOVED = 50  # lines that code may move before its references are to be brought up to date
LINK = re.compile(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)")
SECTION = re.compile(r"\]\((?!https?:)([^)#]*)#([^)]+)\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_inside_the_repository_leads_somewhere(page: Path) -> None:
    targets = LINK.findall(page.read_text(encoding="utf-8"))

    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_section_names_a_heading_of_its_page(page: Path) -> None:
    for target, section in SECTION.findall(page.read_text(encoding="utf-8")):
        headings = HEADING.findall(((page.parent / target) if target else page).read_text("utf-8"))
        names = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
        assert section in names, f"{page.name}: #{section}"


def test_every_reference_to_code_names_what_the_file_defines_there() -> None:
    found = [(page, ref) for page in PAGES for ref in doc_references.references(page)]

    assert len(found) > 40
    for page, ref in found:
        line = doc_references.line_of(ROOT / ref.path, ref.name)
        assert line is not None, f"{page.name}: {ref.path} defines no {ref.name}"
        assert abs(line - ref.line) <= MOVED, f"{page.name}: {ref}; python tools/doc_references.py"


def test_a_name_that_a_file_does_not_define_is_noticed() -> None:
    policy = ROOT / "mnemosyne" / "schedule" / "policy.py"

    assert doc_references.line_of(policy, "Policy.nothing") is None
    assert doc_references.line_of(ROOT / "kernels" / "cpu" / "vector.h", "fmb") is None
    assert doc_references.line_of(policy.with_name("none.py"), "Policy") is None


def test_the_first_page_is_short_and_leads_to_every_other() -> None:
    text = PAGES[0].read_text(encoding="utf-8")

    assert text.count("\n") <= 120
    reached = set(LINK.findall(text))
    further = {link for name in reached if name.startswith("docs/") for link in links_of(name)}
    left = {page.name for page in PAGES[2:]} - {Path(link).name for link in reached | further}
    assert left == set()


def links_of(name: str) -> list[str]:
    return LINK.findall((ROOT / name).read_text(encoding="utf-8"))


def test_the_lines_of_python_on_the_first_page_answer(
    smollm2: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = PYTHON.findall(PAGES[0].read_text(encoding="utf-8"))

    exec(block.replace('"smollm2"', repr(str(smollm2))), {})  # it is our own

    printed = capsys.readouterr().out
    assert "Paris" in printed
    assert printed.count("length") + printed.count("stop") >= 2

"""The docs: up to date with the passes, without dead links, their Python runs."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest

from .examples import run_python
from .passes.table import passes

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def names(page: Path) -> str:
    return str(page.relative_to(ROOT))


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", without_code(page.read_text(encoding="utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_page_of_passes_is_up_to_date() -> None:
    make = runpy.run_path(str(ROOT / "docs" / "make_passes.py"))
    page = (ROOT / "docs" / "passes.md").read_text(encoding="utf-8")
    assert page == make["page"](), "run python docs/make_passes.py"


def test_every_pass_is_drawn() -> None:
    drawn = json.loads((ROOT / "docs" / "pictures" / "passes.json").read_text(encoding="utf-8"))
    missing = {*passes()} ^ {*drawn}
    assert not missing, "run python docs/make_pictures.py"
    assert all(each["lines"] for each in drawn.values())


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_links_lead_somewhere(page: Path) -> None:
    for link in _LINK.findall(without_code(page.read_text(encoding="utf-8"))):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_linked_from_the_readme() -> None:
    links = set(_LINK.findall((ROOT / "README.md").read_text(encoding="utf-8")))
    assert {f"docs/{page.name}" for page in PAGES if page.parent.name == "docs"} <= links


def test_the_python_of_writing_a_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_python(ROOT / "docs" / "writing-a-pass.md")

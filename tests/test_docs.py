"""The pages link to what is there."""

import re
from itertools import count, islice
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/*.md", "benchmarks/*.md", "recipes/*.md")
    for page in ROOT.glob(pattern)
)
LINK = re.compile(r"\[[^\]\[]*\]\(([^)\s]+)\)")
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def text_of(page: Path) -> str:
    """What a page says outside of code blocks."""
    return FENCED.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """What may stand behind a `#`: headings as GitHub spells them, and anchors put by hand."""
    text = text_of(page)
    found = set(re.findall(r'<a id="([^"]+)">', text))
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        again = (f"{slug}-{number}" for number in count(1))
        found.add(next(one for one in (slug, *islice(again, 9)) if one not in found))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_resolve(page: Path) -> None:
    for link in LINK.findall(text_of(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {link}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{page.name} links to {link}"


def test_there_are_links_to_hold_to() -> None:
    links = [link for page in PAGES for link in LINK.findall(text_of(page))]
    assert sum("#" in link and not link.startswith("http") for link in links) > 20

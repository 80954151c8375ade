"""The pages: links lead somewhere, and code that is marked to run can be read."""

import ast
import re
from pathlib import Path

import pytest

from medssl import METHODS

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("data/*.md")])


def anchors(text):
    """Of the headings, as the sites that show these pages make them."""
    heads = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower().replace("`", "")).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.S)                     # code has no links
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if not re.match(r"\w+:", link):
            target = page.parent / path if path else page
            assert target.exists(), f"{page.name}: {link}"
            assert not anchor or anchor in anchors(target.read_text()), f"{page.name}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_code_can_be_read(page):
    text = page.read_text()
    assert text.count("\n```") % 2 == 0, f"{page.name}: a block of code has no end"
    for mark in re.findall(r"^<!-- ([\w-]+) -->$", text, re.M):             # what tools and .ci/run look for
        block = re.search(rf"^<!-- {mark} -->\n```(\w*)\n(.*?)^```$", text, re.M | re.S)
        assert block, f"{page.name}: no block of code follows {mark}"
        if block[1] == "python":
            ast.parse(block[2])


@pytest.mark.parametrize("name", ["tour", "methods"])
def test_pictures_are_all_shown_and_figures_filled_in(name):
    text = (ROOT / "docs" / f"{name}.md").read_text()
    there = {f"{name}/{path.name}" for path in (ROOT / "docs" / name).glob("*")}
    assert there == set(re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)) and ">?<!--" not in text


def test_every_method_has_its_row():
    rows = re.findall(r"^\| \[(\w+)\]\(medssl/\1\.py\)", (ROOT / "README.md").read_text(), re.M)
    assert sorted(rows) == sorted(METHODS), f"README's table wants one row a method: {set(rows) ^ set(METHODS)}"

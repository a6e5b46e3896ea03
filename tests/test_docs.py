"""The texts: every link leads to a file of the repository, every anchor to a heading."""

import re
import subprocess

import pytest

from helpers import ROOT

TEXTS = sorted(path for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def tracked():
    """The files that git tracks, and their folders; in a copy without git those that are there."""
    try:
        done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
        names = done.stdout.split("\n")
    except OSError:  # there is no git
        names = [""]
    if not any(names):
        names = map(str, ROOT.rglob("*"))
    files = {(ROOT / name).resolve() for name in names if name}
    return files | {folder for file in files for folder in file.parents if ROOT in folder.parents}


def anchors(text):
    """What GitHub makes of the headings."""
    heads = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def broken(path, files):
    """The links of a Markdown file that lead nowhere."""
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if re.match(r"\w+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if target not in files or (anchor and anchor not in anchors(target.read_text())):
            found.append(link)
    return found


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    assert broken(path, tracked()) == []


def test_a_dead_link_is_found(tmp_path):
    text = tmp_path / "text.md"
    text.write_text(
        "# A b\n[x](#a-b) [y](#c) [z](nothing.py) [web](https://example.org) ![p](p.png)"
    )
    assert broken(text, {text}) == ["#c", "nothing.py", "p.png"]


def test_the_readme_can_be_read_in_a_minute():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 160

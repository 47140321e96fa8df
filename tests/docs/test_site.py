"""The documentation site builds, strictly and without network, and asks for nothing from elsewhere."""

import re
import subprocess
import sys

import pytest
import site_hooks
from paths import ROOT


@pytest.mark.nightly
def test_the_site_builds_without_a_warning_and_stands_alone(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    site = tmp_path / "site"
    pages = {page.relative_to(site).as_posix() for page in site.rglob("*.html")}
    assert {"index.html", "faq.html", "cli.html", "formats/files.html", "methods/wanda.html"} <= pages
    assert "methods/wanda.html" in (site / "index.html").read_text(encoding="utf-8")
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|iframe)[^>]+src="(https?:[^"]+)"', text)
        loaded += re.findall(r'<link[^>]+(?:stylesheet|preload|icon)[^>]+href="(https?:[^"]+)"', text)
        assert not loaded, f"{page.name} loads {loaded}"


def _luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_links_can_be_read_in_both_schemes():
    css = (ROOT / "docs" / "assets" / "site.css").read_text(encoding="utf-8")
    for scheme, paper in (("default", "#ffffff"), ("default", "#f5f5f5"), ("slate", "#1e2129"), ("slate", "#272a35")):
        rules = css.partition(f'[data-md-color-scheme="{scheme}"]')[2].partition("}")[0]
        for name in ("typeset-a-color", "accent-fg-color"):
            ink = re.search(rf"--md-{name}: (#[0-9a-f]{{6}});", rules)[1]
            light, dark = sorted(map(_luminance, (ink, paper)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (scheme, name, paper)


def test_every_page_is_in_the_navigation():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("nav:")[2]
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}
    generated = {page for page in pages if page.startswith("methods/")} - {"methods/index.md"}
    assert pages - generated == set(re.findall(r"([\w/]+\.md)\b", nav))


def test_links_out_of_the_documentation_become_names():
    text = "[cli.py](../../billhook/cli.py), [the code](../../billhook/x.py), [Concepts](../concepts.md#words)"
    expected = "`billhook/cli.py`, the code (`billhook/x.py`), [Concepts](../concepts.md#words)"
    assert site_hooks.without_outer_links(text, "methods") == expected
    assert site_hooks.without_outer_links("[x](../examples/x.py)", "") == "x (`examples/x.py`)"


def test_every_question_is_answered():
    text = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8")
    _, *parts = re.split(r"^## (.*)\n", text, flags=re.MULTILINE)
    questions, answers = parts[::2], parts[1::2]
    assert len(questions) >= 10
    assert all(question.endswith("?") for question in questions)
    assert all(len(answer.split()) > 20 for answer in answers)

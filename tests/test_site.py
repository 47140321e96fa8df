"""The documentation site builds, strictly and without network, and asks for nothing from elsewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_stands_alone(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    pages = {page.name for page in (tmp_path / "site").glob("*.html")}
    assert {"index.html", "first_run.html", "faq.html", "METHODS.html", "cli.html"} <= pages
    for page in (tmp_path / "site").glob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|iframe)[^>]+src="(https?:[^"]+)"', text)
        loaded += re.findall(r'<link[^>]+(?:stylesheet|preload|icon)[^>]+href="(https?:[^"]+)"', text)
        assert not loaded, f"{page.name} loads {loaded}"


def test_every_page_is_in_the_navigation():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("nav:")[2]
    assert {page.name for page in (ROOT / "docs").glob("*.md")} == set(re.findall(r"(\w+\.md)$", nav, re.MULTILINE))


def test_the_questions_are_ten_and_answered():
    text = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8")
    answers = re.split(r"^## .*\n", text, flags=re.MULTILINE)[1:]
    assert len(answers) == 10
    assert all(len(answer.split()) > 20 for answer in answers)

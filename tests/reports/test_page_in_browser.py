"""The page in a real headless Chromium: silent, asking for nothing, usable, accessible, on a desktop, on a phone and on
paper."""

import shutil
from pathlib import Path

import pytest
import tiny

from billhook import prune
from billhook.reports.publishing import add_evaluation
from billhook.steps.evaluate import EvalConfig, evaluate_model

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python")
pytestmark = [pytest.mark.nightly, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")]

QUIET = (
    "no-sandbox",
    "disable-gpu",
    "disable-quic",
    "no-first-run",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
)


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    tiny.save(folder / "model")
    tiny.text_file(folder / "text.txt", copies=60)
    text = str(folder / "text.txt")
    prune(
        folder / "model",
        sparsity=0.5,
        recipe="alphapruning",
        calibration=text,
        samples=4,
        length=32,
        output=folder / "pruned",
    )
    questions = EvalConfig(data=text, length=32, limit=4, against=str(folder / "model"))
    add_evaluation(folder / "pruned", evaluate_model(folder / "pruned", questions))
    return folder / "pruned" / "report.html"


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=[f"--{flag}" for flag in QUIET])
        yield chromium
        chromium.close()


SIZES = {"desktop": (1280, 900), "phone": (390, 844)}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("device", SIZES)
def test_the_page_works_in_chromium(report, browser, device, scheme, tmp_path):
    width, height = SIZES[device]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    tab = context.new_page()
    said, asked = [], []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(report.as_uri())
    names = "#table tbody tr:not([hidden]) td:first-child"
    first = tab.locator(names).all_text_contents()

    tab.get_by_role("button", name="achieved %").click()
    column = [float(x) for x in tab.locator("#table tbody td:nth-child(6)").all_text_contents()]
    assert column == sorted(column)
    tab.get_by_role("button", name="achieved %").click()
    column = [float(x) for x in tab.locator("#table tbody td:nth-child(6)").all_text_contents()]
    assert column == sorted(column, reverse=True)
    assert tab.locator("th[aria-sort=descending]").count() == 1
    tab.get_by_role("button", name="layer", exact=True).click()
    assert tab.locator(names).all_text_contents() == sorted(first)

    tab.get_by_label("Show layers whose name contains").fill("DOWN_proj")
    assert set(tab.locator(names).all_text_contents()) == {name for name in first if "down_proj" in name}
    assert tab.locator("#shown").text_content() == "4 of 28 layers"
    tab.get_by_label("Show layers whose name contains").fill("")
    tab.locator("summary").first.click()
    assert tab.locator("details[open] table").is_visible()

    # wide tables scroll in their own frame, the page itself does not
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    problems = axe.Axe().run(tab).response["violations"]
    assert not problems, [(p["id"], p["nodes"][0]["html"]) for p in problems]
    tab.screenshot(path=tmp_path / f"{device}-{scheme}.png", full_page=True)
    context.close()
    assert said == []
    assert [url for url in asked if not url.startswith(("data:", report.as_uri()))] == []


def test_the_page_prints(report, browser, tmp_path):
    tab = browser.new_page()
    tab.goto(report.as_uri())
    tab.pdf(path=tmp_path / "report.pdf", format="A4")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
    tab.emulate_media(media="print")
    assert not tab.get_by_label("Show layers whose name contains").is_visible()
    tab.close()

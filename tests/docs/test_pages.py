"""Every block of commands or Python in the documentation runs, page by page as a reader would: in one folder, in the
order of the page.

A comment before a block says what becomes of it: `<!-- run: sh -->`, `<!-- run: python -->`, or `<!-- not run: REASON
-->`; blocks that other tests read have marks of their own. The folder holds the bundled model and what the pages call
MODEL (a tiny model), `text.txt` and `other-text.txt`. The examples of docs/cli.md, which are alternatives to each
other, are parsed by cli/test_commands.py instead.
"""

import functools
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest
import tiny
from command import done
from documentation import PAGES
from paths import ROOT

from billhook.cli import REMOVED, app

GENERATED = {"cli.md"}
ELSEWHERE_OPTIONS = {"--nproc-per-node"}  # of other programs
ELSEWHERE = {
    "allocator",
    "criterion",
    "quantizer",
    "task",
    "sink",
    "command",
    "with the plugin",
}  # `run:` marks of blocks that test_additions and test_examples run
NOT_RUN = {
    ("README.md", "installs and tests the package"),
    ("README.md", "starts processes; tests/distributed/test_ranks.py does"),
    ("CONTRIBUTING.md", "installs and tests the package"),
    ("install.md", "installs the package"),
    ("first_run.md", "takes a minute; the demo is a target of its own, make demo"),
    ("own_model.md", "reads corpora from the network"),
    ("add_a_method.md", "a line of another file"),
    ("add_a_method.md", "installs a package"),
    ("serving.md", "installs packages and serves until it is stopped"),
    ("RUNTIME.md", "needs a GPU"),
    ("BENCHMARKS.md", "downloads a model and takes an hour"),
    ("demo_model.md", "takes hours"),
    ("demo_model.md", "takes minutes"),
    ("trainers.md", "needs Axolotl"),
    ("trainers.md", "needs TRL"),
    ("recover.md", "starts processes; tests/distributed/test_recover.py does"),
    ("vision.md", "needs a trained image classifier"),
    ("vision.md", "needs a trained image-text model"),
}


class Block(NamedTuple):
    mark: str  # what the comment before it says
    language: str
    code: str


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page in order, without a common indentation."""
    found = re.findall(
        r"^( *)(?:<!-- ([^\n]*) -->\n+ *)?```(\w*)\n(.*?)\n *```$",
        page.read_text(encoding="utf-8"),
        re.MULTILINE | re.DOTALL,
    )
    return [
        Block(mark, language, re.sub(rf"^{indent}", "", code, flags=re.MULTILINE))
        for indent, mark, language, code in found
    ]


def of_commands(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language in ("", "sh", "bash", "python")]


def with_runs() -> list[Path]:
    return [page for page in PAGES if any(block.mark in ("run: sh", "run: python") for block in of_commands(page))]


@pytest.fixture
def folder(playground: Path) -> Path:
    tiny.save(playground / "MODEL", tiny.llama(num_hidden_layers=2))
    tiny.text_file(playground / "text.txt", 300)
    tiny.text_file(playground / "other-text.txt", 40)
    return playground


def run_commands(code: str) -> None:
    """Lines of `billhook`, run in this process, where torch is loaded already; entering the environment is left out."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words or words[:2] == ["source", ".venv/bin/activate"]:
            continue
        assert words[0] == "billhook", f"{line}: only billhook is run here"
        out = words.index(">") if ">" in words else len(words)
        printed = done(*words[1:out]).out
        if out < len(words):
            Path(words[out + 1]).write_text(printed, encoding="utf-8")


@pytest.mark.nightly
@pytest.mark.parametrize("page", with_runs(), ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run_one_after_the_other(page: Path, folder: Path) -> None:
    for block in of_commands(page):
        if block.mark == "run: sh":
            run_commands(block.code)
        elif block.mark == "run: python":
            exec(compile(block.code, page.name, "exec"), {"__name__": "__main__"})


def test_every_block_runs_or_says_why_not() -> None:
    reasons = set()
    for page in PAGES:
        for mark, language, code in of_commands(page) if page.name not in GENERATED else []:
            kind, _, what = mark.partition(": ")
            assert kind in ("run", "not run"), f"{page.name}: a block has no mark:\n{code}"
            if kind == "not run":
                reasons.add((page.name, what))
            else:
                assert what == language or what in ELSEWHERE, f"{page.name}: {what} is not the language of\n{code}"
    assert reasons == NOT_RUN


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_inside_the_repository_resolve(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.name}: {target} leads nowhere"
        if anchor:
            assert anchor in anchors(path), f"{page.name}: {target} has no such heading"


def anchors(page: Path) -> set[str]:
    """The anchors GitHub gives to the headings of a page."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", heading).lower()).replace(" ", "-") for heading in headings}


def inline_commands(page: Path) -> list[str]:
    """The commands and options in backticks in the text of a page, without its blocks."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return re.findall(r"`(billhook [a-z][^`]*|--[a-z][^`]*)`", text)


@functools.cache
def known_options() -> tuple[dict[str, str], list[str]]:
    """The help of every command by name, and other texts with options."""
    helps = {command.name: done(command.name, "--help").out for command in app.registered_commands}
    scripts = [*ROOT.glob("benchmarks/*.py"), *ROOT.glob("tools/*.py")]
    return helps, [done("--help").out, *(path.read_text(encoding="utf-8") for path in scripts)]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_inside_sentences_have_options_that_exist(page: Path) -> None:
    helps, others = known_options()
    for code in inline_commands(page):
        words = code.split()
        known = " ".join([*helps.values(), *others]) if code.startswith("--") else helps.get(words[1], "")
        assert known or words[1] in REMOVED, f"{page.name}: {code} names no command"
        for option in re.findall(r"(?<![\w-])(--?[a-z][\w-]*)", code):
            field = option[2:].replace("-", "_")  # of a configuration that a script has as its options
            if option not in {*ELSEWHERE_OPTIONS, *REMOVED} and (code[0] != "-" or field not in known):
                assert re.search(rf"(?<![\w-]){option}\b", known), f"{page.name}: {code}: {option}"

"""Methods of other distributions: found by entry point, loaded on use, named in errors when they are broken."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from interpreter import HEAVY, in_new_interpreter
from typer.testing import CliRunner

from billhook.cli import app
from billhook.errors import BillhookError
from billhook.methods.quantize import QUANTIZERS
from billhook.methods.sparse import CRITERIA
from billhook.plan.allocators import ALLOCATORS, ON_MODEL
from billhook.plan.level_allocators import LEVEL_ALLOCATORS
from billhook.registry import GROUP, Registry
from billhook.tasks import TASKS
from billhook.tasks.opening import task_of_config

METHOD = """
from billhook.registry import method


@method(paper="a teaching example")
def even(table, target, *, power: float = 1.0):
    \"\"\"s_l = S.\"\"\"
    return {row.layer: target for row in table}


def unmarked(table, target):
    return {}
"""
PLACES = {"uniform": "billhook.plan.allocators.uniform:uniform"}
Install = Callable[..., Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put a distribution on sys.path: `install("dist", {"allocator:even": "module:even"}, module=SOURCE)`."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])

    def write(distribution: str, points: dict[str, str], **modules: str) -> Path:
        facts = tmp_path / f"{distribution}-2.1.dist-info"
        facts.mkdir()
        (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 2.1\n")
        lines = [f"{name} = {place}" for name, place in points.items()]
        (facts / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *lines]) + "\n")
        for name, source in modules.items():
            (tmp_path / f"{name}.py").write_text(source)
        return tmp_path

    return write


def allocators() -> Registry:
    return Registry("allocator", PLACES, plugins=True)


def test_a_plugin_is_listed_described_and_loaded_like_a_built_in_method(install: Install) -> None:
    install("even-plugin", {"allocator:even": "plugin_a:even", "criterion:odd": "plugin_a:odd"}, plugin_a=METHOD)
    registry = allocators()
    assert registry.names() == ["uniform", "even"]
    assert registry.configure("even", {"power": "2"}) == {"power": 2.0}
    assert registry.paper("even") == "a teaching example"
    registry.check("even")


@pytest.mark.parametrize("registry", [ALLOCATORS, LEVEL_ALLOCATORS, CRITERIA, QUANTIZERS], ids=lambda r: r.kind)
def test_every_registry_of_methods_has_those_of_plugins(install: Install, registry: Registry) -> None:
    kind = registry.kind.replace(" ", "-")
    install("even-plugin", {f"{kind}:even": "plugin_a:even", f"{kind}:no": "plugin_a:unmarked"}, plugin_a=METHOD)
    assert registry.names() == [*registry.built_in, "even", "no"]
    assert registry.configure("even", {"power": "2"}) == {"power": 2.0}
    with pytest.raises(BillhookError, match=f"The {registry.kind} 'no' of even-plugin .* is not a method"):
        registry.get("no")


TASK = """
from dataclasses import dataclass
from billhook.tasks.text_generation import TextGeneration


@dataclass(frozen=True)
class Masked(TextGeneration):
    name: str = "mine"
    auto_class: str = "AutoModelForTokenClassification"


TASK = Masked()
"""


def test_a_task_of_a_plugin_has_the_models_that_no_other_knows(install: Install, tmp_path: Path) -> None:
    config = {"architectures": ["BertForTokenClassification"], "model_type": "bert"}
    with pytest.raises(BillhookError, match="only models for"):
        task_of_config(tmp_path, config)
    install("task-plugin", {"task:mine": "plugin_t:TASK", "task:no": "plugin_t:dataclass"}, plugin_t=TASK)
    assert task_of_config(tmp_path, config).name == "mine"
    known = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    assert task_of_config(tmp_path, known).name == "text-generation"
    with pytest.raises(BillhookError, match=r"The task 'no' of task-plugin .* is not a task: it has no auto_class"):
        TASKS.get("no")


def test_a_registry_without_plugins_ignores_them(install: Install) -> None:
    install("even-plugin", {"allocator:even": "plugin_a:even"}, plugin_a=METHOD)
    assert Registry("allocator", PLACES).names() == ["uniform"]


def test_listing_and_checking_names_import_no_plugin(install: Install) -> None:
    install("bad-plugin", {"allocator:bad": "plugin_bad:bad"}, plugin_bad="raise RuntimeError('imported')")
    registry = allocators()
    assert "bad" in registry.names()
    registry.check("bad")
    assert "plugin_bad" not in sys.modules


def test_a_plugin_does_not_replace_a_built_in_method(install: Install) -> None:
    install("even-plugin", {"allocator:uniform": "plugin_a:even"}, plugin_a=METHOD)
    registry = allocators()
    assert registry.names() == ["uniform"]
    assert registry.get("uniform").__module__ == "billhook.plan.allocators.uniform"


def test_unknown_names_get_hints_from_plugins_too(install: Install) -> None:
    install("even-plugin", {"allocator:even": "plugin_a:even"}, plugin_a=METHOD)
    with pytest.raises(BillhookError, match=r"Unknown allocator 'evn'\. Did you mean 'even'\?"):
        allocators().get("evn")


@pytest.mark.parametrize(
    "place, source, message",
    [
        ("plugin_c:even", "import no_such_module", "cannot be loaded: ModuleNotFoundError"),
        ("plugin_d:missing", METHOD, "cannot be loaded: AttributeError"),
        ("plugin_e:even", "1 / 0", "cannot be loaded: ZeroDivisionError"),
        ("plugin_f:unmarked", METHOD, "is not a method: mark it with @billhook.registry.method"),
    ],
)
def test_errors_of_a_broken_plugin_name_its_distribution(
    install: Install, place: str, source: str, message: str
) -> None:
    install("broken-plugin", {"allocator:even": place}, **{place.partition(":")[0]: source})
    with pytest.raises(BillhookError, match=rf"'even' of broken-plugin 2\.1 \({place}\) {message}"):
        allocators().get("even")


def test_two_distributions_that_declare_one_name_are_both_named(install: Install) -> None:
    install("first-plugin", {"allocator:even": "plugin_a:even"}, plugin_a=METHOD)
    install("second-plugin", {"allocator:even": "plugin_a:even"})
    with pytest.raises(BillhookError, match=r"(first|second)-plugin 2\.1 and (first|second)-plugin 2\.1: uninstall"):
        allocators().get("even")


def test_the_command_line_knows_an_installed_allocator(install: Install, tmp_path: Path) -> None:
    install("even-plugin", {"allocator:even": "plugin_a:even"}, plugin_a=METHOD)
    result = CliRunner().invoke(app, ["ls", "allocators", "--json"])
    assert result.exit_code == 0, result.output
    listed = {entry["name"]: entry for entry in json.loads(result.stdout)["allocators"]}
    assert listed["even"]["options"] == {"power": 1.0}
    assert list(listed) == [*(name for name in ALLOCATORS.names() if name != "even"), "even", *ON_MODEL]


def test_built_in_names_do_not_read_entry_points() -> None:
    code = (
        "from billhook.plan.allocators import ALLOCATORS\n"
        "ALLOCATORS.configure('owl', {})\n"
        "assert 'importlib.metadata' not in sys.modules\n"
        "ALLOCATORS.names()\n"
        "report(0)"
    )
    report = in_new_interpreter(code)
    assert report["code"] == 0, report["errors"]
    assert not HEAVY & set(report["loaded"])

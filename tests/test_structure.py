"""The structure of the code: imports point one way, and only commands know flags."""

import ast
import re
from pathlib import Path

import pytest
from conftest import ROOT

# From the top to the bottom. A module may import those of lower layers, and of its own without a cycle.
COMMANDS = ("main", "tools", "segmentation", "detection", *(f"dense.{name}" for name in
            ("flops", "predict", "settings", "test", "train")))  # fmt: skip
LAYERS = (COMMANDS, ("engine", "datasets"), ("training", "dense"), ("samplers", "sepvit", "utils"))
# What `pip install .` brings to a host program, which may have a `utils` and a `datasets` of its own.
INSTALLED = ("sepvit", "dense.backbone", "dense.loading", "dense.runner")
NOT_INSTALLED = ("utils", "datasets", "samplers", "engine", "main")


def modules() -> dict[str, Path]:
    """All modules of this project but the tests, by name."""
    paths = [*ROOT.glob("*.py")]
    for folder in ("training", "dense", "tools", "segmentation", "detection"):
        paths += [path for path in (ROOT / folder).glob("*.py")]
    named = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}
    return {name.removesuffix(".__init__"): path for name, path in named.items()}


MODULES = modules()


def imports_of(path: Path, at_import: bool = False) -> set[str]:
    """This project's modules that a module imports.

    Args:
        path: the module's file.
        at_import: only those imported with the module itself, not within functions.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if at_import else list(ast.walk(tree))
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & MODULES.keys()


GRAPH = {name: imports_of(path) for name, path in MODULES.items()}


def layer_of(name: str) -> int:
    """The layer of a module: that of the longest matching entry."""
    matches = [(len(entry), layer) for layer, entries in enumerate(LAYERS) for entry in entries
               if name == entry or name.startswith(f"{entry}.")]  # fmt: skip
    return max(matches)[1]


def reached(name: str) -> set[str]:
    """All modules that importing a module brings along."""
    seen, rest = set(), [name]
    while rest:
        module = rest.pop()
        if module not in seen:
            seen.add(module)
            rest += GRAPH[module]
    return seen


def test_the_project_is_found():
    assert {"main", "engine", "training.state", "dense.backbone", "tools.benchmark"} <= MODULES.keys()
    assert "training.state" in GRAPH["engine"]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_down(name):
    for other in GRAPH[name]:
        assert layer_of(other) >= layer_of(name), f"{name} imports {other}, of a higher layer"
    assert name not in {module for other in GRAPH[name] for module in reached(other)}, "it imports itself in a circle"


def test_shared_code_imports_no_tool():
    importers = [name for name, others in GRAPH.items() if any(other.startswith("tools.") for other in others)]
    assert [name for name in importers if not name.startswith("tools.")] == []


@pytest.mark.parametrize("name", INSTALLED)
def test_installed_modules_need_nothing_that_hosts_may_shadow(name):
    assert reached(name) & set(NOT_INSTALLED) == set()


BELOW_COMMANDS = sorted(name for name in MODULES if layer_of(name) > 0)


def texts_of(path: Path) -> list[str]:
    """All string literals of a module but its docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {id(node.body[0].value) for node in ast.walk(tree)
                  if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and node.body
                  and isinstance(node.body[0], ast.Expr)}  # fmt: skip
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in docstrings]
    return [node.value for node in constants if isinstance(node.value, str)]


def flags() -> set[str]:
    """All flags of main.py, in both spellings."""
    import main

    names = {flag for flag in main.build_parser().flags().values() if flag.startswith("--")}
    return {spelled for flag in names for spelled in (flag, flag.replace("_", "-"), "--" + flag[2:].replace("-", "_"))}


@pytest.mark.parametrize("name", BELOW_COMMANDS)
def test_only_commands_name_flags(name):
    known = flags()
    named = {flag for text in texts_of(MODULES[name]) for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", text)}
    assert named & known == set(), "write setting('name'), see training/errors.py"


def test_settings_in_messages_are_settings():
    """A name that `setting` mentions is one that main.py knows, so that it becomes a flag."""
    import main

    known = main.build_parser().flags()
    for name in BELOW_COMMANDS:
        tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            is_call = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setting"
            if is_call and isinstance(node.args[0], ast.Constant):
                assert node.args[0].value in known, f"{name}, line {node.lineno}"


def test_no_namespace_below_the_commands():
    """Only main.py's builders, and the code that parses, see argparse's Namespace."""
    users = [name for name in BELOW_COMMANDS if "argparse.Namespace" in MODULES[name].read_text(encoding="utf-8")]
    parsing = ["training.commands", "training.recipes"]
    assert [name for name in users if name not in parsing] == ["training.checkpoints"]  # published files contain one


def test_readme_fits():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 180


def test_links_of_the_documents_lead_somewhere():
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name}: {link}"

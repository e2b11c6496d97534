"""The structure of the code: imports point one way, and only commands name flags."""

import ast
import re
from pathlib import Path

import pytest
from conftest import ROOT

# From top to bottom. A module may import from lower layers, and from its own layer without a cycle.
COMMANDS = (
    "main",
    "predict",
    "hubconf",
    "tools",
    "benchmarks",
    "segmentation",
    "detection",
    "sepvit_lib.mm.commands",
    "sepvit_lib.mm.config",
)
LAYERS = (COMMANDS, ("engine", "datasets"), ("utils", "samplers"), ("sepvit_lib",), ("sepvit",))


def modules() -> dict[str, Path]:
    """All modules of this project except the tests, by name."""
    paths = [*ROOT.glob("*.py"), *ROOT.glob("segmentation/*.py"), *ROOT.glob("detection/*.py")]
    paths += [path for folder in ("sepvit_lib", "tools", "benchmarks") for path in ROOT.glob(f"{folder}/**/*.py")]
    named = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}
    return {name.removesuffix(".__init__"): path for name, path in named.items()}


MODULES = modules()


def imports_of(path: Path, at_import: bool = False) -> set[str]:
    """This project's modules that a module imports.

    Args:
        path: the module's file.
        at_import: only imports at module level, not those in functions.
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
    """The layer of a module, by its longest matching entry."""
    matches = [
        (len(entry), layer)
        for layer, entries in enumerate(LAYERS)
        for entry in entries
        if name == entry or name.startswith(f"{entry}.")
    ]
    return max(matches)[1]


def reached(name: str) -> set[str]:
    """A module and all modules that it imports, directly or not."""
    seen, rest = set(), [name]
    while rest:
        module = rest.pop()
        if module not in seen:
            seen.add(module)
            rest += GRAPH[module]
    return seen


def test_modules_and_imports_are_found():
    assert {"main", "engine", "sepvit_lib.mm.backbone", "tools.export", "benchmarks.benchmark"} <= MODULES.keys()
    assert "sepvit_lib.run.state" in GRAPH["engine"]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_down(name):
    for other in GRAPH[name]:
        assert layer_of(other) >= layer_of(name), f"{name} imports {other}, of a higher layer"
    assert name not in {module for other in GRAPH[name] for module in reached(other)}, "it imports itself in a circle"


WALLS = {  # packages of sepvit_lib, and what each may import of it
    "common": set(),
    "pipeline": {"common"},
    "run": {"common", "pipeline"},
    "inference": {"common", "pipeline", "run", "networks"},
    "report": {"common", "pipeline", "run", "inference"},
}


@pytest.mark.parametrize("package", WALLS)
def test_packages_of_the_library_have_walls(package):
    own = [name for name in MODULES if name.startswith(f"sepvit_lib.{package}.")]
    assert own
    for name in own:
        imported = {other.split(".")[1] for other in GRAPH[name] if other.startswith("sepvit_lib.")}
        assert imported <= WALLS[package] | {package}, f"{name} imports {imported}"


@pytest.mark.parametrize(
    ("folder", "importers"), [("tools.", ("tools.", "benchmarks.")), ("benchmarks.", "benchmarks.")]
)
def test_who_imports_tools_and_benchmarks(folder, importers):
    found = [name for name, others in GRAPH.items() if any(other.startswith(folder) for other in others)]
    assert [name for name in found if not name.startswith(importers)] == []


def test_only_tests_import_tests():
    names = "|".join(path.stem for path in (ROOT / "tests").glob("*.py"))
    for name, path in MODULES.items():
        pattern = rf"^\s*(import|from) (tests\b|({names})\b)"
        assert not re.search(pattern, path.read_text(encoding="utf-8"), re.MULTILINE), name


INSTALLED = sorted(name for name in MODULES if name.partition(".")[0] in ("sepvit", "sepvit_lib"))


@pytest.mark.parametrize("name", INSTALLED)
def test_installed_modules_import_nothing_that_hosts_may_shadow(name):
    """A host program may have its own `utils`, `datasets` and so on."""
    assert GRAPH[name] <= set(INSTALLED)


BELOW_COMMANDS = sorted(name for name in MODULES if layer_of(name) > 0)


def texts_of(path: Path) -> list[str]:
    """All string literals of a module except docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
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
    assert named & known == set(), "write setting('name'), see sepvit_lib/common/errors.py"


def settings_added_by(name: str) -> set[str]:
    """Settings whose flags a module adds to a parser. Read from its source, since it imports mmengine."""
    nodes = ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8")))
    texts = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return {text[2:].replace("-", "_") for text in texts if re.fullmatch(r"--[a-z-]+", text)}


def test_messages_mention_existing_settings():
    """Names passed to `setting` are settings of main.py, of predict.py or of train.py, so they become flags."""
    import main
    import predict

    known = main.build_parser().flags().keys() | predict.build_parser().flags().keys()
    known |= settings_added_by("sepvit_lib.mm.commands.train") | settings_added_by("sepvit_lib.mm.config")
    for name in BELOW_COMMANDS:
        tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            is_call = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setting"
            if is_call and isinstance(node.args[0], ast.Constant):
                assert node.args[0].value in known, f"{name}, line {node.lineno}"


def test_no_namespace_below_the_commands():
    """Only main.py's builders and the parsing code use argparse.Namespace."""
    users = [name for name in BELOW_COMMANDS if "argparse.Namespace" in MODULES[name].read_text(encoding="utf-8")]
    parsing = ["sepvit_lib.common.command_line", "sepvit_lib.common.recipes"]
    published = ["sepvit_lib.common.saved_settings", "sepvit_lib.run.checkpoints"]  # have one in their files
    assert [name for name in users if name not in parsing] == published


def test_readme_length():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 180


def test_links_in_the_documents_exist():
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name}: {link}"

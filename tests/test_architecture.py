"""The rules that hold the code in shape: who imports whom, how long things are, what is listed."""

import ast
import importlib
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "dynamic_lora_adapters": ROOT / "adapters" / "dynamic_lora_adapters",
    "dynamic_lora_server": ROOT / "server" / "dynamic_lora_server",
    "dynamic_lora_client": ROOT / "clients" / "dynamic_lora_client",
}
MAY_IMPORT: dict[str, set[str]] = {
    "dynamic_lora_adapters": set(),
    "dynamic_lora_server": {"dynamic_lora_adapters"},
    "dynamic_lora_client": set(),
}
NEVER_IMPORTED = {"benchmarks", "tests"}
HEAVY = {"torch", "transformers", "peft"}
MAX_FUNCTION_LINES = 60
MAX_MODULE_LINES = 350


def modules() -> Iterator[Path]:
    for folder in PACKAGES.values():
        yield from sorted(folder.rglob("*.py"))


def name(path: Path) -> str:
    return str(path.relative_to(path.parents[len(path.relative_to(ROOT).parts) - 2]))


ALL = {name(path): path for path in modules()}


def imports(tree: ast.Module, *, top_level_only: bool = False) -> set[str]:
    """Modules that a file imports at run time (not those under TYPE_CHECKING)."""
    found: set[str] = set()
    nodes: list[ast.AST] = [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update(_imported(node.module, alias.name) for alias in node.names)
        if top_level_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        nodes.extend(ast.iter_child_nodes(node))
    return found


def _imported(module: str, attribute: str) -> str:
    """`from a import b` imports the module a.b where there is one, else a."""
    submodule = f"{module}.{attribute}"
    return submodule if submodule in {module_name(path) for path in ALL} else module


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@pytest.mark.parametrize("path", ALL)
def test_imports_point_one_way(path: str) -> None:
    package = path.split("/")[0]
    allowed = MAY_IMPORT[package] | {package}
    for imported in imports(ast.parse(ALL[path].read_text())):
        top = imported.split(".")[0]
        refused = (PACKAGES.keys() | NEVER_IMPORTED) - allowed
        assert top not in refused, f"{path} imports {imported}"


def import_graph() -> dict[str, set[str]]:
    known = {module_name(path) for path in ALL}
    return {
        module_name(path): imports(ast.parse(file.read_text()), top_level_only=True) & known
        for path, file in ALL.items()
    }


def refuse_cycles(graph: dict[str, set[str]]) -> None:
    done: set[str] = set()

    def visit(node: str, trail: tuple[str, ...]) -> None:
        assert node not in trail, " -> ".join([*trail[trail.index(node) :], node])
        if node not in done:
            for imported in sorted(graph[node] - {node}):
                visit(imported, (*trail, node))
            done.add(node)

    for node in sorted(graph):
        visit(node, ())


def test_no_import_cycles() -> None:
    refuse_cycles(import_graph())


def test_no_import_cycles_between_subpackages() -> None:
    """Modules that lie in a package beside its subpackages may be above or below these."""
    packages = {module_name(path) for path in ALL if path.endswith("__init__.py")}
    subpackages = {
        package
        for package in packages
        if "." in package and not any(other.startswith(f"{package}.") for other in packages)
    }
    graph: dict[str, set[str]] = {package: set() for package in subpackages}
    for module, imported in import_graph().items():
        home = package_of(module, packages)
        if home in subpackages:
            graph[home] |= {package_of(other, packages) for other in imported} & subpackages
    assert graph["dynamic_lora_adapters.device"] >= {"dynamic_lora_adapters.kernels"}
    refuse_cycles(graph)


def package_of(module: str, packages: set[str]) -> str:
    return module if module in packages else module.rpartition(".")[0]


IMPORTING = """
import importlib, sys, types
# The package itself exports what does need torch: only its path is wanted here.
package = types.ModuleType("dynamic_lora_adapters")
package.__path__ = [sys.argv.pop(1)]
sys.modules["dynamic_lora_adapters"] = package
for name in sys.argv[2:]:
    importlib.import_module(name)
    if brought := sys.modules.keys() & set(sys.argv[1].split()):
        sys.exit(f"{name} imports {', '.join(sorted(brought))}")
"""


def test_modules_that_say_so_import_no_torch() -> None:
    """Policies and bookkeeping are tested without tensors, so they must not need them."""
    docs = {path: ast.get_docstring(ast.parse(file.read_text())) for path, file in ALL.items()}
    without = [
        path for path, doc in docs.items() if "Imports no torch" in " ".join((doc or "").split())
    ]
    assert "dynamic_lora_server/engine/scheduler.py" in without
    names = [module_name(path) for path in without]
    folder = str(PACKAGES["dynamic_lora_adapters"])
    command = [sys.executable, "-c", IMPORTING, folder, " ".join(HEAVY), *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", ALL)
def test_modules_and_functions_are_short(path: str) -> None:
    source = ALL[path].read_text()
    assert source.count("\n") <= MAX_MODULE_LINES, f"{path} is too long"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{path}: {node.name} has {length} lines"


@pytest.mark.parametrize("path", ALL)
def test_every_module_says_what_it_is(path: str) -> None:
    assert ast.get_docstring(ast.parse(ALL[path].read_text())), f"{path} has no docstring"


@pytest.mark.parametrize("package", PACKAGES)
def test_exports_are_sorted_and_real(package: str) -> None:
    module = importlib.import_module(package)
    exported = getattr(module, "__all__", [])
    assert exported == sorted(exported)
    for export in exported:
        assert hasattr(module, export)


def test_every_header_is_part_of_a_library() -> None:
    folder = PACKAGES["dynamic_lora_adapters"] / "native"
    included = {
        found
        for source in folder.iterdir()
        if source.suffix in (".cpp", ".h")
        for found in re.findall(r'^#include "(.+)"', source.read_text(), re.MULTILINE)
    }
    assert {header.name for header in folder.glob("*.h")} == included


def test_architecture_page_lists_packages_and_modules_with_what_they_are() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    listed: dict[str, str] = {}
    for package, table in re.findall(r"^### `\w+/(\w+)/`$(.*?)(?=^#|\Z)", page, re.M | re.S):
        rows = re.findall(r"^\| (?:\*\*)?`([a-z0-9_/.]+)`(?:\*\*)? \| (.+) \|$", table, re.M)
        assert rows == sorted(rows), "not in the order of the alphabet"
        listed |= {f"{package}/{path}": what.strip("*") for path, what in rows}
    wanted = {
        path.removesuffix("__init__.py"): (
            ast.get_docstring(ast.parse(file.read_text())) or ""
        ).split("\n")[0]
        for path, file in ALL.items()
        if path.count("/") > 1 or not path.endswith("__init__.py")
    }
    assert listed == wanted


def test_version_is_that_of_the_changelog() -> None:
    version = importlib.metadata.version("dynamic-lora")
    changelog = (ROOT / "CHANGELOG.md").read_text()
    released = re.search(r"^## \[(\d+\.\d+\.\d+)\]", changelog, re.MULTILINE)
    assert released is not None
    assert released[1] == version

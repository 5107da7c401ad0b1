"""Imports run one way, prefill_jobs -> prefill_router <- prefill_serve, and no folder shadows the standard library."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PACKAGES = {"prefill_router": "platform", "prefill_jobs": "jobs", "prefill_serve": "serve"}
FORBIDDEN = {
    "prefill_router": {"ray", "prefill_jobs", "prefill_serve"},
    "prefill_jobs": {"prefill_serve"},
    "prefill_serve": {"prefill_jobs"},
}


def sources(package: str) -> list[Path]:
    return sorted((REPOSITORY / PACKAGES[package] / package).rglob("*.py"))


def imported(source: Path) -> set[str]:
    """The top-level names of all that a file imports, at any depth, by importlib with a literal name too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text(), str(source))):
        match node:
            case ast.Import():
                names |= {alias.name.partition(".")[0] for alias in node.names}
            case ast.ImportFrom(module=str(module), level=0):
                names.add(module.partition(".")[0])
            case ast.Call(
                func=ast.Name(id="__import__" | "import_module") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(module)), *_],
            ):
                names.add(module.partition(".")[0])
    return names


def run(code: str, cwd: Path) -> str:
    result = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_imports_are_found_at_any_depth(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "def f():\n    import ray.data\n    from a.b import c\n    importlib.import_module('d.e')\nfrom . import x"
    )
    assert imported(path) == {"ray", "a", "d"}


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_one_way(package: str) -> None:
    assert sources(package)
    broken = {str(path): bad for path in sources(package) if (bad := imported(path) & FORBIDDEN[package])}
    assert broken == {}


def test_the_core_loads_without_ray(tmp_path: Path) -> None:
    root = REPOSITORY / "platform"
    paths = [path.relative_to(root).with_suffix("") for path in sources("prefill_router") if path.stem != "__init__"]
    modules = [".".join(path.parts) for path in paths]
    code = f"import sys, importlib\nfor m in {modules}: importlib.import_module(m)\nprint('ray' in sys.modules)"
    assert run(code, tmp_path).strip() == "False"


def test_the_standard_librarys_platform_is_not_shadowed() -> None:
    assert run("import platform; print(platform.system())", REPOSITORY).strip()


@pytest.mark.parametrize(("package", "root"), PACKAGES.items())
def test_a_source_root_holds_its_package_and_no_loose_module(package: str, root: str) -> None:
    assert list((REPOSITORY / root).glob("*.py")) == []
    found = {path.parent.name for path in (REPOSITORY / root).glob("*/__init__.py")}
    assert found == {package}

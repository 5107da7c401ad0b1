"""Packages: each name stands for one thing, the core loads without Ray, nothing shadows the standard library.

Which package may import which is import-linter's to check, by its contracts in pyproject.toml.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PACKAGES = {"prefill_router": "platform", "prefill_jobs": "jobs", "prefill_serve": "serve"}


def sources(package: str) -> list[Path]:
    return sorted((REPOSITORY / PACKAGES[package] / package).rglob("*.py"))


def run(code: str, cwd: Path) -> str:
    result = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_name_stands_for_one_thing_in_the_tree() -> None:
    """Of modules and of public classes: who greps for one finds what is meant, and nothing else."""
    places = Counter[str]()
    for source in (path for package in PACKAGES for path in sources(package)):
        tree = ast.parse(source.read_text(), str(source))
        places.update(node.name for node in tree.body if isinstance(node, ast.ClassDef) and node.name[0] != "_")
        places[source.parent.name if source.stem == "__init__" else source.stem] += 1
    assert len(places) > 400
    assert [name for name, number in places.items() if number > 1] == []


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

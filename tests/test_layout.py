"""Imports go one way, one module speaks to LLaMA-Factory, and one starts processes."""

import ast
from collections.abc import Iterator
from pathlib import Path

from conftest import ROOT

SOURCE = ROOT / "src" / "mcp_lora"
# Each may import what stands before it in another row.
FLOORS = [
    ["errors"],
    ["data"],
    ["engine", "prompts"],
    ["demo_model"],
    ["train"],
    ["evaluate"],
    ["live", "serve"],
    ["report"],
    ["doctor"],
    ["cli"],
]
MODULES = [file for file in SOURCE.rglob("*.py") if file.name not in ("__init__.py", "__main__.py")]


def imported(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "mcp_lora":
            yield from (f"mcp_lora.{name.name}" for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def room(file: Path) -> str:
    return file.relative_to(SOURCE).with_suffix("").parts[0]


def test_imports_go_one_way() -> None:
    floor = {name: number for number, row in enumerate(FLOORS) for name in row}
    assert {room(file) for file in MODULES} == floor.keys()
    wrong = []
    for file in MODULES:
        for name in imported(file):
            package, _, inner = name.partition(".")
            other = inner.split(".")[0]
            if package == "mcp_lora" and other != room(file) and floor[other] >= floor[room(file)]:
                wrong.append(f"{file.relative_to(SOURCE)} imports {name}")
    assert wrong == []


def test_one_module_speaks_to_the_engine_and_one_starts_processes() -> None:
    def importers(package: str) -> list[str]:
        found = [file for file in MODULES if any(name.split(".")[0] == package for name in imported(file))]
        return [str(file.relative_to(SOURCE)) for file in found]

    assert importers("llamafactory") == ["engine/api.py"]
    assert importers("subprocess") == ["engine/launch.py"]

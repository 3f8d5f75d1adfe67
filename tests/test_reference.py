"""docs/commands.md is what the commands' own help says."""

import runpy

import pytest
from conftest import ROOT


@pytest.mark.parametrize("columns", ["40", "200"])
def test_the_command_reference_is_up_to_date(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("FORCE_COLOR", "1")
    script = runpy.run_path(str(ROOT / "scripts" / "make_reference.py"))
    shown = script["FILE"].read_text(encoding="utf-8")
    assert shown == script["reference"](), "run python scripts/make_reference.py"

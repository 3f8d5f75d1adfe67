"""The demo, as a newcomer runs it: pytest -m demo."""

import json
import subprocess

import pytest
from conftest import ROOT, environment


@pytest.mark.demo
def test_the_demos_figures() -> None:
    done = subprocess.run(
        ["./scripts/train_lora.sh", "demo"], cwd=ROOT, capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    metrics = json.loads((ROOT / "outputs/demo/eval/metrics.json").read_text())
    splits = metrics["splits"]
    assert list(splits) == ["seen", "unseen_tool", "unseen_server", "no_call"]
    base, adapter = (splits["seen"]["figures"][model] for model in ("base", "adapter"))
    assert base["valid"]["share"] <= 0.05
    assert adapter["valid"]["share"] >= 0.95
    assert adapter["tool"]["share"] >= 0.70
    assert adapter["exact"]["share"] >= 0.40
    assert splits["unseen_tool"]["gains"]["adapter"]["tool"]["low"] > 0.2
    assert "held-out questions" in done.stdout
    assert "the report is outputs/demo/report.html" in done.stderr
    page = (ROOT / "outputs/demo/report.html").read_text(encoding="utf-8")
    assert page.count('<div class="card tile">') == len(splits)

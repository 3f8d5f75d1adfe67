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
    base, adapter = (metrics["splits"]["seen"]["figures"][model] for model in ("base", "adapter"))
    assert base["valid"]["share"] <= 0.05
    assert adapter["valid"]["share"] >= 0.95
    assert adapter["tool"]["share"] >= 0.70
    assert adapter["exact"]["share"] >= 0.40
    assert "held-out questions" in done.stdout

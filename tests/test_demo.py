"""The demo, as a newcomer runs it: pytest -m demo."""

import json
import subprocess

import pytest
from conftest import ROOT, environment

from mcp_lora.cli.demo import plan

COUNTS = [27, 33, 12, 17]  # questions of each split


@pytest.mark.parametrize(
    ("minutes", "rate", "limit", "tokens"),
    [(10, 240.0, 14, 79_200), (15, 100.0, 9, 52_200), (60, 240.0, 33, 771_200), (5, 20.0, 5, 3_500)],
)
def test_the_time_decides_how_much_is_asked_and_trained(
    minutes: int, rate: float, limit: int, tokens: int
) -> None:
    asked, epochs = plan(60 * minutes, rate, 35_000, COUNTS)
    assert (asked, round(epochs * 35_000)) == (limit, tokens)


@pytest.mark.demo
def test_the_demos_figures() -> None:
    done = subprocess.run(
        ["./scripts/train_lora.sh", "demo"], cwd=ROOT, capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    folder = ROOT / "outputs/demo/eval"  # of all questions, or on a slow machine of some
    (file,) = (place for name in ("metrics", "metrics_part") if (place := folder / f"{name}.json").is_file())
    metrics = json.loads(file.read_text())
    splits = metrics["splits"]
    assert list(splits) == ["seen", "unseen_tool", "unseen_server", "no_call"]
    base, adapter = (splits["seen"]["figures"][model] for model in ("base", "adapter"))
    assert base["valid"]["share"] <= 0.05
    assert adapter["valid"]["share"] >= 0.90
    assert adapter["tool"]["share"] >= 0.30
    assert splits["unseen_tool"]["figures"]["adapter"]["tool"]["share"] >= 0.1
    assert metrics["plain_chat"]["divergence"] > 0
    assert "The right tool of ten: 0 → " in done.stdout and "outputs/demo/report.html; next:" in done.stdout
    page = (ROOT / "outputs/demo/report.html").read_text(encoding="utf-8")
    assert page.count('<div class="card tile">') == len(splits)

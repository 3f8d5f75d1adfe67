"""What an installation from the wheel has, in an empty folder: recipes, the sample, the page's template."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, run


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but what the wheel contains."""
    folder = tmp_path_factory.mktemp("wheel")
    words = [sys.executable, "-m", "pip", "wheel", ROOT, "--no-deps", "--no-build-isolation", "--quiet", "-w"]
    subprocess.run([*words, folder], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def test_it_works_in_an_empty_folder(site: Path, tmp_path: Path, tiny_model: Path) -> None:
    def succeed(*words: object) -> str:
        done = run([sys.executable, "-m", "mcp_lora", *words], tmp_path, PYTHONPATH=str(site))
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    assert succeed("recipe", "qlora") == (ROOT / "train_configs/qlora.yaml").read_text(encoding="utf-8")
    sample = next(site.rglob("filtered_sample.json"))
    succeed("convert", sample, "--candidates", "3")
    plan = succeed("train", "--model", tiny_model, "--config", "demo", "--zero", "0", "--dry-run")
    assert f"deepspeed: {site / 'mcp_lora/train_configs/ds_z0_config.json'}" in plan
    found = subprocess.run(
        [sys.executable, "-c", "import mcp_lora, sys; print(mcp_lora.__file__)"],
        env={"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert found.stdout.strip() == str(site / "mcp_lora/__init__.py")  # and not the checkout's
    assert [file.name for file in (site / "mcp_lora").rglob("page.html")] == ["page.html"]
    assert [file.name for file in (site / "mcp_lora").rglob("*.jinja")] == ["fallback.jinja"]


def test_the_demo_finds_the_sample_of_the_wheel(site: Path, tmp_path: Path) -> None:
    script = "from mcp_lora.data.conversion import shipped_sample; print(shipped_sample())"
    done = run([sys.executable, "-c", script], tmp_path, PYTHONPATH=str(site))
    assert done.stdout.strip() == str(site / "mcp_lora/filtered_sample.json")

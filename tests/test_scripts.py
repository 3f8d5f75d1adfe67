"""scripts/environment.sh: which environment is used, and what is said of one that will not do."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def set_up(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Source the script in a folder and call its function, up to the installation of what is not there."""
    kept = {key: value for key, value in os.environ.items() if key not in ("VIRTUAL_ENV", "CONDA_PREFIX")}
    script = f'source "{ROOT}/scripts/environment.sh"; setup .; python -c "import sys; print(sys.prefix)"'
    argv = ["bash", "-c", script, "scripts/train_lora.sh"]
    return subprocess.run(argv, cwd=folder, env=kept | variables, capture_output=True, text=True)


@pytest.mark.parametrize("variables", [{}, {"CONDA_PREFIX": "/opt/conda", "CONDA_DEFAULT_ENV": "base"}])
def test_without_an_environment_of_ones_own_one_is_made_with_pip(
    tmp_path: Path, variables: dict[str, str]
) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", ".venv"], cwd=tmp_path, check=True)
    done = set_up(tmp_path, **variables)
    assert done.stdout.splitlines()[-1] == str(tmp_path / ".venv")
    assert list(tmp_path.glob(".venv/bin/pip*"))


def test_an_environment_of_ones_own_is_used(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "mine"], cwd=tmp_path, check=True)
    path = f"{tmp_path}/mine/bin:{os.environ['PATH']}"
    done = set_up(tmp_path, CONDA_PREFIX=f"{tmp_path}/mine", CONDA_DEFAULT_ENV="mine", PATH=path)
    assert done.stdout.splitlines()[-1] == str(tmp_path / "mine")
    assert not (tmp_path / ".venv").exists()


def test_the_pinned_versions_are_those_that_are_allowed() -> None:
    lines = (ROOT / "scripts/constraints.txt").read_text().splitlines()
    pinned = {
        canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    for requirement in map(Requirement, required):
        if requirement.name != "mcp-lora":
            assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement


@pytest.mark.parametrize(("own", "active"), [(False, False), (False, True), (True, True)])
def test_the_versions_are_pinned_but_in_an_environment_of_ones_own(
    tmp_path: Path, own: bool, active: bool
) -> None:
    name = "mine" if own else ".venv"
    folder = tmp_path / name / "bin"
    folder.mkdir(parents=True)
    (folder / "activate").write_text(f'PATH="{folder}:$PATH"\n')
    (folder / "python").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\necho {tmp_path}\n')
    (folder / "python").chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    set_up(tmp_path, **({"VIRTUAL_ENV": f"{tmp_path}/{name}", "PATH": path} if active else {}))
    (install,) = [line for line in (tmp_path / "calls").read_text().splitlines() if "install" in line]
    assert ("--constraint scripts/constraints.txt" in install) is not own and install.endswith("--editable .")


@pytest.mark.parametrize("active", [False, True])
def test_an_old_python_is_named_with_what_to_do(tmp_path: Path, active: bool) -> None:
    folder = tmp_path / ".venv" / "bin"
    folder.mkdir(parents=True)
    (folder / "activate").write_text(f'PATH="{folder}:$PATH"\n')
    (folder / "python").write_text(
        '#!/bin/sh\ncase "$*" in *version_info*) exit 1;; esac\necho Python 3.9.1\n'
    )
    (folder / "python").chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    done = set_up(tmp_path, **({"VIRTUAL_ENV": f"{tmp_path}/.venv", "PATH": path} if active else {}))
    assert "Python 3.9.1" in done.stderr and "PYTHON=python3.12 scripts/train_lora.sh" in done.stderr
    assert ("deactivate" in done.stderr) == active and ("rm -r .venv" in done.stderr) != active
    assert "installing" not in done.stdout

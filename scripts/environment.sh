# Sourced by the other scripts: an environment with mcp-lora in it.

# setup WHAT: activate .venv where no environment is active (making it), and install WHAT
# (. or .[dev], which holds .) unless that has been done for this pyproject.toml. Conda's base counts as
# none: it is everybody's. In .venv the versions are those that the tests ran with (constraints.txt); an
# environment of the user's own keeps what it has, such as torch for its driver.
setup() {
    local active="${VIRTUAL_ENV:-}${CONDA_PREFIX:-}"
    if [ -z "${VIRTUAL_ENV:-}" ] && { [ -z "${CONDA_PREFIX:-}" ] || [ "${CONDA_DEFAULT_ENV:-}" = base ]; }; then
        [ -x .venv/bin/python ] || { echo "== making .venv"; "${PYTHON:-python3}" -m venv .venv; }
        source .venv/bin/activate
        active=
    fi
    if ! python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "$(python --version) in $(command -v python) is too old, 3.11 is required:" \
            "$([ -n "$active" ] && echo "deactivate it" || echo "rm -r .venv"), and PYTHON=python3.12 $0" >&2
        return 1
    fi
    if ! python -c 'import pip' 2>/dev/null && ! python -m ensurepip > /dev/null; then  # as uv venv leaves it
        echo "$(command -v python) has no pip: uv pip install pip, and $0" >&2
        return 1
    fi
    local stamp
    stamp="$(python -c 'import sys; print(sys.prefix)')/mcp-lora-installed"
    if ! { grep -qF "$1" "$stamp" && [ "$stamp" -nt pyproject.toml ] &&
        [ "$stamp" -nt scripts/constraints.txt ]; } 2>/dev/null; then
        echo "== installing $1 (several GB the first time)"
        local versions=(--constraint scripts/constraints.txt)
        [ -z "$active" ] || [ "${VIRTUAL_ENV:-}" = "$PWD/.venv" ] || versions=()
        python -m pip install --quiet --no-compile ${versions[@]+"${versions[@]}"} --editable "$1"
        # on all cores, as pip takes one; some packages have files that are no Python
        local modules
        modules="$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
        PYTHONWARNINGS=ignore python -m compileall -qq -j 0 "$modules" || true
        # what was installed before the change of a file counts no more
        { [ "$stamp" -nt pyproject.toml ] && [ "$stamp" -nt scripts/constraints.txt ]; } || rm -f "$stamp"
        echo "$1" >> "$stamp"
    fi
}

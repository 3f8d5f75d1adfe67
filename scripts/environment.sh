# Sourced by the other scripts: an environment with mcp-lora in it.

# setup WHAT: activate .venv where no environment is active (making it), and install WHAT
# (. or .[dev], which holds .) unless that has been done for this pyproject.toml.
setup() {
    if [ -z "${VIRTUAL_ENV:-}" ] && [ -z "${CONDA_PREFIX:-}" ]; then
        [ -x .venv/bin/pip ] || { echo "== making .venv"; "${PYTHON:-python3}" -m venv .venv; }
        source .venv/bin/activate
    fi
    local stamp
    stamp="$(python -c 'import sys; print(sys.prefix)')/mcp-lora-installed"
    if ! { grep -qF "$1" "$stamp" && [ "$stamp" -nt pyproject.toml ]; } 2>/dev/null; then
        echo "== installing $1 (several GB the first time)"
        python -m pip install --quiet --editable "$1"
        [ "$stamp" -nt pyproject.toml ] || rm -f "$stamp"
        echo "$1" >> "$stamp"
    fi
}

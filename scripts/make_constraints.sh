#!/usr/bin/env bash
# Writes scripts/constraints.txt: the exact versions in this environment, to run after ./scripts/test.sh has passed.
set -euo pipefail
cd "$(dirname "$0")/.."
versions="$(python -m pip list --format=freeze --exclude-editable --exclude pip --exclude setuptools)"
{
    echo "# The versions that the tests ran with, on Linux with Python 3.11; made by scripts/make_constraints.sh."
    echo "$versions"
} > scripts/constraints.txt

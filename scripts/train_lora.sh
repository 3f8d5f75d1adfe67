#!/usr/bin/env bash
# Train, from nothing: makes .venv where no environment is active, installs once, runs.
#
#   ./scripts/train_lora.sh              the GPU recipe on the newest data/filtered/filtered_*.json
#   ./scripts/train_lora.sh KEY=VALUE …  the same with settings, or any option of mcp-lora train
#   ./scripts/train_lora.sh demo         the embedded model on the shipped sample, on the CPU (mcp-lora demo)
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
setup .

if [ "${1:-}" = demo ]; then
    mcp-lora "$@"
else
    mcp-lora train "$@"
fi

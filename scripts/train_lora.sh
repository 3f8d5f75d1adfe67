#!/usr/bin/env bash
# Train, from nothing: makes .venv where no environment is active, installs once, runs.
#
#   ./scripts/train_lora.sh              the GPU recipe on the newest data/filtered/filtered_*.json
#   ./scripts/train_lora.sh KEY=VALUE …  the same with settings, or any option of mcp-lora train
#   ./scripts/train_lora.sh demo         the embedded model on the shipped sample, on the CPU
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
setup .

if [ "${1:-}" = demo ]; then
    echo "== 1/3 convert: the shipped sample, 2 candidate tools, 15 % held out"
    mcp-lora convert data/filtered/filtered_sample.json --out data/demo --candidates 2 --test 0.15
    echo "== 2/3 train: SmolLM2-135M-Instruct on the CPU"
    CUDA_VISIBLE_DEVICES='' mcp-lora train --config train_configs/demo.yaml --model embedded --overwrite
    echo "== 3/3 eval: the held-out questions, base beside adapter"
    CUDA_VISIBLE_DEVICES='' mcp-lora eval outputs/demo
    echo "== in $SECONDS seconds. Next: mcp-lora chat outputs/demo, mcp-lora export outputs/demo"
else
    mcp-lora train "$@"
fi

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
    export CUDA_VISIBLE_DEVICES=
    echo "== 1/4 convert: the shipped sample, 2 candidate tools a question; questions, tools and a server held out"
    mcp-lora convert data/filtered/filtered_sample.json --out data/demo --candidates 2 --test 0.12 \
        --holdout-tools 0.15 --holdout-servers 0.15 --no-call 0.2
    echo "== 2/4 train: SmolLM2-135M-Instruct on the CPU, ten to twenty minutes"
    mcp-lora train --config train_configs/demo.yaml --model embedded --overwrite
    echo "== 3/4 eval: the held-out questions, put to the base model and to the adapter"
    mcp-lora eval outputs/demo
    echo "== 4/4 report: all of that on a page"
    mcp-lora report outputs/demo
    echo
    echo "== done in $((SECONDS / 60)) minutes. Open outputs/demo/report.html; next: mcp-lora chat outputs/demo"
else
    mcp-lora train "$@"
fi

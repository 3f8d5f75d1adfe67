"""Chat with a run's adapter in the terminal, by LLaMA-Factory."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mcp_lora.engine import api, launch
from mcp_lora.engine.topology import Topology
from mcp_lora.train import runs
from mcp_lora.train.machine import detect_machine


def chat(run: Path, checkpoint: str | None = None) -> None:
    """Chat with a run's adapter; raise a McpLoraError if it has none or the engine fails."""
    api.require()
    settings = runs.serving_config(run, runs.adapter(run, checkpoint))
    outcome = run_engine("chat", settings, hold_traceback=True)
    # LLaMA-Factory's chat raises at the end of its input
    raised = launch.real_error(outcome.stderr).startswith("EOFError")
    aborted = outcome.aborted_at_exit and "Traceback" not in outcome.stderr
    if outcome.code and not raised and not aborted:
        raise outcome.error(f"mcp-lora chat {run}")


def run_engine(verb: str, settings: Mapping[str, Any], hold_traceback: bool = False) -> launch.Outcome:
    """Run the engine's `verb` on all GPUs (see mcp_lora.engine.launch)."""
    gpus = detect_machine().gpus
    environment = launch.engine_environment(settings, Topology(gpus or 1), gpus, os.environ)
    return launch.run_engine(verb, settings, environment, hold_traceback)

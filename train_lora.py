"""`mcp-lora train`, as a script: by itself, or a worker under deepspeed or torchrun.

python train_lora.py
deepspeed --num_gpus=4 train_lora.py lora_rank=32
"""

import atexit
import os
import sys

try:
    from mcp_lora.cli.app import main
except ModuleNotFoundError as error:
    sys.exit(f"mcp-lora is not installed in this environment ({error.name}): pip install -e .")

if __name__ == "__main__":
    # The deepspeed launcher puts --local_rank=N first; LOCAL_RANK in the environment says it too.
    try:
        main(["train", *(word for word in sys.argv[1:] if not word.startswith("--local_rank"))])
    except SystemExit as end:
        if end.code:
            raise
    # Without the interpreter's finalization, in which a thread of gloo may abort, so that the launcher would
    # report a finished training as failed (pytorch/pytorch#179291).
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(0)

"""`mcp-lora train`, as a script: by itself, or under deepspeed or torchrun.

python train_lora.py
deepspeed --num_gpus=4 train_lora.py lora_rank=32
"""

import os
import sys

try:
    from mcp_lora.cli.app import main
    from mcp_lora.engine.topology import launched
    from mcp_lora.errors import McpLoraError
except ModuleNotFoundError as error:
    sys.exit(f"mcp-lora is not installed in this environment ({error.name}): pip install -e .")

if __name__ == "__main__":
    try:
        variables = launched(os.environ)
    except McpLoraError as error:
        sys.exit(f"mcp-lora: error: {error}")
    if variables is None:
        sys.exit()  # the first process of the node trains on all of its GPUs
    os.environ |= variables
    # The deepspeed launcher puts --local_rank=N first.
    main(["train", *(word for word in sys.argv[1:] if not word.startswith("--local_rank"))])

"""`mcp-lora train`, as a script: by itself, or a worker under deepspeed or torchrun.

python train_lora.py
deepspeed --num_gpus=4 train_lora.py lora_rank=32
"""

import sys

try:
    from mcp_lora.cli.app import main
except ModuleNotFoundError as error:
    sys.exit(f"mcp-lora is not installed in this environment ({error.name}): pip install -e .")

if __name__ == "__main__":
    # The deepspeed launcher puts --local_rank=N first; LOCAL_RANK in the environment says it too.
    main(["train", *(word for word in sys.argv[1:] if not word.startswith("--local_rank"))])

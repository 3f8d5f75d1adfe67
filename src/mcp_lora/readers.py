r"""Read the data that users have.

Filtered MCP data (`data/filtered/filtered_*.json`) is a list of records, one record alone, or
JSON Lines. One record:

    {"instruction": "What is 128 * 46?",
     "server_info": {"server_name": "calculator", "server_description": "Evaluates arithmetic"},
     "tool_info": {"tool_name": "calculate", "tool_description": "Evaluates the expression",
                   "input_schema": {"type": "object",
                                    "properties": {"expression": {"type": "string"}}}},
     "function_call": {"name": "calculate", "arguments": {"expression": "128 * 46"}},
     "tool_response": {"content": "{\"text\": \"5888\"}"},
     "final_response": "128 * 46 is 5888."}

`tool_response` and `final_response` are not read: the call alone is trained on.
"""

import json
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from mcp_lora.errors import McpLoraError
from mcp_lora.records import Example, Rejected, Tool, ToolCall

FILTERED_FOLDER = Path("data/filtered")
FILTERED = "filtered_*.json"
SAMPLE = "filtered_sample.json"


def newest_filtered(folder: Path = FILTERED_FOLDER) -> Path:
    """Return the newest `filtered_*.json` of `folder`.

    The date in the name (`filtered_20251113_175326.json`) counts, and the file's own where the
    name has none: copying and cloning change the file's. The shipped sample comes last.

    Raises:
        McpLoraError: the folder holds no such file.
    """
    files = list(folder.glob(FILTERED))
    if not files:
        raise McpLoraError(
            f"no filtered_*.json in {folder}: put your data there, or name it: mcp-lora convert FILE"
        )

    def age(file: Path) -> tuple[bool, str, str]:
        named = re.search(r"\d{8}_\d{6}", file.name)
        written = datetime.fromtimestamp(file.stat().st_mtime).strftime("%Y%m%d_%H%M%S")
        return file.name != SAMPLE, named.group() if named else written, file.name

    return max(files, key=age)


def read_rows(file: Path) -> list[Any]:
    """Return the records of a .json (a list, or one record) or .jsonl file, unchecked.

    A line of a .jsonl file that is not JSON comes back as the string that it is.

    Raises:
        McpLoraError: the file cannot be read, or is not JSON.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise McpLoraError(
            f"{file} cannot be read ({_one_line(error)}): mcp-lora convert OTHER_FILE"
        ) from None
    if file.suffix == ".jsonl":
        # Not splitlines(): it also breaks at characters that JSON strings may hold.
        return [_load_line(line) for line in text.split("\n") if line.strip()]
    try:
        content = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise McpLoraError(
            f"{file} is not JSON ({_one_line(error)}): mend it, then run: mcp-lora convert '{file}'"
        ) from None
    return content if isinstance(content, list) else [content]


def _load_line(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return line


def read_filtered(file: Path) -> Iterator[Example | Rejected]:
    """Yield every row of a file of filtered MCP data, as an example or with what is wrong.

    Raises:
        McpLoraError: the file cannot be read, or is not JSON.
    """
    for row, record in enumerate(read_rows(file), start=1):
        try:
            instruction, tool, call = _parse(record)
        except ValueError as reason:
            yield Rejected(str(file), row, str(reason), record)
        else:
            yield Example(instruction, tool, call, str(file), row, record)


def _parse(record: Any) -> tuple[str, Tool, ToolCall]:
    """Take a filtered record apart; a ValueError says what it lacks."""
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    instruction = record.get("instruction")
    if not isinstance(instruction, str) or not instruction.strip():
        raise ValueError("no instruction")
    info, call = record.get("tool_info"), record.get("function_call")
    if not isinstance(info, dict) or not isinstance(name := info.get("tool_name"), str) or not name:
        raise ValueError("no tool")
    schema = info.get("input_schema")
    if not isinstance(schema, dict) or not isinstance(schema.get("properties", {}), dict):
        raise ValueError("the tool has no input schema")
    if not isinstance(call, dict) or not call.get("name"):
        raise ValueError("no call")
    if call["name"] != name:
        raise ValueError("the call names another tool")
    if not isinstance(arguments := call.get("arguments"), dict):
        raise ValueError("the call's arguments are not an object")
    server = record.get("server_info")
    tool = Tool(
        server=str(server.get("server_name") or "") if isinstance(server, dict) else "",
        name=name,
        description=str(info.get("tool_description") or ""),
        # LLaMA-Factory's tool formats read parameters["properties"] without asking.
        parameters={"type": "object", "properties": {}} | schema,
    )
    try:
        # Half a surrogate pair or a NaN passes Python's json, and kills the engine later.
        json.dumps([instruction, vars(tool), arguments], ensure_ascii=False, allow_nan=False).encode()
    except ValueError:
        raise ValueError("a text or a number that is not JSON") from None
    return instruction.strip(), tool, ToolCall(name, arguments)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())

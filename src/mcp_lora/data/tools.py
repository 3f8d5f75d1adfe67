r"""Read tool definitions of any format: MCP's, OpenAI's, Anthropic's, Gemini's, and lists of servers.

{"name": "calculate", "description": "Evaluates the expression",
 "inputSchema": {"type": "object", "properties": {"expression": {"type": "string"}}}}
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from typing import Any

import msgspec

from mcp_lora.data.records import RowError, Tool, literal

_SCHEMAS: tuple[str, ...] = ("parameters", "inputSchema", "input_schema", "parametersJsonSchema")
_SCHEMAS += ("args_schema", "schema", "arguments", "args", "inputs", "parameter")
_SHOWING = {*_SCHEMAS, "description"}  # a key that only a tool has
_WRAPPERS = ("result", "function", "toolSpec")  # of a reply to tools/list, OpenAI's, Bedrock's
_LISTS = ("function_declarations", "functionDeclarations", "tools", "functions", "remote_server_response")
# What Python and Gemini call JSON Schema's types.
_TYPES = {"str": "string", "int": "integer", "float": "number", "double": "number", "bool": "boolean"}
_TYPES |= {"list": "array", "tuple": "array", "set": "array", "dict": "object", "map": "object"}
_TYPES |= {"none": "null", "nonetype": "null"}
_META = {"type", "title", "required", "description"}  # keywords of a schema, not parameters
_VALUES = ("enum", "const", "default", "examples", "example")  # keywords with data, not schemas


def tools_in(value: Any, server: str = "", cleaned: list[str] | None = None) -> Iterator[Tool]:
    """Yield the tools in a value, at any depth: a tool, a list, or a mapping by name or by server.

    Args:
        value: as it is in the data.
        server: the server of tools that do not name one.
        cleaned: what was normalized is added to this.

    Raises RowError if it contains something that is not a tool.
    """
    if isinstance(value, str) and value.strip():
        try:
            value = literal(value)
        except ValueError:
            raise RowError("no-tool", f"the tools are not JSON: {value[:80]}") from None
    if isinstance(value, list):
        for item in value:
            yield from tools_in(item, server, cleaned)
    elif isinstance(value, dict):
        yield from _of_object(value, server, cleaned)
    elif value:
        raise RowError("no-tool", f"a tool is not an object but {type(value).__name__}")


def _of_object(value: dict[str, Any], server: str, cleaned: list[str] | None) -> Iterator[Tool]:
    info = value.get("server_info")
    named = info.get("name") if isinstance(info, dict) else value.get("server_name", value.get("name"))
    inner = next((value[name] for name in _LISTS if isinstance(value.get(name), list | dict)), None)
    if inner is not None:
        yield from tools_in(inner, named if isinstance(named, str) and named else server, cleaned)
    elif wrapped := next((value[name] for name in _WRAPPERS if isinstance(value.get(name), dict)), None):
        yield from tools_in(wrapped, server, cleaned)
    elif "name" in value or "tool_name" in value:
        try:
            tool, changed = _known(msgspec.json.encode(value), server)
        except (ValueError, TypeError, RecursionError):
            raise RowError("not-json-value", "a tool is not valid JSON, or nested too deeply") from None
        if changed and cleaned is not None:
            cleaned.append("schema")
        yield tool
    elif _SHOWING & value.keys() or not all(isinstance(item, dict | list) for item in value.values()):
        raise RowError("no-tool", f"a tool has no name, only {', '.join(map(str, value))}")
    else:  # by name, or by server
        for name, item in value.items():
            if isinstance(item, dict) and _SHOWING & item.keys():
                yield from tools_in({"name": name} | item, server, cleaned)
            else:
                yield from tools_in(item, name, cleaned)


@lru_cache(maxsize=1 << 12)  # many rows define the same tools
def _known(text: bytes, server: str) -> tuple[Tool, bool]:
    """Return the tool in a JSON text, and whether its schema was normalized."""
    item = msgspec.json.decode(text)
    name = item.get("name", item.get("tool_name"))
    if not isinstance(name, str) or not name:
        raise RowError("no-tool", "a tool has no name")
    schema: Any = next((item[key] for key in _SCHEMAS if item.get(key) is not None), {})
    if isinstance(schema, str):
        with suppress(ValueError, RecursionError):
            schema = json.loads(schema or "{}")
    if "required_parameters" in item:  # ToolBench's
        optional = [part | {"required": False} for part in item.get("optional_parameters") or []]
        schema = [*(part | {"required": True} for part in item["required_parameters"]), *optional]
    if isinstance(schema, list) and all(isinstance(part, dict) and "name" in part for part in schema):
        schema = {part["name"]: {k: v for k, v in part.items() if k != "name"} for part in schema}
    if not isinstance(schema, dict):
        raise RowError("no-schema", f"{name} has no input schema")
    if schema.keys() == {"json"} and isinstance(schema["json"], dict):  # Bedrock's
        schema = schema["json"]
    description = item.get("description", item.get("tool_description"))
    plain = {"type": "object", "properties": {}} | schema
    try:
        parameters = schema_of(schema, name)
        changed = parameters != plain
    except RecursionError:  # too deep to be a schema, which its validator reports
        parameters, changed = plain, False
    return Tool(server, name, str(description or ""), parameters), changed


def schema_of(parameters: dict[str, Any], name: str = "") -> dict[str, Any]:
    """Return parameters as JSON Schema.

    xLAM and others write a flat map, {"limit": {"type": "int, optional", "default": 10}}; tabular formats add
    nulls; Python and Gemini use other names for types.

    Raises RowError if `properties` is not an object.
    """
    flat = {key: item for key, item in parameters.items() if not key.startswith("$")}
    if flat and all(isinstance(item, str) for item in flat.values()) and not _META & flat.keys():
        flat = {key: {"description": item} for key, item in flat.items()}
    is_schema = parameters.get("type") == "object" or isinstance(parameters.get("properties"), dict)
    if flat and not is_schema and all(isinstance(item, dict) for item in flat.values()):
        required = [key for key, item in flat.items() if _is_required(item)]
        parameters = {"type": "object", "properties": flat, "required": required}
    schema: dict[str, Any] = _schema(parameters)
    if not isinstance(schema.get("properties", {}), dict):
        raise RowError("no-schema", f"the properties of {name} are not an object")
    return {"type": "object", "properties": {}} | schema


def _is_required(parameter: dict[str, Any]) -> bool:
    if isinstance(stated := parameter.get("required"), bool):
        return stated
    return "default" not in parameter and "optional" not in str(parameter.get("type")).lower()


def _schema(value: Any) -> Any:
    """Return a schema with JSON Schema's type names, and without the nulls that tabular formats add."""
    if isinstance(value, list):
        return [_schema(item) for item in value if item is not None]
    if not isinstance(value, dict):
        return value
    schema = {
        key: item if key in _VALUES else _schema(item)
        for key, item in value.items()
        if item is not None or (key == "default" and takes_null(value))
    }
    if isinstance(properties := schema.get("properties"), dict):
        required: list[str] = []
        for key, item in properties.items():
            if isinstance(item, dict) and isinstance(item.get("required"), bool):
                required += [key] * item["required"]
                properties[key] = {k: v for k, v in item.items() if k != "required"}
        if required and not isinstance(schema.get("required"), list):
            schema["required"] = required
    kind = schema.get("type")
    if isinstance(kind, list):
        schema["type"] = [_type(item) for item in kind]
    elif isinstance(kind, str):
        schema["type"] = _type(kind)
        if schema["type"] is None:
            del schema["type"]
    return schema


def _type(kind: Any) -> Any:
    word = str(kind).split(",")[0].strip().lower()
    word = word.removeprefix("optional[").split("[")[0].split("(")[0].rstrip("] ").strip()
    return word if word in _TYPES.values() else _TYPES.get(word)


def takes_null(schema: Any) -> bool:
    """Tell whether a parameter may be null; one that the schema does not define may not."""
    found, kinds = list(parts_of(schema)), types_of(schema)
    enums = [part["enum"] for part in found if isinstance(part.get("enum"), list)]
    is_nullable = "null" in kinds or any(part.get("nullable") is True for part in found)
    is_open = len(found) == 1 and kinds == {None} and not enums and "$ref" not in schema
    return is_nullable or is_open or any(None in enum for enum in enums)


def types_of(schema: Any, root: Mapping[str, Any] | None = None) -> set[Any]:
    """Return the types that a schema names, and None if a part of it names none."""
    named = (part.get("type") for part in parts_of(schema, root))
    every = (kind for kinds in named for kind in (kinds if isinstance(kinds, list) else [kinds]))
    return {kind for kind in every if kind is None or isinstance(kind, str)}


def parts_of(schema: Any, root: Mapping[str, Any] | None = None) -> Iterator[Mapping[str, Any]]:
    """Yield a schema and its subschemas, each once: `$ref` within it, anyOf, oneOf, allOf."""
    waiting, met = [schema], set()
    while waiting:
        part = waiting.pop()
        if not isinstance(part, Mapping) or id(part) in met:
            continue
        met.add(id(part))
        yield part
        reference = part.get("$ref")
        if root and isinstance(reference, str) and reference.startswith("#/"):
            found: Any = root
            for step in reference[2:].split("/"):
                step = step.replace("~1", "/").replace("~0", "~")
                found = found.get(step) if isinstance(found, Mapping) else None
            waiting.append(found)
        for key in ("anyOf", "oneOf", "allOf"):
            waiting += parts if isinstance(parts := part.get(key), list) else []

r"""Make data/filtered/filtered_sample.json again: every row of sample_calls.yaml, really called.

    python -m venv /tmp/mcp && . /tmp/mcp/bin/activate
    pip install 'mcp==1.30.0' pyyaml mcp-server-time==2026.10.10 mcp-server-git==2026.10.10 \
        mcp-server-sqlite==2025.4.25 mcp-server-calculator==0.2.1 mcp-server-duckdb==1.1.0
    python scripts/make_sample.py          # needs Node.js too (npx); takes about two minutes

The servers run in a sandbox folder that is put back before each call, so a row does not
depend on the rows before it. A call that a server refuses stops the script: such a row has no
place in the table. One record of the result:

    {"instruction": "What is 128 * 46?",
     "server_info": {"server_name": "calculator", "server_description": "Evaluates arithmetic …"},
     "tool_info": {"tool_name": "calculate", "tool_description": "Calculates/evaluates …",
                   "input_schema": {"type": "object", "properties": {"expression": …}}},
     "function_call": {"name": "calculate", "arguments": {"expression": "128 * 46"}},
     "tool_response": {"content": "{\"content\": [{\"type\": \"text\", \"text\": \"5888\"}], …}"},
     "final_response": "5888"}

`final_response` is the tool's own text.
"""

import asyncio
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import duckdb
import yaml
from mcp import ClientSession, StdioServerParameters
from mcp.client.stdio import stdio_client
from mcp.types import TextContent

HERE = Path(__file__).resolve().parent
OUTPUT = HERE.parent / "data" / "filtered" / "filtered_sample.json"
# One path on every machine: the servers' answers hold it.
SANDBOX = Path("/tmp/mcp-sample")
PRISTINE = Path("/tmp/mcp-sample-pristine")
BIN = Path(sys.executable).parent

# ruff: noqa: E501 — tables of long values, one a line
# server → (its description in the data, command)
SERVERS = {
    "time": ("Tells the time in any zone and converts between zones.", [str(BIN / "mcp-server-time"), "--local-timezone=UTC"]),
    "git": ("Reads and changes local git repositories.", [str(BIN / "mcp-server-git")]),
    "sqlite": ("Works on one SQLite database and keeps a memo of insights.", [str(BIN / "mcp-server-sqlite"), "--db-path", "company.db"]),
    "calculator": ("Evaluates arithmetic expressions.", [str(BIN / "mcp-server-calculator")]),
    "duckdb": ("Runs SQL on one DuckDB database.", [str(BIN / "mcp-server-duckdb"), "--db-path", "analytics.duckdb"]),
    "filesystem": ("Reads and writes files in the folders it is given.", ["npx", "-y", "@modelcontextprotocol/server-filesystem@2026.8.31", str(SANDBOX)]),
    "memory": ("Remembers entities and relations in a knowledge graph.", ["npx", "-y", "@modelcontextprotocol/server-memory@2026.8.31"]),
    "everything": ("Shows every feature of the protocol.", ["npx", "-y", "@modelcontextprotocol/server-everything@2026.8.31"]),
}  # fmt: skip

FILES = {
    "README.md": "# Team share\nDocuments, code and data of the team.\n",
    "notes/todo.txt": "Call the bank\nBook flights\nWater the plants\n",
    "notes/ideas.txt": "A bird feeder with a camera\n",
    "reports/q1.csv": "month,revenue\nJan,120\nFeb,135\nMar,150\n",
    "reports/q2.csv": "month,revenue\nApr,160\nMay,158\nJun,171\n",
    "reports/annual.md": "# Annual report\nRevenue grew by a fifth.\n",
    "reports/draft.md": "# Draft\n",
    "config/app.yaml": "name: shop\nport: 8080\n",
    "config/database.ini": "[database]\nhost = localhost\n",
    "logs/server.log": "".join(f"12:0{i} request {i} served\n" for i in range(8)),
    "logs/error.log": "".join(f"12:1{i} error {i}: timeout\n" for i in range(6)),
    "logs/access.log": "GET /\nGET /about\n",
    "src/main.py": "from utils import greet\n\nprint(greet('world'))\n",
    "src/utils.py": "def greet(name):\n    return f'Hello {name}'\n",
    "src/parser.py": "def parse(line):\n    return line.split(',')\n",
    "docs/guide.md": "# Guide\nStart the app, then log in.\n",
    "docs/faq.md": "# FAQ\nNo questions yet.\n",
    "docs/install.md": "# Install\nUnpack and run.\n",
    "docs/changelog.md": "# Changes\n1.0: first release\n",
    "data/users.json": '[{"name": "Ann"}, {"name": "Ben"}]\n',
    "recipes/soup.txt": "Boil onions, carrots and potatoes for half an hour.\n",
    "recipes/bread.txt": "Flour, water, salt, yeast. Knead, rest, bake.\n",
    "images/logo.svg": "<svg xmlns='http://www.w3.org/2000/svg'/>\n",
    "letters/invoice.txt": "Please pay 40 euros.\n",
    "letters/welcome.txt": "Welcome to the team!\n",
    "backup/old.txt": "kept for the record\n",
    "tmp/cache.txt": "x\n",
}
GRAPH: list[dict[str, Any]] = [
    {"type": "entity", "name": "Alice", "entityType": "person", "observations": ["is an engineer", "drinks coffee"]},
    {"type": "entity", "name": "Bob", "entityType": "person", "observations": ["plays chess"]},
    {"type": "entity", "name": "Carol", "entityType": "person", "observations": ["lives in London"]},
    {"type": "entity", "name": "Dave", "entityType": "person", "observations": ["plays the guitar"]},
    {"type": "entity", "name": "Acme Corp", "entityType": "company", "observations": ["plans its budget in March"]},
    {"type": "entity", "name": "Project Apollo", "entityType": "project", "observations": ["builds a rocket"]},
]  # fmt: skip
COMPANY = """
CREATE TABLE customers (id INTEGER, name TEXT, city TEXT);
INSERT INTO customers VALUES (1, 'Ann', 'Paris'), (2, 'Ben', 'Oslo'), (3, 'Cleo', 'Paris');
CREATE TABLE orders (id INTEGER, customer_id INTEGER, total REAL, status TEXT, date TEXT);
INSERT INTO orders VALUES (1, 1, 20, 'paid', '2024-01-05'), (3, 2, 35, 'open', '2024-02-11'), (5, 3, 80, 'open', '2024-03-02');
CREATE TABLE products (id INTEGER, name TEXT, price REAL, stock INTEGER);
INSERT INTO products VALUES (1, 'lamp', 30, 12), (2, 'chair', 20, 7), (4, 'desk', 120, 2);
CREATE TABLE employees (id INTEGER, name TEXT, department TEXT, salary REAL);
INSERT INTO employees VALUES (1, 'Eva', 'Sales', 3000), (2, 'Finn', 'Legal', 3200);
CREATE TABLE suppliers (id INTEGER, name TEXT);
INSERT INTO suppliers VALUES (1, 'Nord Wood'), (2, 'Light & Co');
CREATE TABLE invoices (id INTEGER, order_id INTEGER, amount REAL);
"""
ANALYTICS = """
CREATE TABLE trips (id INTEGER, city TEXT, distance DOUBLE, fare DOUBLE);
INSERT INTO trips VALUES (1, 'Oslo', 4.2, 12), (2, 'Paris', 11.5, 28);
CREATE TABLE sales (region TEXT, amount DOUBLE);
INSERT INTO sales VALUES ('north', 100), ('south', 250), ('north', 75);
CREATE TABLE sensors (id INTEGER, temperature DOUBLE, humidity DOUBLE);
INSERT INTO sensors VALUES (1, 21.5, 40), (2, 19.0, 55);
"""


def git(repo: Path, *arguments: str) -> None:
    """Run git in `repo` with one author and one date, so that commit ids come out alike."""
    date = "2024-05-01T12:00:00+00:00"
    who = {"NAME": "Sample Author", "EMAIL": "author@example.com", "DATE": date}
    env = {f"GIT_{role}_{key}": value for role in ("AUTHOR", "COMMITTER") for key, value in who.items()}
    subprocess.run(["git", *arguments], cwd=repo, check=True, capture_output=True, env=os.environ | env)


def make_repository(repo: Path) -> None:
    """A repository with tags, branches, staged, unstaged and untracked changes."""
    repo.mkdir()
    git(repo, "init", "--initial-branch=main")
    git(repo, "config", "user.name", "Sample Author")
    git(repo, "config", "user.email", "author@example.com")
    tracked = {
        "app.py": "print('one')\nprint('two')\n",
        "README.md": f"# {repo.name}\n",
        "CHANGES.md": "1.0\n",
    }
    for name, text in tracked.items():
        (repo / name).write_text(text)
    git(repo, "add", ".")
    git(repo, "commit", "-m", "First version")
    git(repo, "tag", "v1.0")
    git(repo, "branch", "release/1.0")
    for version, ref in (("1.1", "v1.1"), ("1.2", None), ("1.3", None)):
        with (repo / "CHANGES.md").open("a") as file:
            file.write(f"{version}\n")
        git(repo, "commit", "-am", f"Release {version}")
        if ref:
            git(repo, "tag", ref)
    for branch in ("develop", "feature/login", "bugfix/typo"):
        git(repo, "branch", branch, "HEAD~1")
    (repo / "README.md").write_text(f"# {repo.name}\nStaged words.\n")
    git(repo, "add", "README.md")
    (repo / "app.py").write_text("print('one')\nprint('three')\n")
    for name in ("notes.txt", "todo.md"):
        (repo / name).write_text("not tracked\n")


def make_pristine() -> None:
    """Fill PRISTINE with what the servers work on."""
    shutil.rmtree(PRISTINE, ignore_errors=True)
    for name, text in FILES.items():
        path = PRISTINE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for name in ("website", "api", "mobile", "handbook"):
        make_repository(PRISTINE / name)
    (PRISTINE / "memory.jsonl").write_text("\n".join(map(json.dumps, GRAPH)))
    with closing(sqlite3.connect(PRISTINE / "company.db")) as database:
        database.executescript(COMPANY)
    with duckdb.connect(str(PRISTINE / "analytics.duckdb")) as database:
        database.execute(ANALYTICS)


def restore() -> None:
    """Put the sandbox back; the folder itself stays, because the servers stand in it."""
    SANDBOX.mkdir(exist_ok=True)
    for path in SANDBOX.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree(PRISTINE, SANDBOX, dirs_exist_ok=True)


async def call_all(server: str, calls: dict[str, list[list[Any]]]) -> list[dict[str, Any]]:
    """Call every row of one server; raise SystemExit on the first refusal."""
    description, command = SERVERS[server]
    environment = os.environ | {"MEMORY_FILE_PATH": str(SANDBOX / "memory.jsonl")}
    parameters = StdioServerParameters(command=command[0], args=command[1:], cwd=SANDBOX, env=environment)
    records = []
    async with stdio_client(parameters) as streams, ClientSession(*streams) as session:
        name = (await session.initialize()).serverInfo.name
        tools = {tool.name: tool for tool in (await session.list_tools()).tools}
        for tool_name, rows in calls.items():
            for instruction, arguments in rows:
                restore()
                result = await session.call_tool(tool_name, arguments)
                text = "\n".join(part.text for part in result.content if isinstance(part, TextContent))
                # The SQLite server reports a failure as ordinary text.
                if result.isError or text.startswith("Database error"):
                    sys.exit(f"{server}.{tool_name} refused {arguments}: {text}")
                tool = tools[tool_name]
                records.append(
                    {
                        "instruction": instruction,
                        "server_info": {"server_name": name, "server_description": description},
                        "tool_info": {
                            "tool_name": tool.name,
                            "tool_description": tool.description,
                            "input_schema": tool.inputSchema,
                        },
                        "function_call": {"name": tool.name, "arguments": arguments},
                        "tool_response": {
                            "content": json.dumps(
                                result.model_dump(mode="json", by_alias=True, exclude_none=True),
                                ensure_ascii=False,
                            )
                        },
                        "final_response": text,
                    }  # fmt: skip
                )
    return records


async def main() -> None:
    table = yaml.safe_load((HERE / "sample_calls.yaml").read_text(encoding="utf-8"))
    make_pristine()
    restore()
    records = [record for server, calls in table.items() for record in await call_all(server, calls)]
    OUTPUT.write_text(json.dumps(records, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    print(f"{len(records)} records, {len(table)} servers, {sum(map(len, table.values()))} tools → {OUTPUT}")


if __name__ == "__main__":
    asyncio.run(main())

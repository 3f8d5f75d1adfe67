r"""The account of a conversion: every row that is read ends in one place, and is counted there.

A line of rejected.jsonl:

    {"file": "data/rows.json", "row": 3, "reason": "no-call", "sentence": "a call has no name, …",
     "record": {"instruction": "…", "function_call": {}}}
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from mcp_lora.records import Rejected


@dataclass
class Account:
    """Of one shape in one file: `read` is the sum of `written`, by split, and of `rejected`."""

    file: str
    shape: str
    read: int = 0
    cleaned: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    written: Counter[str] = field(default_factory=Counter)


class Accounts:
    """All accounts of a conversion, and its rejected.jsonl while it is open."""

    def __init__(self, rejects: Path) -> None:
        self._file = rejects.open("wb")
        self._accounts: dict[tuple[str, str], Account] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def of(self, file: str, shape: str) -> Account:
        """Return the account of a file's rows of one shape."""
        key = file, shape
        if key not in self._accounts:
            self._accounts[key] = Account(file, shape)
        return self._accounts[key]

    def reject(self, rejected: Rejected) -> None:
        """Count a row that cannot be used, and write it down."""
        origin = rejected.origin
        self.of(origin.file, origin.shape).rejected[rejected.reason] += 1
        line = {
            "file": origin.file,
            "row": origin.row,
            "reason": rejected.reason,
            "sentence": rejected.sentence,
            "record": origin.record,
        }
        try:
            text = json.dumps(line, ensure_ascii=False, default=str)
        except (RecursionError, ValueError, TypeError):  # what it holds has no end, or no JSON keys
            text = json.dumps(line | {"record": None})
        # half a surrogate pair becomes its JSON escape
        self._file.write(text.encode(errors="backslashreplace") + b"\n")

    def all(self) -> list[Account]:
        """Return the accounts, in the order of reading."""
        return list(self._accounts.values())

    def total(self, what: str) -> Counter[str]:
        """Return the sum of all accounts' `cleaned`, `rejected` or `written`."""
        return sum((getattr(account, what) for account in self._accounts.values()), Counter())

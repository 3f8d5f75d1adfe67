import gzip
import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from conftest import write_json

from mcp_lora.data import files
from mcp_lora.data.files import Broken
from mcp_lora.errors import McpLoraError

ROWS = [{"a": 1, "b": ["é", None]}, {"a": 2.5}, "text", [1, [2]], 7]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("array.json", json.dumps(ROWS).encode()),
        ("indented.json", json.dumps(ROWS, indent=2, ensure_ascii=False).encode()),
        ("bom.json", json.dumps(ROWS).encode("utf-8-sig")),
        ("one_after_the_other.json", "\n".join(map(json.dumps, ROWS)).encode()),
        ("lines.jsonl", "\n\n".join(map(json.dumps, ROWS)).encode()),
        ("bom.jsonl", "\r\n".join(map(json.dumps, ROWS)).encode("utf-8-sig")),
        ("packed.jsonl.gz", gzip.compress("\n".join(map(json.dumps, ROWS)).encode(), mtime=0)),
    ],
)
@pytest.mark.parametrize("chunk", [1, 2, 7, 1 << 20])
def test_every_container_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, chunk: int
) -> None:
    """Wherever a chunk ends: in a number, in an escape, between two records."""
    monkeypatch.setattr(files, "CHUNK", chunk)
    (tmp_path / name).write_bytes(content)
    assert list(files.read(tmp_path / name)) == ROWS


def test_one_record_alone_is_a_record_and_nothing_is_none(tmp_path: Path) -> None:
    assert list(files.read(write_json(tmp_path / "one.json", {"a": 1}))) == [{"a": 1}]
    for name in ("empty.json", "empty.jsonl"):
        (tmp_path / name).touch()
        assert list(files.read(tmp_path / name)) == []


def test_a_separator_character_is_no_end_of_line(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_text(json.dumps("a\u2028b\x85c", ensure_ascii=False), encoding="utf-8")
    assert list(files.read(file)) == ["a\u2028b\x85c"]


def test_parquet_rows_have_the_keys_of_all_rows(tmp_path: Path) -> None:
    rows = [
        {"call": {"name": "a", "arguments": {"x": 1}}},
        {"call": {"name": "b", "arguments": {"y": ["z"]}}},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    first, second = files.read(tmp_path / "rows.parquet")
    assert first == {"call": {"name": "a", "arguments": {"x": 1, "y": None}}}
    assert second == {"call": {"name": "b", "arguments": {"x": None, "y": ["z"]}}}


def test_a_broken_line_costs_that_line_alone(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"broken\n{"a": 1}\n' + b"9" * 5000 + b"\n" + b"[" * 100_000 + b'\n"\xff"\n')
    broken, good, long, deep, no_utf8 = files.read(file)
    assert isinstance(broken, Broken) and broken.text == '{"broken' and "not JSON" in broken.message
    assert good == {"a": 1}
    assert isinstance(long, Broken) and isinstance(deep, Broken)
    assert no_utf8 == "\udcff"  # which no row passes with


@pytest.mark.parametrize(
    ("content", "good", "said"),
    [
        ("[1, 2, {", 2, "not JSON after 2 records"),
        ("[1, 2", 2, "ends after 2 records"),
        ('[1, {"a": tru, 3]', 1, "not JSON after 1 records"),
        ('["unclosed, 2]' + "x" * 100, 0, "Unterminated string"),
        ("[1, 2] 3", 2, "after the end of the array of 2 records"),
        ("[" + "[" * 100_000, 0, "recursion"),
        ("oops", 0, "not JSON after 0 records"),
    ],
)
@pytest.mark.parametrize("chunk", [3, 1 << 20])
def test_a_file_that_breaks_off_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, good: int, said: str, chunk: int
) -> None:
    monkeypatch.setattr(files, "CHUNK", chunk)
    (tmp_path / "cut.json").write_text(content)
    *rows, end = files.read(tmp_path / "cut.json")
    assert len(rows) == good
    assert isinstance(end, Broken) and said in end.message


def test_a_text_that_is_cut_among_escapes_is_seen_at_once(tmp_path: Path) -> None:
    (tmp_path / "cut.json").write_text('[{"a": "' + '\\"x' * 300_000)  # an hour, were it looked at from each
    (broken,) = files.read(tmp_path / "cut.json")
    assert isinstance(broken, Broken)


@pytest.mark.parametrize(("value", "zone"), [(2**60, None), (0, "Nowhere/Land")])
def test_a_table_with_a_time_that_is_none_says_so(tmp_path: Path, value: int, zone: str | None) -> None:
    column = pyarrow.array([value], pyarrow.timestamp("us", tz=zone))
    pyarrow.parquet.write_table(pyarrow.table({"a": column}), tmp_path / "times.parquet")
    (broken,) = files.read(tmp_path / "times.parquet")
    assert isinstance(broken, Broken) and "cannot be read any further" in broken.message


@pytest.mark.parametrize("chunk", [3, 1 << 20])
def test_a_broken_element_costs_that_element_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(files, "CHUNK", chunk)
    broken = ('{"a": tru}', r'{"a": "\d"}', '{"a": [' + "9" * 5000 + "]}", '{"a": "}" "b": 1}')
    good = '{"b": "}\t[\\""}'  # a tab in it is taken as it is
    (tmp_path / "rows.json").write_text(f"[{', '.join(f'{one}, {good}' for one in broken)}]")
    rows = list(files.read(tmp_path / "rows.json"))
    assert [row.text for row in rows[::2]] == list(broken)
    assert rows[1::2] == [{"b": '}\t["'}] * len(broken)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cut.jsonl.gz", gzip.compress(b"1\n" * 100_000, mtime=0)[:-50]),
        ("no.jsonl.gz", b"plain text"),
        ("no.parquet", b"plain text"),
        ("utf16.json", "[1]".encode("utf-16")),
    ],
)
def test_a_damaged_container_ends_with_what_is_wrong(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    *_, end = files.read(tmp_path / name)
    assert isinstance(end, Broken)
    assert ("UTF-16: save it as UTF-8" if "utf16" in name else "cannot be read any further") in end.message


def test_a_broken_place_is_found_without_reading_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "CHUNK", 100)
    read: list[int] = []
    (tmp_path / "rows.json").write_text('[{"a": oops' + " " * 100_000)
    list(files.read(tmp_path / "rows.json", read.append))
    assert max(read) < 10_000


def test_places_are_files_folders_and_globs(tmp_path: Path) -> None:
    names = ["a/one.json", "a/b/two.jsonl", "three.parquet", "four.jsonl.gz"]
    for name in [*names, "a/notes.txt"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found, _ = files.find([tmp_path / "a", tmp_path / "a/one.json", tmp_path / "*.parquet"])
    assert [str(file.relative_to(tmp_path)) for file in found] == [
        "a/b/two.jsonl",
        "a/one.json",
        "three.parquet",
    ]
    (tmp_path / ".git").mkdir()
    outputs = (".git/x.json", "a/._one.json", "run/run.yaml", "run/eval/base.jsonl", "out/stats.json")
    for name in (*outputs, "out/train.jsonl", "out.rejected.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/stats.json").write_text('{"of": "another program"}')
    names += ["mine/stats.json"]
    (tmp_path / "out/stats.json").write_text('{"settings": {}}')
    found, skipped = files.find([tmp_path])
    assert found == sorted(tmp_path / name for name in names)
    assert skipped == 6  # all of outputs but run.yaml, and two more
    (tmp_path / "empty").mkdir()
    with pytest.raises(McpLoraError, match=r"no data in .*empty, .*no\.json .*mcp-lora convert"):
        files.find([tmp_path / "a", tmp_path / "empty", tmp_path / "no.json"])
    with pytest.raises(McpLoraError, match=r"notes\.txt: not one of"):
        files.find([tmp_path / "a/notes.txt"])


def test_a_snapshot_of_the_hub_is_read_through_its_links(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs/1f").write_text('{"a": 1}\n')
    snapshot = tmp_path / "snapshots/9c"
    (snapshot / "data").mkdir(parents=True)
    (snapshot / "data/train.jsonl").symlink_to("../../../blobs/1f")
    (snapshot / "data/gone.jsonl").symlink_to("../../../blobs/2f")
    (snapshot / "folder.json").mkdir()
    found, skipped = files.find([snapshot])
    assert (found, skipped) == ([snapshot / "data/train.jsonl"], 1)  # and one that is broken
    assert list(files.read(found[0])) == [{"a": 1}]


def test_a_folder_that_cannot_be_listed_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("open", "closed", ".hidden"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.jsonl").write_text("{}\n")
    assert files.find([tmp_path])[1] == 1
    # what access(2) says of chmod 000, which root may list all the same
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name not in ("closed", ".hidden", "link"))
    with pytest.raises(McpLoraError, match=r"closed cannot be listed: chmod -R u\+rX .*/closed"):
        files.find([tmp_path])
    (tmp_path / "closed").rename(tmp_path / "opened")
    (tmp_path / "link").symlink_to("opened")  # which is not read
    found, skipped = files.find([tmp_path])
    assert (len(found), skipped) == (2, 2)


def test_a_linked_folder_is_counted_and_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/rows.jsonl").touch()
    place = tmp_path / "data"
    place.mkdir()
    (place / "linked").symlink_to("../elsewhere")
    (place / "itself").symlink_to(".")
    with pytest.raises(McpLoraError, match="2 files are hidden, broken links, linked folders"):
        files.find([place])
    (place / "own.jsonl").touch()
    assert files.find([place]) == ([place / "own.jsonl"], 2)
    assert files.find([place / "linked"]) == ([place / "linked/rows.jsonl"], 0)


def test_a_name_that_is_no_utf8_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "caf\udce9.json").touch()
    with pytest.raises(McpLoraError, match=r"caf.*not valid UTF-8.*rename it") as caught:
        files.find([tmp_path])
    str(caught.value).encode()


def test_a_lock_that_is_waited_for_is_named_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(files, "PATIENCE", 0.1)
    lock, held = tmp_path / ".data.lock", pytest.raises(McpLoraError, match="in use")
    with files.exclusive(lock, ""), held:
        files.exclusive(lock, "in use")
    assert caplog.messages == []  # it has not waited
    with files.exclusive(lock, ""), held:
        files.exclusive(lock, "in use", wait=0.3)
    (said,) = caplog.messages
    assert said.startswith("mcp-lora: waiting") and str(lock) in said

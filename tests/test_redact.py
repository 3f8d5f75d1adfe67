import json
import re

from mcp_lora.data.redact import redact

RECORD = {
    "messages": [
        {
            "role": "user",
            "content": "Log in as ann.lee@corp.example with password=hunter2abc, see /home/annlee/notes",
        },
        {"role": "assistant", "tool_calls": [{"function": {"arguments": '{"password": "hunter2abc"}'}}]},
        {
            "role": "tool",
            "content": "ghp_abcdefghijklmnopqrstuvwxyz0123456789 sk-ant-api03-aaaaaaaaaaaaaaaaaaaaaa",
        },
        {
            "role": "tool",
            "content": "AKIAIOSFODNN7EXAMPLQ C:\\Users\\annlee\\x Authorization: Bearer abcd1234efgh",
        },
    ],
    "count": 3,
}


def test_secrets_get_stand_ins_of_the_same_shape_everywhere_in_a_record() -> None:
    changed, kinds = redact(RECORD)
    assert kinds == {"mail address": 1, "home folder": 2, "key": 5}
    text = json.dumps(changed)
    for secret in (
        "ann",
        "corp.example",
        "hunter2abc",
        "ghp_abc",
        "sk-ant-api03-aaa",
        "AKIAIOSF",
        "abcd1234efgh",
    ):
        assert secret not in text
    asked = changed["messages"][0]["content"]
    password = re.search(r"password=([a-z]{6}\d[a-z]{3}),", asked)
    assert password and password.group(1) in changed["messages"][1]["tool_calls"][0]["function"]["arguments"]
    assert "@example.com" in asked and "/home/user/notes" in asked and changed["count"] == 3
    assert redact(RECORD) == (changed, kinds)


def test_code_and_packages_are_no_secrets() -> None:
    code = {
        "a": "tokenizer=AutoTokenizer.from_pretrained(name); max_tokens=4096000000; token: str",
        "b": "npm install lodash@4.17.21, git clone git@github.com:org/repo.git",
    }
    assert redact(code) == (code, {})
    # only where it is a folder's name: a name may be a common word
    changed, _ = redact({"a": "cd /home/me/some", "b": "some of me", "c": '{"p": "C:\\\\Users\\\\ann\\\\x"}'})
    assert changed["a"] == "cd /home/user/some" and changed["b"] == "some of me" and "ann" not in changed["c"]


def test_what_holds_no_secret_stays_as_it_is() -> None:
    plain = {"content": "The token is passed as an api key; commit 9fceb02d0ae598e95dc970b74767f19372d61af8."}
    assert redact(plain) == (plain, {})

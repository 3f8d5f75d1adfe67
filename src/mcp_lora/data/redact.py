"""Replace what must not be trained on in a record: keys and tokens, mail addresses, home folders.

Keys are found by detect-secrets' plugins, and by their names (`password=…`, `Bearer …`). A replacement has
the same length and characters of the same kinds, and is the same throughout a record, so that a call's
argument still matches the question.
"""

import random
import re
import string
from collections import Counter
from functools import partial
from typing import Any

# The detect-secrets plugins except those based on entropy: a hash or an id in a log is not a secret.
_PLUGINS = """
ArtifactoryDetector AWSKeyDetector AzureStorageKeyDetector BasicAuthDetector DiscordBotTokenDetector
GitHubTokenDetector GitLabTokenDetector JwtTokenDetector MailchimpDetector NpmDetector OpenAIDetector
PypiTokenDetector SendGridDetector SlackDetector StripeDetector TelegramBotTokenDetector TwilioKeyDetector
"""
_TOKEN = r"[\w.~+/-]"
# A value needs a letter and a digit, or code like `tokenizer=AutoTokenizer.from_pretrained` would match.
_NAMED = re.compile(
    r"(?i)(?:\bbearer\s+|(?:api[_-]?key|token|secret(?:[_-](?:access[_-])?key)?|passw(?:or)?d)[\"']?\s*[=:]\s*[\"']?)"
    rf"(?={_TOKEN}*\d)(?={_TOKEN}*[a-z])({_TOKEN}{{8,}})|\b(sk-{_TOKEN}{{16,}})"
)
# Neither git@github.com nor lodash@4.17.21 is a mail address.
_MAIL = re.compile(r"\b(?!git@)[\w.+-]+@(?:[\w-]+\.)+[A-Za-z]{2,}\b")
_HOME = re.compile(r"((?:/home/|/Users/|[A-Z]:\\{1,2}Users\\{1,2}))[\w.-]+")


def redact(record: Any) -> tuple[Any, Counter[str]]:
    """Return a redacted record, and the number of distinct secrets that were replaced, by kind."""
    found: dict[str, str] = {}
    _find(record, found)
    kinds = Counter(found.values())
    # longest first: /home/ann is a prefix of /home/anna
    ordered = sorted(found, key=len, reverse=True)
    replacements = {secret: _replacement(secret, found[secret]) for secret in ordered}
    if not replacements:
        return record, kinds
    pattern = re.compile("|".join(map(re.escape, ordered)))
    return _mapped(record, partial(pattern.sub, lambda match: replacements[match.group()])), kinds


def _find(value: Any, found: dict[str, str]) -> None:
    """Add the secrets in a value to `found`, with their kinds."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            _find(item, found)
    elif isinstance(value, str):
        for match in _HOME.finditer(value):
            found.setdefault(match.group(), "home folder")
        for address in _MAIL.findall(value):
            found.setdefault(address, "mail address")
        for named in _NAMED.finditer(value):
            found.setdefault(named.group(1) or named.group(2), "key")
        for secret in _known_keys(value):
            found.setdefault(secret, "key")


def _known_keys(text: str) -> list[str]:
    from detect_secrets.core.scan import scan_line
    from detect_secrets.settings import transient_settings

    with transient_settings({"plugins_used": [{"name": name} for name in _PLUGINS.split()]}):
        parts = [secret.secret_value for line in text.splitlines() for secret in scan_line(line)]
    # for some kinds of token it returns only a prefix
    whole = (re.search(rf"{re.escape(part)}{_TOKEN}*", text) for part in parts if part)
    return [match.group() for match in whole if match]


def _replacement(secret: str, kind: str) -> str:
    """Return a replacement of the same form, the same for the same secret."""
    if kind == "home folder":
        return str(_HOME.sub(lambda match: f"{match.group(1)}user", secret))
    chosen = random.Random(secret)
    kept = len(secret) - len(secret.split("@")[0]) if kind == "mail address" else 0
    name = secret[: len(secret) - kept]
    letters = {**dict.fromkeys(string.ascii_lowercase, string.ascii_lowercase)}
    letters |= dict.fromkeys(string.ascii_uppercase, string.ascii_uppercase)
    letters |= dict.fromkeys(string.digits, string.digits)
    made = "".join(chosen.choice(letters.get(letter, letter)) for letter in name)
    return f"{made}@example.com" if kept else made


def _mapped(value: Any, change: Any) -> Any:
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_mapped(item, change) for item in value]
    return change(value) if isinstance(value, str) else value

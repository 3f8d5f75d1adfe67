"""Replace what must not be trained on in a record: keys and tokens, mail addresses, home folders.

Keys are found by detect-secrets' plugins, and by their names (`password=…`, `Bearer …`). A replacement has
the same length and characters of the same kinds, and is the same throughout a record, so that a call's
argument still matches the question.
"""

import random
import re
import string
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

from mcp_lora.data.records import mapped

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
    found: dict[str, str] = {}  # the secrets, with their kinds

    def find(value: Any) -> None:
        for secret, kind in _secrets(value) if isinstance(value, str) else ():
            found.setdefault(secret, kind)

    mapped(record, find)
    if not found:
        return record, Counter()
    # longest first: /home/ann is a prefix of /home/anna
    pattern = re.compile("|".join(map(re.escape, sorted(found, key=len, reverse=True))))
    stand_ins = {secret: _replacement(secret, kind) for secret, kind in found.items()}
    replace = partial(pattern.sub, lambda match: stand_ins[match.group()])
    redacted = mapped(record, lambda value: replace(value) if isinstance(value, str) else value)
    return redacted, Counter(found.values())


def _secrets(text: str) -> Iterator[tuple[str, str]]:
    """Yield the secrets in a text, each with its kind."""
    from detect_secrets.core.scan import scan_line
    from detect_secrets.settings import transient_settings

    yield from ((match.group(), "home folder") for match in _HOME.finditer(text))
    yield from ((address, "mail address") for address in _MAIL.findall(text))
    yield from ((match.group(1) or match.group(2), "key") for match in _NAMED.finditer(text))
    with transient_settings({"plugins_used": [{"name": name} for name in _PLUGINS.split()]}):
        parts = [secret.secret_value for line in text.splitlines() for secret in scan_line(line)]
    for part in filter(None, parts):
        # for some kinds of token it returns only a prefix
        if whole := re.search(rf"{re.escape(part)}{_TOKEN}*", text):
            yield whole.group(), "key"


def _replacement(secret: str, kind: str) -> str:
    """Return a replacement of the same form, the same for the same secret."""
    if kind == "home folder":
        return str(_HOME.sub(lambda match: f"{match.group(1)}user", secret))
    chosen = random.Random(secret)
    name = secret.split("@")[0] if kind == "mail address" else secret
    alphabets = (string.ascii_lowercase, string.ascii_uppercase, string.digits)
    kinds = (next((alphabet for alphabet in alphabets if letter in alphabet), letter) for letter in name)
    return "".join(map(chosen.choice, kinds)) + "@example.com" * (kind == "mail address")

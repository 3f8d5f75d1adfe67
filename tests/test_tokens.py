"""fastokens counts what the tokenizer counts, or is not believed."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from conftest import PACKAGES, SAMPLE, SHARED
from hypothesis import given, settings
from hypothesis import strategies as st

from mcp_lora import embedded, files, forking, tokens
from mcp_lora.tokens import TokenCounter


def loaded(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "MANY", 0)


def texts_of(value: Any) -> list[str]:
    """Return a record's JSON, and every text in it."""
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    return [
        value if isinstance(value, str) else json.dumps(value, ensure_ascii=False),
        *(text for item in inner for text in texts_of(item)),
    ]


def real_texts() -> list[str]:
    places = [SAMPLE, *(SHARED.rglob("*.json") if SHARED.is_dir() else [])]
    records = [record for file in places for record in islice(files.read(file), 100)]
    texts = list(dict.fromkeys(text for record in records for text in texts_of(record)))
    assert len(texts) > 400
    return texts


@pytest.mark.parametrize("package", ["smollm2", *PACKAGES])
def test_real_tokenizers_count_the_same(package: str, request: pytest.FixtureRequest, at_once: None) -> None:
    """Its special tokens in the midst of a text too, in either way of counting."""
    folder = (
        embedded.ensure() if package == "smollm2" else request.getfixturevalue("real_tokenizers") / package
    )
    tokenizer = loaded(folder)
    special = list(tokenizer.get_added_vocab())[:50]
    texts = [*real_texts(), *(f"a {token}b{token}\n {token} 是" for token in special), "", " ", "\n\n  \n"]
    counter = TokenCounter(tokenizer)
    assert counter.count(texts) == [len(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    assert not counter.is_exact  # it was fastokens that counted

    @settings(max_examples=200, deadline=None)
    @given(st.lists(st.text() | st.text("aA1 是é'\n🔧-<|>_", max_size=200), max_size=20))
    def any_text(found: list[str]) -> None:
        assert counter._count_fast(found) == counter.count_exactly(found)

    any_text()


def test_few_texts_are_counted_by_the_tokenizer(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "MANY", 3)
    counter = TokenCounter(loaded(tiny_model))
    assert counter.count(["a b", "c"]) == [2, 1] and counter.is_exact
    assert counter.count(["a b", "c"]) == [2, 1] and not counter.is_exact


@pytest.mark.parametrize("wrong_from", [0, 1])
def test_a_wrong_count_is_not_believed(
    tiny_model: Path, at_once: None, monkeypatch: pytest.MonkeyPatch, wrong_from: int
) -> None:
    """At once, and when it has been right before."""
    right = TokenCounter._count_fast
    calls = iter(range(1_000_000))

    def sometimes(self: TokenCounter, texts: list[str]) -> list[int]:
        return [count + (next(calls) >= wrong_from * 3) for count in right(self, texts)]

    monkeypatch.setattr(TokenCounter, "_count_fast", sometimes)
    counter = TokenCounter(loaded(tiny_model))
    for _ in range(3):
        assert counter.count(["a b"]) == [2]
    assert counter.is_exact


def test_a_text_that_fastokens_cannot_take_is_counted_by_the_tokenizer(at_once: None) -> None:
    """SmolLM2's regular expression needs more stack there than fastokens has."""
    counter = TokenCounter(loaded(embedded.ensure()))
    assert counter.count(["a b"]) == [2] and not counter.is_exact
    with pytest.raises(ValueError, match="stack"):
        counter._count_fast([" " * 2_000_000])
    assert counter.count(["a b", " " * 2_000_000]) == [2, 31_250]
    assert TokenCounter(loaded(embedded.ensure())).count([" " * 2_000_000]) == [31_250]


def test_a_tokenizer_that_fastokens_does_not_know_counts_itself(at_once: None) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    counter = TokenCounter(PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?"))
    assert counter.count(["a b", "a", "a c b"]) == [2, 1, 3] and counter.is_exact


@pytest.mark.skipif(not forking.POSSIBLE, reason="processes are copied on Linux alone")
def test_a_fork_does_without(tiny_model: Path, at_once: None) -> None:
    """fastokens would wait there for threads that were not copied."""
    counter = TokenCounter(loaded(tiny_model))
    texts = ["a b"] * 1000
    assert counter.count(texts) == [2] * 1000 and not counter.is_exact
    for there in (counter, TokenCounter(loaded(tiny_model))):  # a new one neither
        with forking.beside(lambda there=there: (there.count(texts), there.is_exact)) as result:  # type: ignore[misc]
            assert result() == ([2] * 1000, True)
    assert not counter.is_exact

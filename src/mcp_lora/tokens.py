"""How many tokens texts are for a model's tokenizer."""

import os
from typing import Any

# Fewer texts are counted sooner than fastokens has read a tokenizer (0.3 to 3 s).
MANY = 5_000
_PROOF = 1000  # texts that are counted both ways before it is used
_CHECKED = 100  # and one in so many afterwards

# The process that fastokens has threads in: a fork of it has none, and would wait for them for ever.
_process: int | None = None


class TokenCounter:
    """Counts the tokens of texts as `tokenizer` makes them; of many texts with fastokens.

    fastokens makes the same tokens several times as fast, or refuses a tokenizer that it does not
    know. It has to prove it, on the first texts and on a part of all others: where it ever differs
    it is not used any more.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        if self._backend:
            self._backend.no_truncation()
            self._backend.no_padding()
        self._fast: Any = None
        self._seen = 0
        self._tried = False

    @property
    def is_exact(self) -> bool:
        """Whether `count` is the tokenizer's own."""
        return self._fast is None or _process != os.getpid()

    def count(self, texts: list[str]) -> list[int]:
        """Return the number of tokens of each text, without those that stand around any text."""
        self._seen += len(texts)
        if self._backend and not self._tried and self._seen > MANY:
            self._tried = True
            self._try_fast(texts[:_PROOF])
        if not self.is_exact:
            try:
                counted = self._count_fast(texts)
            except ValueError:  # a text that is too much for it, as two million spaces
                return self.count_exactly(texts)
            if counted[::_CHECKED] == self.count_exactly(texts[::_CHECKED]):
                return counted
            self._fast = None
        return self.count_exactly(texts)

    def count_exactly(self, texts: list[str]) -> list[int]:
        """The same, by the tokenizer itself."""
        if self._backend:
            return list(map(len, self._backend.encode_batch_fast(texts, add_special_tokens=False)))
        return [len(self._tokenizer.encode(text, add_special_tokens=False)) for text in texts]

    def _try_fast(self, texts: list[str]) -> None:
        global _process
        if _process not in (None, os.getpid()):
            return
        import fastokens

        _process = os.getpid()
        try:
            self._fast = fastokens.Tokenizer.from_json_str(self._backend.to_str())
            proven = self._count_fast(texts) == self.count_exactly(texts)
        except ValueError:  # it does not know this kind of tokenizer, or cannot take these texts
            proven = False
        if not proven:
            self._fast = None

    def _count_fast(self, texts: list[str]) -> list[int]:
        import numpy

        _, ends = self._fast.encode_batch_flat(texts)
        found: list[int] = numpy.diff(numpy.frombuffer(ends, numpy.uint64)).tolist()
        return found

"""How many tokens a sample has, in the run's template and tokenizer, before anything is trained.

LLaMA-Factory cuts a sample that exceeds cutoff_len at the end of its prompt, where the question is.
Rendering every sample whole to count it would take minutes, as most of it is the same tools again
and again. So each tool is counted once, by what it adds to a prompt that has a tool already, and

    length = conversation without tools + what any tools add + the sum over the tools

This is exact where no token reaches over the end of a tool (byte-level BPE splits there); where the
sum comes near cutoff_len the whole sample is rendered and counted.
"""

import copy
import json
import os
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from itertools import chain
from typing import Any

from mcp_lora.engine import quiet
from mcp_lora.errors import McpLoraError
from mcp_lora.records import ENGINE_ROLES, Fault
from mcp_lora.tokens import TokenCounter

# What of a configuration decides lengths and padding; it is kept with the conversion.
KEYS = (
    "model_name_or_path",
    "template",
    "tool_format",
    "cutoff_len",
    "default_system",
    "enable_thinking",
    "trust_remote_code",
    "packing",
    "neat_packing",
    "per_device_train_batch_size",
    "train_sampling_strategy",
)
MARGIN = 0.02  # of cutoff_len: nearer than this the sum is not trusted

Messages = list[dict[str, str]]  # {role: user, assistant, function or observation; content}
Pieces = list[str | int]  # texts to be tokenised one by one, and tokens

_ANCHOR = {"name": "a", "description": "", "parameters": {"type": "object", "properties": {}}}
_OTHER = _ANCHOR | {"name": "Z"}
_TRIED = 8  # tools of a batch that are counted both ways
_PROBE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]


def budget(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a configuration that decides lengths."""
    return {key: config[key] for key in KEYS if key in config}


class Lengths:
    """Counts tokens; `settings` are KEYS of a configuration.

    Attributes:
        name: the template's.
        cutoff_len: tokens that a sample may have.
        any_tools: tokens that the first tool adds beyond its own, the tool format's instructions.

    Raises:
        McpLoraError: the tokenizer cannot be had.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        from llamafactory.data.template import TEMPLATES, get_template_and_fix_tokenizer
        from llamafactory.hparams import DataArguments
        from transformers import AutoTokenizer

        model = settings["model_name_or_path"]
        try:
            # As LLaMA-Factory loads it (its model/loader.py).
            self.tokenizer = AutoTokenizer.from_pretrained(
                model, trust_remote_code=bool(settings.get("trust_remote_code")), padding_side="right"
            )
        except (OSError, ValueError) as error:
            reason = str(error).split("\n")[0]
            raise McpLoraError(
                f"the tokenizer of {model} cannot be read ({reason}): mcp-lora convert --model FOLDER"
            ) from None
        known = {field.name for field in fields(DataArguments)}
        self.data_args = DataArguments(**{key: settings[key] for key in KEYS if key in known & set(settings)})
        self.name = name = self.data_args.template
        shared = TEMPLATES[name]
        TEMPLATES[name] = copy.copy(shared)  # the engine writes tool_format into it, for good
        try:
            with quiet():
                self.template = get_template_and_fix_tokenizer(self.tokenizer, self.data_args)
        finally:
            TEMPLATES[name] = shared
        self._recorder = Recorder(self.tokenizer)
        self.cutoff_len: int = self.data_args.cutoff_len
        self.batch_size: int = settings.get("per_device_train_batch_size") or 8
        self.grouped = settings.get("train_sampling_strategy") == "group_by_length"
        self._counter = TokenCounter(self.tokenizer)
        self._constant = 1 if self.template.efficient_eos else 0
        bare = self.count([self.render(_PROBE, "a", None)])[0]
        base, two, other = (self._with([_ANCHOR, *more]) for more in ([], [_ANCHOR], [_OTHER]))
        self._base = base
        self._base_length, both = self.count([base, two])
        # What the first tool adds beyond itself: the instructions of the tool format.
        self.any_tools = self._base_length - bare - (both - self._base_length)
        self._window = _window(base, [two, other])
        # Tokens could reach over an end of the window: then the whole has to be counted.
        if self._window and self._count_windows([two, other]) != self._count_whole([two, other]):
            self._window = None

    def render(self, messages: Messages, system: str, tools: str | None) -> Pieces:
        """Return what LLaMA-Factory's template makes of a sample, before the tokenizer.

        Raises:
            Fault: it cannot render it; in training it would end the run.
        """
        try:
            turns = self.template.encode_multiturn(self._recorder, messages, system, tools)
        except McpLoraError:  # an interruption
            raise
        except Exception as error:  # whatever the formatters stumble over
            raise Fault("not-renderable", f"template {self.name} cannot render it: {error!r}") from None
        return [piece for pair in turns for turn in pair for piece in turn]

    def count(self, rendered: Sequence[Pieces]) -> list[int]:
        """Return the number of tokens of each rendered sample, its end included."""
        counted = self._count(rendered, self._counter.count)
        if not self._counter.is_exact:  # that no sample is cut hangs on the tokenizer's own word
            near = [place for place, length in enumerate(counted) if not self.is_clear(length)]
            exact = self._count([rendered[place] for place in near], self._counter.count_exactly)
            for place, length in zip(near, exact, strict=True):
                counted[place] = length
        return counted

    def _count(self, rendered: Sequence[Pieces], count: Callable[[list[str]], list[int]]) -> list[int]:
        lengths = dict.fromkeys(chain.from_iterable(rendered), 1)
        texts = [piece for piece in lengths if isinstance(piece, str)]
        lengths.update(zip(texts, count(texts), strict=True))
        return [self._constant + sum(map(lengths.__getitem__, pieces)) for pieces in rendered]

    def tools(self, tools: Sequence[dict[str, Any]]) -> list[int | None]:
        """Return what each tool adds to a sample; None for one that the template cannot render."""
        rendered: list[Pieces | None] = []
        for tool in tools:
            try:
                rendered.append(self._with([_ANCHOR, tool]))
            except Fault:
                rendered.append(None)
        found = [pieces for pieces in rendered if pieces is not None]
        if self._window and self._count_windows(found[:_TRIED]) != self._count_whole(found[:_TRIED]):
            self._window = None
        counted = iter(self._count_windows(found) if self._window else self._count_whole(found))
        return [None if pieces is None else next(counted) for pieces in rendered]

    def _with(self, tools: list[dict[str, Any]]) -> Pieces:
        return self.render(_PROBE, "a", json.dumps(tools, ensure_ascii=False))

    def _count_whole(self, rendered: list[Pieces]) -> list[int]:
        return [length - self._base_length for length in self.count(rendered)]

    def _count_windows(self, rendered: list[Pieces]) -> list[int]:
        """Count the part of the prompt alone that differs from the one with the anchor alone."""
        assert self._window
        place, start, end = self._window
        texts = [str(pieces[place]) for pieces in (self._base, *rendered)]
        base, *lengths = self.count([[text[start : len(text) - end]] for text in texts])
        return [length - base for length in lengths]

    def render_sample(self, sample: dict[str, Any]) -> Pieces:
        """Return what the template makes of a sample as it stands in a dataset's file."""
        messages = [
            {"role": ENGINE_ROLES[turn["from"]], "content": turn["value"]} for turn in sample["conversations"]
        ]
        return self.render(messages, sample["system"], sample["tools"])

    def summary(self, lengths: "array[int]") -> dict[str, Any]:
        """Return what lengths of samples are like, in tokens.

        `padding` is the share of a batch that is none of its samples, where every sample is padded
        to the longest, and that to a multiple of 8; `histogram` has (from, to, samples) of equal steps.
        """
        import numpy

        values = numpy.frombuffer(lengths, dtype=numpy.uint32).astype(numpy.int64)
        order = numpy.random.default_rng(0).permutation(values)
        if self.grouped:  # as transformers does it: sorted within 50 batches
            step = 50 * self.batch_size
            order = numpy.concatenate(
                [numpy.sort(order[i : i + step])[::-1] for i in range(0, len(order), step)]
            )
        batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        room = sum(len(batch) * -(-int(batch.max()) // 8) * 8 for batch in batches)
        counts, edges = numpy.histogram(values, bins=min(16, len(set(values.tolist()))))
        return {
            "median": int(numpy.median(values)),
            "p95": int(numpy.percentile(values, 95)),
            "max": int(values.max()),
            "cutoff_len": self.cutoff_len,
            "batch_size": self.batch_size,
            "padding": round(1 - int(values.sum()) / room, 4),
            "histogram": [
                (round(low), round(high), int(count))
                for low, high, count in zip(edges, edges[1:], counts, strict=False)
            ],
        }

    def encode(self, sample: dict[str, Any]) -> list[tuple[int, bool]]:
        """Return the tokens of a sample as LLaMA-Factory trains on it, cut if it is too long.

        Returns:
            (token id, whether it is trained on) of each.

        Raises:
            Fault: the template cannot render it.
        """
        self.render_sample(sample)
        from llamafactory.data.processor import SupervisedDatasetProcessor

        messages = [
            {"role": ENGINE_ROLES[turn["from"]], "content": turn["value"]} for turn in sample["conversations"]
        ]
        row = {
            "_prompt": [messages[:-1]],
            "_response": [messages[-1:]],
            "_system": [sample["system"]],
            "_tools": [sample["tools"]],
            "_images": [None],
            "_videos": [None],
            "_audios": [None],
        }
        processor = SupervisedDatasetProcessor(self.template, self.tokenizer, None, self.data_args)
        encoded = processor.preprocess_dataset(row)
        ignored = -100  # the label of what is not trained on
        return [
            (token, label != ignored)
            for token, label in zip(encoded["input_ids"][0], encoded["labels"][0], strict=True)
        ]

    def is_clear(self, estimate: int) -> bool:
        """Whether a sum is far enough from cutoff_len to be trusted."""
        return abs(estimate - self.cutoff_len) > MARGIN * self.cutoff_len + 8


def _window(base: Pieces, others: list[Pieces]) -> tuple[int, int, int] | None:
    """Return which piece of a prompt differs between others, and how much at its ends does not."""
    different = {
        place
        for other in others
        for place, pair in enumerate(zip(base, other, strict=True))
        if pair[0] != pair[1]
    }
    if len(different) != 1:
        return None
    (place,) = different
    text = str(base[place])
    texts = [str(other[place]) for other in others]
    start = min(len(os.path.commonprefix([text, other])) for other in texts)
    end = min(len(os.path.commonprefix([text[start:][::-1], other[start:][::-1]])) for other in texts)
    return place, start, end


class Recorder:
    """Stands in for the tokenizer in a template, and keeps the texts that it is given."""

    def __init__(self, tokenizer: Any) -> None:
        self.bos_token_id = tokenizer.bos_token_id
        self.eos_token_id = tokenizer.eos_token_id

    def encode(self, text: str, add_special_tokens: bool) -> Pieces:
        return [text]

    def convert_tokens_to_ids(self, token: str) -> int:
        return 0

"""Conversations with media -> padded batches with labels on what the assistant writes."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import ProcessorMixin

from modeling_mimo.messages_mimo_v2 import plain_chats

from .chat_template import training_chat_template
from .media_rows import MEDIA_ROWS, cut_inputs


IGNORED = -100
TURNS = ("all", "last")


class ConversationCollator:
    """Makes batches of examples `{"messages": [...]}`, padded on the right.

    Examples may have `tools` (schemas, or their JSON text) and `chat_template_kwargs` (such as
    `{"enable_thinking": False}`). Messages are what `apply_chat_template` takes: texts, images, videos, sounds,
    `reasoning_content`, tool calls. Everything the assistant's turns render as is learned, `<|im_end|>` included, and
    nothing else; the empty `<think></think>` only where the model would have written it itself. Sequences are not
    packed: rows of a batch are padded to the longest.

    Args:
        processor: a `MiMoV2Processor`, or the tokenizer of a checkpoint for text only.
        max_length: most tokens of an example. Longer ones are a `ValueError`, or with `truncation` cut at the end: a
            medium is kept whole or dropped with everything behind it.
        turns: "all" assistant turns are learned, or the "last" one alone.
        pad_to_multiple_of: of the length of a batch.
        prepare: what is done to `messages` first, such as an `AudioCodeCache`.

    Raises:
        ValueError: an example without messages, without an assistant turn, too long, or with a part that cannot be
            used; named by its place in the batch.
    """

    def __init__(
        self,
        processor,
        max_length: int | None = None,
        truncation: bool = False,
        turns: str = "all",
        pad_to_multiple_of: int = 1,
        prepare: Callable[[list[dict]], list[dict]] | None = None,
    ):
        if turns not in TURNS:
            raise ValueError(f"`turns`: expected one of {list(TURNS)}, got {turns!r}.")
        if truncation and max_length is None:
            raise ValueError("`truncation`: expected a `max_length` with it, got none.")
        self.processor, self.max_length, self.truncation = processor, max_length, truncation
        self.turns, self.pad_to_multiple_of, self.prepare = turns, pad_to_multiple_of, prepare
        self.is_processor = isinstance(processor, ProcessorMixin)
        self.pad_id = (processor.tokenizer if self.is_processor else processor).pad_token_id

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask` and `labels` [B, S], and the media of all examples by the model's names."""
        rows = []
        for index, example in enumerate(examples):
            try:
                rows.append(self.row(example))
            except (ValueError, OSError) as error:
                raise type(error)(f"examples[{index}]: {error}") from error
        longest = max(row["input_ids"].shape[1] for row in rows)
        length = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        fillers = {"input_ids": self.pad_id, "attention_mask": 0, "labels": IGNORED}
        batch = {}
        for name, filler in fillers.items():
            paddings = [length - row[name].shape[1] for row in rows]
            padded = [torch.nn.functional.pad(row[name], (0, p), value=filler) for row, p in zip(rows, paddings)]
            batch[name] = torch.cat(padded)
        for name in MEDIA_ROWS:
            if parts := [row[name] for row in rows if name in row]:
                batch[name] = torch.cat(parts)
        return batch

    def row(self, example: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The batch of one example, without padding."""
        if not example.get("messages"):
            raise ValueError(
                f"expected `messages`, got {sorted(example)}; a Trainer needs remove_unused_columns=False"
            )
        chats, batched = plain_chats(example["messages"])
        if batched:
            raise ValueError("messages: expected one conversation, got a list of them")
        messages, tools = chats[0], example.get("tools")
        tools = json.loads(tools) if isinstance(tools, str) else tools
        inputs = self._inputs(
            self.prepare(messages) if self.prepare else messages, tools, example.get("chat_template_kwargs") or {}
        )
        learned = inputs.pop("assistant_masks").bool()
        length = inputs["input_ids"].shape[1]
        if self.max_length is not None and length > self.max_length:
            if not self.truncation:
                raise ValueError(f"expected at most max_length={self.max_length} tokens, got {length}")
            layout = self.processor.explain(inputs).rows[0] if self.is_processor else ()
            inputs, learned = cut_inputs(inputs, learned, self.max_length, layout)
        if self.turns == "last":
            learned = _last_run(learned)
        if not learned.any():
            raise ValueError("expected an assistant turn to learn, got none within the length")
        return {**inputs, "labels": inputs["input_ids"].masked_fill(~learned, IGNORED)}

    def _inputs(self, messages: list[dict], tools: list | None, variables: dict) -> dict[str, torch.Tensor]:
        options = {
            "tools": tools,
            "tokenize": True,
            "return_dict": True,
            "return_assistant_tokens_mask": True,
            **variables,
        }
        if self.is_processor:
            return dict(self.processor.apply_chat_template(messages, return_tensors="pt", **options))
        rows = self.processor.apply_chat_template(messages, chat_template=training_chat_template(), **options)
        return {name: torch.tensor([row]) for name, row in rows.items()}


def _last_run(learned: torch.Tensor) -> torch.Tensor:
    """[1, S] bool with the last run of True alone: turns are never adjacent."""
    before = learned.roll(1, dims=1)
    before[:, 0] = False
    runs = (learned & ~before).cumsum(dim=1)
    return learned & (runs == runs[:, -1:])


__all__ = ["ConversationCollator"]

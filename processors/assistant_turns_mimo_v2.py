# Copyright 2026 The modeling-mimo authors.
#
# Licensed under the MIT License (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     https://opensource.org/license/mit
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Where the assistant's turns are in token ids, for losses on what the model writes itself."""

from collections.abc import Mapping, Sequence

import torch

from .placeholders_mimo_v2 import TOKENS


TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
HEADER = "assistant\n"
# what the template writes for an answer without reasoning, and itself ahead of the answer where thinking is off
EMPTY_THINKING = ("<think>", "</think>")


class AssistantTurns:
    """Finds the assistant's turns by their control tokens.

    True to any template that writes turns as `<|im_start|>role\\n ... <|im_end|>`, and to truncated rows. Control
    tokens that users typed must have been encoded as text (`sanitize_control_tokens=True`).

    Args:
        tokenizer: of a MiMo-V2 checkpoint.
    """

    def __init__(self, tokenizer):
        self.start, self.end = tokenizer.convert_tokens_to_ids([TURN_START, TURN_END])
        self.header = tokenizer.encode(HEADER, add_special_tokens=False)
        self.empty_thinking = tokenizer.convert_tokens_to_ids(list(EMPTY_THINKING))
        # stand for media or around them; the model never writes one
        self.media = set(tokenizer.convert_tokens_to_ids(list(TOKENS.values())))

    def spans(self, ids: Sequence[int], thinking_given: bool = False) -> list[tuple[int, int]]:
        """(first, behind the last) token of what the model writes in each turn, its `<|im_end|>` included.

        ids: of one row. thinking_given: an empty `<think></think>` is the prompt's, as with `enable_thinking=False`.
        """
        spans, opening = [], [self.start, *self.header]
        for index, token in enumerate(ids):
            if token != self.start or list(ids[index : index + len(opening)]) != opening:
                continue
            first = index + len(opening)
            if thinking_given and list(ids[first : first + 2]) == self.empty_thinking:
                first += 2
            last = next((at for at in range(first, len(ids)) if ids[at] == self.end), len(ids) - 1)
            spans.append((first, last + 1))
        return spans

    def mask(self, ids: Sequence[int], thinking_given: bool = False) -> list[int]:
        """1 for what the model writes in its turns, 0 for all else, media among it."""
        mask = [0] * len(ids)
        for first, behind in self.spans(ids, thinking_given):
            mask[first:behind] = [int(token not in self.media) for token in ids[first:behind]]
        return mask


def assistant_masks(tokenizer, inputs: Mapping, variables: Mapping) -> list[list[int]] | torch.Tensor:
    """1 for the tokens of `inputs` that the model writes in its turns, [B, S] like `input_ids`.

    variables: of the chat template. An empty `<think></think>` is not the model's own with `enable_thinking=False`,
        which puts it into the prompt, and with `keep_all_reasoning=False`, for earlier reasoning that was left out.
    """
    given = variables.get("enable_thinking") is False or variables.get("keep_all_reasoning") is False
    turns, ids, real = AssistantTurns(tokenizer), inputs["input_ids"], inputs["attention_mask"]
    tensors = isinstance(ids, torch.Tensor)
    rows = zip(ids.tolist(), real.tolist()) if tensors else zip(ids, real)
    # an open last turn would run on into padding on the right
    masks = [[own * kept for own, kept in zip(turns.mask(row, given), mask)] for row, mask in rows]
    return torch.tensor(masks) if tensors else masks


__all__ = ["AssistantTurns", "assistant_masks"]

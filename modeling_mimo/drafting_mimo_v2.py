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
"""Drafting with the MTP heads, from the last window of the trunk's states: what the loop of `use_mtp=True` needs."""

from contextlib import contextmanager

import torch
from accelerate.utils import align_module_device
from torch import nn

from .modeling_mimo_v2_base import apply_rotary_, softmax_with_sinks


def shifted(old: torch.Tensor, new: torch.Tensor, kept: list[int], dim: int = 1) -> torch.Tensor:
    """`old` without its first entries, and of row i the first `kept[i]` ones of `new` behind it; as many as before."""
    both, length = torch.cat((old, new), dim=dim), old.shape[dim]
    return torch.stack([row.narrow(dim - 1, count, length) for row, count in zip(both, kept)])


class TrunkStates:
    """The last `window` embeddings that went into the trunk and hidden states that came out, before its final norm.

    A slot per token, [batch, window, hidden], the latest token last. `counts` [batch]: real slots of each row.
    """

    def __init__(self, trunk: nn.Module, window: int):
        self.trunk, self.window = trunk, window
        self.embeddings = self.hidden = self.counts = None
        # steps that all rows took alike, not yet among the above: plain steps need none of it
        self.later: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.recorded = []

    @contextmanager
    def recording(self):
        """Each forward of the trunk inside is recorded."""

        def take_embeddings(module, args):
            self.recorded.append([args[0][:, -self.window :]])

        def take_hidden(module, args):
            self.recorded[-1].append(args[0][:, -self.window :])

        # embeddings from here, not of `input_ids`, have the features of images and sounds in place
        handles = [
            self.trunk.layers[0].register_forward_pre_hook(take_embeddings),
            self.trunk.norm.register_forward_pre_hook(take_hidden),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def begin(self, counts: torch.Tensor) -> None:
        """Takes what a prefill recorded: of each row the last `counts` tokens are real."""
        states = [torch.cat(parts, dim=1)[:, -self.window :] for parts in zip(*self.recorded)]
        front = self.window - states[0].shape[1]
        self.embeddings, self.hidden = (nn.functional.pad(part, (0, 0, front, 0)) for part in states)
        self.counts = counts.clamp(max=states[0].shape[1])
        self.recorded = []

    def append(self, kept: list[int]) -> None:
        """Takes of row i the first `kept[i]` tokens of the one forward that was recorded."""
        ((embeddings, hidden),) = self.recorded
        self.recorded = []
        if len(set(kept)) == 1:
            self.later = [*self.later[1 - self.window :], (embeddings[:, : kept[0]], hidden[:, : kept[0]])]
            self.counts = (self.counts + kept[0]).clamp(max=self.window)
            return
        self.settle()
        self.embeddings, self.hidden = (
            shifted(old, new, kept) for old, new in ((self.embeddings, embeddings), (self.hidden, hidden))
        )
        self.counts = (self.counts + torch.tensor(kept, device=self.counts.device)).clamp(max=self.window)

    def settle(self) -> None:
        """Makes `embeddings` and `hidden` those of the latest tokens."""
        if self.later:
            states = zip((self.embeddings, self.hidden), *self.later)
            self.embeddings, self.hidden = (torch.cat(parts, dim=1)[:, -self.window :] for parts in states)
            self.later = []


class DraftHeads:
    """The MTP heads of a model on TrunkStates.

    Head k pairs the hidden state at position i with the embedding of token i + 1 + k and predicts token i + 2 + k; all
    heads read the trunk, none reads another head. Keys and values of a slot depend on that pair alone, so that a draft
    step computes those of new slots, and again those of the last k, whose tokens were drafts.
    """

    def __init__(self, model: nn.Module, states: TrunkStates):
        self.model, self.states = model, states
        self.layers = model.model.mtp.layers
        # per head: keys and values [batch, kv heads, window, D], and how many of the last slots are to be computed
        self.stored: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * len(self.layers)
        self.missing = [states.window] * len(self.layers)
        # slots that all rows moved on without the heads
        self.behind = 0

    def append(self, kept: list[int]) -> None:
        """Moves along with `TrunkStates.append`."""
        if len(set(kept)) == 1:
            self.behind += kept[0]
            return
        self.settle()
        for head, stored in enumerate(self.stored):
            if stored is not None:
                self.stored[head] = tuple(
                    shifted(part, part.new_zeros(*part.shape[:2], max(kept), part.shape[3]), kept, dim=2)
                    for part in stored
                )
        self.missing = [min(missing + max(kept), self.states.window) for missing in self.missing]

    def settle(self) -> None:
        """Makes the slots of what is stored those of the states."""
        behind, self.behind = min(self.behind, self.states.window), 0
        if behind:
            self.stored = [
                stored and tuple(nn.functional.pad(part[:, :, behind:], (0, 0, 0, behind)) for part in stored)
                for stored in self.stored
            ]
            self.missing = [min(missing + behind, self.states.window) for missing in self.missing]

    def logits(self, head: int, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """[batch, vocab] float32: what `head` says behind the last slot.

        Args:
            tokens: [batch, head + 1], the next token and the drafts of the heads before this one.
            positions: [batch], of the token in the last slot.
        """
        self.states.settle()
        self.settle()
        layer, window = self.layers[head], self.states.window
        rows = min(max(self.missing[head], 1), window)
        later = self.model.model.embed_tokens(tokens).to(self.states.embeddings)
        following = torch.cat((self.states.embeddings, later), dim=1)[:, head + 1 :]
        mixed = layer.combine(following[:, -rows:], self.states.hidden[:, -rows:])
        places = positions[:, None] + torch.arange(1 - rows, 1, device=positions.device)
        rotary = self.model.model.rotary_emb(mixed, places.clamp(min=0), "sliding_attention")
        query, key, value = layer.self_attn.project(layer.input_layernorm(mixed))
        key, query = apply_rotary_(key, *rotary), apply_rotary_(query, *rotary)
        keys, values = self._store(head, key, value)
        attended = self._attend(layer.self_attn, query[:, :, -1:], keys, values)
        hidden_states = mixed[:, -1:] + layer.self_attn.o_proj(attended)
        hidden_states = hidden_states + layer.mlp(layer.pre_mlp_layernorm(hidden_states))
        # of the last slots, as many as there were drafts among `tokens` are not yet known
        self.missing[head] = head
        return self.model.lm_head(layer.final_layernorm(hidden_states))[:, -1].float()

    def _store(self, head: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values of all slots, the last ones being these."""
        if self.stored[head] is None:
            front = (0, 0, self.states.window - key.shape[2], 0)
            self.stored[head] = tuple(nn.functional.pad(part, front) for part in (key, value))
        else:
            self.stored[head] = tuple(
                torch.cat((old[:, :, : old.shape[2] - new.shape[2]], new), dim=2)
                for old, new in zip(self.stored[head], (key, value))
            )
        return self.stored[head]

    def _attend(self, attention: nn.Module, query, keys, values) -> torch.Tensor:
        """[batch, heads, 1, D] on all real slots, which are as many as a query of a sliding layer sees."""
        groups = query.shape[1] // keys.shape[1]
        grouped = query.unflatten(1, (-1, groups)).squeeze(3)
        scores = (grouped @ keys.transpose(-1, -2)).float() * attention.scaling
        hidden = torch.arange(keys.shape[2], device=keys.device) < keys.shape[2] - self.states.counts[:, None]
        scores = scores.masked_fill(hidden[:, None, None], -torch.inf).flatten(1, 2)[:, :, None]
        # offloaded sinks are brought by `forward`, which does not run here
        with align_module_device(attention):
            weights = softmax_with_sinks(scores, attention.sinks).to(values.dtype)
        output = weights.squeeze(2).unflatten(1, (-1, groups)) @ values
        return output.flatten(1, 2).flatten(1)[:, None]

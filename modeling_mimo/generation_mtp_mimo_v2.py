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
"""`generate(use_mtp=True)`: the draft heads propose up to three tokens, one forward of the trunk verifies them all."""

import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    MaxLengthCriteria,
    StoppingCriteriaList,
)

from .cache_mimo_v2 import HybridCache
from .cache_names_mimo_v2 import CACHE_NAME, has_both_names
from .drafting_depth_mimo_v2 import AutoDepth, FixedDepth
from .drafting_mimo_v2 import DraftHeads, TrunkStates


@dataclass
class MTPStats:
    """What drafting brought.

    proposed, accepted: drafts per head. steps: how many had 0, 1, ... drafts. forwards: of the trunk, the prefill
    included. tokens: generated in all rows. seconds: in "draft", "verify" (forwards of the trunk, the prefill
    included) and "other". rows: of each row `proposed`, `accepted`, `tokens` and `forwards` behind the prefill.
    """

    proposed: list[int]
    accepted: list[int]
    steps: list[int]
    forwards: int = 0
    tokens: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"draft": 0.0, "verify": 0.0, "other": 0.0})
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def mean_accepted_length(self) -> float:
        """Tokens of a row per forward behind the prefill, the trunk's own token included."""
        return 1 + sum(self.accepted) / max(1, sum(row["forwards"] for row in self.rows))

    @property
    def tokens_per_forward(self) -> float:
        return self.tokens / max(1, self.forwards)

    @contextmanager
    def timed(self, part: str):
        """Seconds inside count as `part`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - start


@has_both_names
@dataclass
class MTPGenerateOutput(GenerateDecoderOnlyOutput):
    mtp_stats: MTPStats | None = None


class Row:
    """One sequence while it grows: its ids as `generate` knows them, and what is reported of each new token."""

    def __init__(self, ids: torch.Tensor, heads: int):
        self.ids = ids
        self.scores, self.logits = [], []
        # whether it has ended, and whether the trunk has then seen its last token, because other rows went on
        self.finished = self.closed = False
        self.counts = {"proposed": [0] * heads, "accepted": [0] * heads, "tokens": 0, "forwards": 0}


class Chooser:
    """How tokens are chosen: the trunk's distribution after all logits processors, greedily or by sampling."""

    def __init__(self, logits_processor, do_sample: bool):
        self.logits_processor, self.do_sample = logits_processor, do_sample

    def scores(self, ids: list[torch.Tensor], logits: torch.Tensor) -> torch.Tensor:
        """[batch, vocab] of processed scores behind the ids of each row.

        Processors count columns and may know each row of the batch: once per length of a row all rows go in, and those
        of this length count.
        """
        if not self.logits_processor:
            return logits
        scores = torch.empty_like(logits)
        for places in by_length(ids):
            length = len(ids[places[0]])
            table = torch.stack([F.pad(row[-length:], (length - len(row[-length:]), 0)) for row in ids])
            # processors may write to what they get
            scores[places] = self.logits_processor(table, logits.clone())[places]
        return scores

    def draw(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[rows] tokens, and the distributions they were drawn from when sampling."""
        if not self.do_sample:
            return scores.argmax(-1), None
        probabilities = scores.softmax(-1)
        return torch.multinomial(probabilities, 1)[:, 0], probabilities

    def verify(self, drafts: torch.Tensor, drafted: torch.Tensor | None, scores: torch.Tensor):
        """Whether the trunk takes `drafts` [rows], [rows] bool, and the tokens that stand there then.

        Speculative sampling: with probability p / q, else a draw from what p has more than q, which together is p.
        """
        if not self.do_sample:
            tokens = scores.argmax(-1)
            return tokens == drafts, tokens
        wanted = scores.softmax(-1)
        p, q = (part.gather(-1, drafts[:, None])[:, 0] for part in (wanted, drafted))
        accepted = torch.rand_like(p) * q < p
        rest = (wanted - drafted).clamp(min=0)
        # equal distributions leave nothing
        rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, wanted)
        return accepted, torch.where(accepted, drafts, torch.multinomial(rest, 1)[:, 0])


def by_length(ids: list[torch.Tensor]) -> list[list[int]]:
    """Places of rows of equal length."""
    groups: dict[int, list[int]] = {}
    for place, row in enumerate(ids):
        groups.setdefault(len(row), []).append(place)
    return list(groups.values())


class Ending:
    """Which rows end with their last token, as the stopping criteria of `generate` say."""

    def __init__(self, criteria: StoppingCriteriaList):
        # what every step asks looks at the last token or the length alone, so that rows need not be of one length
        self.eos = [criterion for criterion in criteria if type(criterion) is EosTokenCriteria]
        lengths = [criterion.max_length for criterion in criteria if type(criterion) is MaxLengthCriteria]
        self.max_length = min(lengths, default=None)
        known = (EosTokenCriteria, MaxLengthCriteria)
        self.others = StoppingCriteriaList([criterion for criterion in criteria if type(criterion) not in known])

    def of(self, ids: list[torch.Tensor], scores: torch.Tensor) -> list[bool]:
        """Per row; `scores` [rows, vocab] are those that its last token was chosen by."""
        last = torch.stack([row[-1] for row in ids])[:, None]
        ended = torch.zeros(len(ids), dtype=torch.bool, device=last.device)
        for criterion in self.eos:
            ended |= criterion(last, scores)
        for places in by_length(ids) if self.others else []:
            ended[places] |= self.others(torch.stack([ids[place] for place in places]), (scores[places],))
        full = [self.max_length is not None and len(row) >= self.max_length for row in ids]
        return [end or long for end, long in zip(ended.tolist(), full)]


class MTPDecoder:
    """The loop of draft, verify, take and roll back for a batch, every row at its own pace.

    `padding` [batch]: slots in front of each row in the cache that hold no token of it. `behind`: slots behind each
    ended row in global layers.

    Args:
        depths: how many drafts a step has, a FixedDepth or an AutoDepth.
        keeps_scores: whether scores and logits of every token are asked for.
    """

    def __init__(
        self,
        model,
        rows: list[Row],
        chooser: Chooser,
        stopping_criteria,
        cache: HybridCache,
        depths: FixedDepth | AutoDepth,
        keeps_scores: bool,
    ):
        self.model, self.rows, self.chooser = model, rows, chooser
        self.ending, self.cache, self.depths = Ending(stopping_criteria), cache, depths
        self.keeps_scores = keeps_scores
        heads = len(model.model.mtp.layers)
        self.stats = MTPStats([0] * heads, [0] * heads, [0] * (heads + 1))
        window = model.config.attention_geometry("sliding_attention").window
        self.states = TrunkStates(model.model, window)
        self.heads = DraftHeads(model, self.states)

    def prefill(self, forward, padding: torch.Tensor) -> torch.Tensor:
        """Runs the prompt; returns logits [batch, vocab] behind it."""
        before = self.cache.get_seq_length()
        with self.stats.timed("verify"), self.states.recording():
            logits = forward().logits[:, -1].float()
        self.stats.forwards += 1
        self.depths.start(self.stats.seconds["verify"])
        self.padding, total = padding, self.cache.get_seq_length()
        self.behind = [0] * len(padding)
        self.states.begin(torch.minimum(total - padding, torch.full_like(padding, total - before)))
        return logits

    @property
    def lengths(self) -> torch.Tensor:
        """[batch] tokens of each row that the trunk has seen."""
        return self.cache.get_seq_length() - self.padding

    def draft(self, tokens: torch.Tensor, depth: int) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        """[batch, 1 + depth]: the next token of each row and drafts behind it; and per head the distributions
        [batch, vocab] that these were drawn from."""
        distributions = []
        tokens = tokens[:, None]
        for head in range(depth):
            logits = self.heads.logits(head, tokens, self.lengths - 1)
            ids = [torch.cat((row.ids, own[1:])) for row, own in zip(self.rows, tokens)]
            drawn, distribution = self.chooser.draw(self.chooser.scores(ids, logits))
            distributions.append(distribution)
            tokens = torch.cat((tokens, drawn[:, None]), dim=1)
        return tokens, distributions

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[batch, n] tokens -> logits [batch, n, vocab] float32; the cache then holds them."""
        count, total = tokens.shape[1], self.cache.get_seq_length()
        mask = None
        if self.padding.any():
            mask = (torch.arange(total + count, device=tokens.device) >= self.padding[:, None]).long()
        positions = self.lengths[:, None] + torch.arange(count, device=tokens.device)
        with self.states.recording():
            outputs = self.model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=positions,
                cache=self.cache,
                use_cache=True,
            )
        self.stats.forwards += 1
        return outputs.logits.float()

    def take(self, places: list[int], tokens: torch.Tensor, scores: torch.Tensor, logits: torch.Tensor) -> None:
        """Appends a token to each of these rows, which may end with it."""
        rows = [self.rows[place] for place in places]
        for row, token, score, behind in zip(rows, tokens, scores, logits):
            row.ids = torch.cat((row.ids, token[None]))
            row.counts["tokens"] += 1
            if self.keeps_scores:
                row.scores.append(score)
                row.logits.append(behind)
        for row, end in zip(rows, self.ending.of([row.ids for row in rows], scores)):
            row.finished = end

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Drafts behind the next token of each row, verifies, takes; returns the next tokens [batch]."""
        started, depth = time.perf_counter(), self.depths.choose()
        going, before = sum(not row.finished for row in self.rows), sum(len(row.ids) for row in self.rows)
        with self.stats.timed("draft"):
            drafts, distributions = self.draft(tokens, depth)
        with self.stats.timed("verify"):
            logits = self.forward(drafts)
        self.roll_back(self.verify(drafts, distributions, logits))
        tokens = torch.stack([row.ids[-1] for row in self.rows])
        self.stats.steps[depth] += 1
        taken = sum(len(row.ids) for row in self.rows) - before
        self.depths.took(depth, time.perf_counter() - started, taken / going)
        return tokens

    def verify(
        self, drafts: torch.Tensor, distributions: list[torch.Tensor | None], logits: torch.Tensor
    ) -> list[int]:
        """Takes the drafts of each row as far as the trunk agrees, and then its own token; returns per row how many
        of the tokens that it has just seen stay in the cache."""
        # of a row that has ended, its last token and nothing more
        kept = [int(row.finished and not row.closed) for row in self.rows]
        for row in self.rows:
            row.closed = row.finished
        going = [place for place, row in enumerate(self.rows) if not row.finished]
        for place in going:
            counts = self.rows[place].counts
            counts["forwards"] += 1
            counts["proposed"] = [n + (head < len(distributions)) for head, n in enumerate(counts["proposed"])]
        for depth in range(drafts.shape[1]):
            behind = logits[going, depth]
            scores = self.chooser.scores([row.ids for row in self.rows], logits[:, depth])[going]
            if depth < len(distributions):
                drafted = None if distributions[depth] is None else distributions[depth][going]
                accepted, tokens = self.chooser.verify(drafts[going, depth + 1], drafted, scores)
                accepted = accepted.tolist()
                for place, right in zip(going, accepted):
                    self.rows[place].counts["accepted"][depth] += right
                self.depths.verified(depth, len(going), sum(accepted))
            else:
                tokens, accepted = self.chooser.draw(scores)[0], [False] * len(going)
            self.take(going, tokens, scores, behind)
            for place in going:
                kept[place] = depth + 1
            going = [place for place, right in zip(going, accepted) if right and not self.rows[place].finished]
            if not going:
                break
        return kept

    def roll_back(self, kept: list[int]) -> None:
        """Removes what was refused from the cache: what all rows refused, then what some did, by moving these rows."""
        seen, most = self.states.recorded[0][0].shape[1], max(kept)
        self.cache.crop(most - seen)
        if min(kept) < most:
            moved = [most - count for count in kept]
            # an ended row is hidden in global layers until the end, where it is moved once
            self.behind = [past + by * (not count) for past, by, count in zip(self.behind, moved, kept)]
            self.cache.shift_rows(moved, [by * bool(count) for by, count in zip(moved, kept)])
            self.padding = self.padding + torch.tensor(moved, device=self.padding.device)
        # nobody asks for drafts of an ended row
        kept = [count or most for count in kept]
        self.states.append(kept)
        self.heads.append(kept)

    def align_cache(self) -> None:
        """Puts every row into the slots that it would have without drafts: token i of its ids in slot i, all but the
        last one of the longest row."""
        length = max(len(row.ids) for row in self.rows) - 1
        ends = [min(len(row.ids) - (not row.closed), length) for row in self.rows]
        # a row that ended before the others may be the longest; the last token of the longest has no slot
        over = [len(row.ids) - (not row.closed) - end for row, end in zip(self.rows, ends)]
        self.cache.shift_rows(over, [past + by for past, by in zip(self.behind, over)])
        if any(end != self.cache.get_seq_length() for end in ends):
            self.cache.align_rows(ends, length)

    def finished_stats(self) -> MTPStats:
        self.stats.rows = [row.counts for row in self.rows]
        for counts in self.stats.rows:
            self.stats.tokens += counts["tokens"]
            for name in ("proposed", "accepted"):
                totals = getattr(self.stats, name)
                totals[:] = map(sum, zip(totals, counts[name]))
        return self.stats


def check_mtp(model, generation_config, model_kwargs: dict[str, Any], depth: int | str) -> None:
    """Raises a `ValueError` for what drafting cannot do."""
    if model.model.mtp is None:
        raise ValueError("`use_mtp`: expected a model with MTP heads, got one without.")
    heads = len(model.model.mtp.layers)
    if depth != "auto" and (not isinstance(depth, int) or isinstance(depth, bool) or not 1 <= depth <= heads):
        raise ValueError(f"`mtp_depth`: expected 1 to {heads} drafts or 'auto', got {depth!r}.")
    if generation_config.num_beams > 1:
        raise ValueError(f"`num_beams`: expected 1 with `use_mtp`, got {generation_config.num_beams}.")
    cache, most = model_kwargs.get(CACHE_NAME), heads if depth == "auto" else depth
    if not isinstance(cache, HybridCache) or cache.max_rollback < most:
        got = type(cache).__name__
        if isinstance(cache, HybridCache):
            got = f"max_rollback={cache.max_rollback}"
        raise ValueError(f"`cache`: expected a HybridCache that can roll back {most} tokens, got {got}.")
    if model_kwargs.get("inputs_embeds") is not None:
        raise ValueError("`input_ids`: expected token ids with `use_mtp`, got `inputs_embeds`.")


def mtp_decoding(
    model,
    input_ids: torch.LongTensor,
    logits_processor,
    stopping_criteria,
    generation_config,
    synced_gpus: bool = False,
    streamer=None,
    tokenizer=None,
    mtp_depth: int | str = 3,
    **model_kwargs,
):
    """`GenerationMixin._sample` with draft heads: the same tokens when greedy, the same distribution when sampling.

    Args:
        tokenizer: of `stop_strings`, which are among the stopping criteria already.
        mtp_depth: drafts per step, or "auto".

    Returns:
        What `_sample` returns; with `return_dict_in_generate` an MTPGenerateOutput.

    Raises:
        ValueError: see `check_mtp`.
    """
    check_mtp(model, generation_config, model_kwargs, mtp_depth)
    started = time.perf_counter()
    cache, mask = model_kwargs[CACHE_NAME], model_kwargs.get("attention_mask")
    padding = torch.zeros(len(input_ids), dtype=torch.long, device=input_ids.device)
    if mask is not None:
        padding = mask.shape[1] - mask.sum(-1)
        if not bool((mask.cummax(-1).values == mask).all()):
            raise ValueError("`attention_mask`: expected padding on the left alone with `use_mtp`.")
    rows = [Row(ids, len(model.model.mtp.layers)) for ids in input_ids]
    chooser = Chooser(logits_processor, generation_config.do_sample)
    keeps_scores = generation_config.return_dict_in_generate and (
        generation_config.output_scores or generation_config.output_logits
    )
    asked = generation_config.max_length - input_ids.shape[1]
    depths = AutoDepth(len(model.model.mtp.layers), asked) if mtp_depth == "auto" else FixedDepth(mtp_depth)
    decoder = MTPDecoder(model, rows, chooser, stopping_criteria, cache, depths, keeps_scores)
    logits = decoder.prefill(lambda: model._prefill(input_ids, generation_config, model_kwargs), padding)
    scores = chooser.scores([row.ids for row in rows], logits)
    decoder.take(list(range(len(rows))), chooser.draw(scores)[0], scores, logits)
    tokens, streamed = torch.stack([row.ids[-1] for row in rows]), input_ids.shape[1]
    while True:
        if streamer is not None:
            for token in rows[0].ids[streamed:]:
                streamer.put(token[None].cpu())
            streamed = len(rows[0].ids)
        if all(row.finished for row in rows):
            break
        tokens = decoder.step(tokens)
    if streamer is not None:
        streamer.end()
    decoder.align_cache()
    stats = decoder.finished_stats()
    stats.seconds["other"] = time.perf_counter() - started - stats.seconds["draft"] - stats.seconds["verify"]
    pad = generation_config._pad_token_tensor
    sequences = torch.nn.utils.rnn.pad_sequence(
        [row.ids for row in rows], batch_first=True, padding_value=0 if pad is None else int(pad)
    )
    if not generation_config.return_dict_in_generate:
        return sequences
    return MTPGenerateOutput(
        sequences=sequences,
        scores=stacked([row.scores for row in rows]) if generation_config.output_scores else None,
        logits=stacked([row.logits for row in rows]) if generation_config.output_logits else None,
        mtp_stats=stats,
        **{CACHE_NAME: cache},
    )


def stacked(rows: list[list[torch.Tensor]]) -> tuple[torch.Tensor, ...]:
    """Per token [batch, vocab]; zeros for rows that ended before."""
    longest = max(map(len, rows))
    ended = torch.zeros_like(rows[0][0])
    return tuple(torch.stack([row[place] if place < len(row) else ended for row in rows]) for place in range(longest))


__all__ = ["MTPGenerateOutput", "MTPStats"]

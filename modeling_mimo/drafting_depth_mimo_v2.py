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
"""How many tokens to draft in a step: `mtp_depth="auto"` weighs what drafts bring against what they cost."""

# of the time without drafts, what `auto` may lose by trying them: as much ahead, for the prefill and the first tokens,
# and as much while it runs; what measurements are wrong by comes on top
LOSS_SHARE = 0.01
TOKENS_AHEAD = 128

# steps without drafts at the start, of which the first does not count: it may be slower than the rest
PLAIN_STEPS = 4

# drafts must promise this much more speed, and what they bring counts this much less: measured costs are not exact
MARGIN = 0.04

# chance that a draft is accepted, believed as much as this many drafts that were seen, until drafts are seen
PRIOR_CHANCE, PRIOR_WEIGHT = 0.75, 2.0

# what was seen counts this much less after every step, so that text of another kind gets another try
MEMORY = 0.97

# cost of a draft before it is measured, in steps without drafts
ASSUMED_COST = 0.25

# least weight of the latest step in the running mean of a cost
LATEST = 0.1


class FixedDepth:
    """The same number of drafts in every step."""

    def __init__(self, depth: int):
        self.depth = depth

    def start(self, prefill_seconds: float) -> None:
        pass

    def choose(self) -> int:
        return self.depth

    def verified(self, head: int, rows: int, accepted: int) -> None:
        pass

    def took(self, depth: int, seconds: float, tokens: float) -> None:
        pass


class AutoDepth:
    """The number of drafts with the most tokens per second, as far as measured on this run; 0 to all heads.

    Drafting is on credit: a step that brings less than plain steps of the same time would have brought costs the
    difference, a step that brings more pays it in, and a step that could cost more than there is is not taken.

    Args:
        heads: of the model.
        asked: tokens that may be generated.
    """

    def __init__(self, heads: int, asked: int):
        self.heads, self.asked = heads, asked
        # mean seconds of a step, and steps, by number of drafts
        self.seconds: list[float | None] = [None] * (heads + 1)
        self.steps = [0] * (heads + 1)
        self.seen, self.accepted = [0.0] * heads, [0.0] * heads
        self.last, self.credit = 0, 0.0

    def start(self, prefill_seconds: float) -> None:
        """To be called after the prefill."""
        self.credit = LOSS_SHARE * prefill_seconds

    def cost(self, depth: int) -> float:
        """Seconds of a step; between and beyond the measured depths, as if every draft cost the same."""
        if self.seconds[depth] is not None:
            return self.seconds[depth]
        plain = self.seconds[0]
        measured = [known for known in range(1, self.heads + 1) if self.seconds[known] is not None]
        if not measured:
            return plain * (1 + ASSUMED_COST * depth)
        nearest = min(measured, key=lambda known: abs(known - depth))
        return plain + max(0.0, self.seconds[nearest] - plain) * depth / nearest

    def expected_tokens(self, depth: int) -> float:
        """Tokens of a row in a step: the trunk's own, and drafts as long as all before them were accepted."""
        tokens, chance = 1.0, 1.0
        for seen, accepted in zip(self.seen[:depth], self.accepted):
            chance *= (accepted + PRIOR_WEIGHT * PRIOR_CHANCE) / (seen + PRIOR_WEIGHT)
            tokens += chance
        return tokens

    def choose(self) -> int:
        """Drafts of the next step."""
        if self.steps[0] < PLAIN_STEPS:
            return 0
        best = max(range(self.heads + 1), key=lambda depth: self.expected_tokens(depth) / self.cost(depth))
        pays = self.expected_tokens(best) / self.cost(best) > (1 + MARGIN) / self.seconds[0]
        return best if pays and self.cost(best) - self.seconds[0] <= self.credit else 0

    def verified(self, head: int, rows: int, accepted: int) -> None:
        """So many rows had a draft of `head` behind accepted ones, and so many of these were accepted."""
        self.seen[head] += rows
        self.accepted[head] += accepted

    def took(self, depth: int, seconds: float, tokens: float) -> None:
        """A step with `depth` drafts brought so many tokens to a row."""
        # the first drafts after plain steps also compute what the heads had no need of in the meantime
        if self.seconds[depth] is None or depth == 0 or self.last > 0:
            self.measure(depth, seconds)
        self.steps[depth] += 1
        if depth > 0:
            self.credit += tokens * (1 - MARGIN) * self.seconds[0] - seconds
        elif self.steps[0] == PLAIN_STEPS:
            self.credit += LOSS_SHARE * self.seconds[0] * min(self.asked, TOKENS_AHEAD)
        self.credit += LOSS_SHARE * seconds
        self.seen, self.accepted = ([MEMORY * count for count in counts] for counts in (self.seen, self.accepted))
        self.last = depth

    def measure(self, depth: int, seconds: float) -> None:
        """Takes a step into the mean of its depth."""
        known, counted = self.seconds[depth], self.steps[depth] - (depth == 0)
        if known is None or counted < 1:
            self.seconds[depth] = seconds
        else:
            # one hiccup of the machine is not the cost of a depth
            self.seconds[depth] += max(LATEST, 1 / (counted + 1)) * (min(seconds, 2 * known) - known)

"""A plot of the gallery: accepted drafts by the entropy of the next token, beside the published curve."""

import argparse
import bisect
import itertools

import numpy as np
import torch
from gallery_models import load, page_ids
from gallery_style import BLUE, GREEN, GREY, ORANGE, PINK, RED, panels
from mtp import published
from tqdm import tqdm
from transformers import AutoProcessor

from modeling_mimo.cli.bench_micro import numbered, wilson
from modeling_mimo.training.micro_tasks import example


# tasks whose answers are long enough to draft, and pages of the documentation to go on with
TASKS = ("story", "fact", "sum")
PAGES = "docs"
PROMPT = 96
# 0 is greedy; the others spread the entropies
TEMPERATURES = (0.0, 0.6, 1.0)
# nats
EDGES = (0.01, 0.03, 0.1, 0.2, 0.4, 0.7, 1.0, 1.4, 1.8, 2.4, 3.0, 4.0)
# of the published fit
POWER = 0.58
# edges that the first head's share is told below and above
SURE, UNSURE = 0.1, 1.0
# accepted lengths that the report gives
REPORTED = (2.8, 3.6)
MARKS = {"story": ("o", BLUE), "fact": ("s", GREEN), "sum": ("D", PINK), PAGES: ("^", RED)}


class Steps:
    """The verifying forwards of one generation at batch 1: what the trunk said, and how many tokens each step gave."""

    def __init__(self, model):
        self.seen = []
        self.handle = model.register_forward_hook(self.take, with_kwargs=True)

    def take(self, module, args, kwargs, output) -> None:
        self.seen.append((kwargs.get("position_ids"), output.logits[0].float()))

    def finished(self) -> list[tuple[torch.Tensor, int]]:
        """Logits [1 + drafts, vocabulary] and tokens given of each step, the last one left out, which an end cuts."""
        self.handle.remove()
        # the first forward is the prefill
        steps = [(int(positions[0, 0]), logits) for positions, logits in self.seen[1:]]
        return [(logits, after - start) for (start, logits), (after, _) in itertools.pairwise(steps)]


def prompts(processor, count: int) -> list[tuple[str, dict]]:
    """(kind of text, inputs of `generate`), `count` of each kind."""
    found = []
    for task in TASKS:
        for number in range(count):
            asked = example(task, numbered(0, number))
            inputs = processor.apply_chat_template(
                asked["messages"],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                **asked.get("chat_template_kwargs", {}),
            )
            found.append((task, dict(inputs)))
    ids = page_ids(processor.tokenizer, 100 * PROMPT)
    starts = [index * (ids.shape[1] - PROMPT) // count for index in range(count)]
    pages = [{"input_ids": ids[:, start : start + PROMPT]} for start in starts]
    return found + [(PAGES, page | {"attention_mask": torch.ones_like(page["input_ids"])}) for page in pages]


def drafted(model, inputs: dict, temperature: float, tokens: int, seed: int) -> list[tuple[list[float], int]]:
    """Of each step the entropies in nats of the distributions that its tokens are of, and how many tokens it gave."""
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    torch.manual_seed(seed)
    steps = Steps(model)
    model.generate(
        **inputs, use_mtp=True, max_new_tokens=tokens, **(sampling if temperature else {"do_sample": False})
    )
    found = []
    for logits, given in steps.finished():
        # greedy generation has no distribution; what it leaves out is that of the model
        chances = (logits / (temperature or 1.0)).softmax(-1)
        found.append((torch.special.entr(chances).sum(-1)[:given].tolist(), given))
    return found


def measure_acceptance(options: argparse.Namespace) -> dict:
    model, processor = load(options.model, torch.float32), AutoProcessor.from_pretrained(options.model)
    heads, asked = len(model.model.mtp.layers), prompts(processor, 2 if options.quick else 12)
    tried, right = np.zeros((2, heads, len(EDGES) + 1), int)
    sums, points = np.zeros((3, len(EDGES) + 1)), []
    bar = tqdm(total=len(asked) * len(TEMPERATURES), desc="acceptance", unit="text", disable=None)
    for temperature in TEMPERATURES:
        for seed, (kind, inputs) in enumerate(asked):
            steps = drafted(model, inputs, temperature, 24 if options.quick else 128, seed)
            bar.update()
            if not steps:
                continue
            for entropies, given in steps:
                place = bisect.bisect(EDGES, entropies[0])
                sums[:, place] += 1, entropies[0], given
                for head, entropy in enumerate(entropies[:heads]):
                    tried[head, bisect.bisect(EDGES, entropy)] += 1
                    right[head, bisect.bisect(EDGES, entropy)] += given > head + 1
            every = [entropy for entropies, _ in steps for entropy in entropies]
            length = sum(given for _, given in steps) / len(steps)
            points.append([kind, temperature, sum(every) / len(every), length, len(steps)])
    bar.close()
    return {
        "edges": list(EDGES),
        "tried": tried.tolist(),
        "right": right.tolist(),
        "steps": sums[0].astype(int).tolist(),
        "mean_entropy": [float(total / max(1, count)) for count, total, _ in sums.T],
        "mean_length": [float(total / max(1, count)) for count, _, total in sums.T],
        "texts": points,
        "text_fields": ["kind", "temperature", "entropy", "accepted_length", "steps"],
    }


def pooled(points: list[list]) -> dict[tuple[str, float], tuple[float, float]]:
    """(kind, temperature) -> entropy per token and accepted length, over all texts of it, weighed by steps."""
    groups: dict = {}
    for kind, temperature, entropy, length, steps in points:
        groups.setdefault((kind, temperature), []).append((entropy * length * steps, length * steps, steps))
    sums = {key: [sum(column) for column in zip(*rows)] for key, rows in groups.items()}
    return {key: (nats / tokens, tokens / steps) for key, (nats, tokens, steps) in sums.items()}


def fewest(data: dict) -> int:
    """Observations of a bin that is drawn: fewer say little."""
    return min(20, max(1, max(data["steps"]) // 10))


def draw_heads(axes, data: dict) -> None:
    """Accepted share of each head's drafts by entropy, with 95 % intervals."""
    centres = [0.005, *((low * high) ** 0.5 for low, high in itertools.pairwise(EDGES)), 5.0]
    for head, (color, mark) in enumerate(zip((BLUE, ORANGE, GREEN), "os^")):
        found = [
            (centre * 1.04 ** (head - 1), right / tried, *wilson(right, tried))
            for centre, tried, right in zip(centres, data["tried"][head], data["right"][head])
            if tried >= fewest(data)
        ]
        if not found:
            continue
        x, share, low, high = np.array(found).T
        axes.errorbar(
            x,
            100 * share,
            100 * np.clip([share - low, high - share], 0, None),
            fmt=f"{mark}-",
            color=color,
            elinewidth=0.9,
            label=f"head {head + 1}",
        )
    axes.set_xscale("log")
    axes.set_xticks([0.01, 0.1, 1], ["0.01", "0.1", "1"])
    axes.set_xlabel("entropy where the draft stands, nats")
    axes.set_ylabel("drafts accepted, % of those checked")
    axes.set_xlim(0.004, 7)
    axes.set_ylim(0, 103)
    axes.legend(loc="upper right", title="drafts of")
    below, above = first_head(data)
    axes.set_title(f"Head 1: {below} below {SURE:g} nats, {above} above {UNSURE:g}")


def first_head(data: dict) -> list[str]:
    """Accepted share of the first head's drafts where the model is sure and where it is not."""
    parts = slice(EDGES.index(SURE) + 1), slice(EDGES.index(UNSURE) + 1, None)
    counts = [(sum(data["right"][0][part]), sum(data["tried"][0][part])) for part in parts]
    return [f"{100 * right / tried:.0f} %" if tried else "none" for right, tried in counts]


def draw_lengths(axes, data: dict) -> None:
    """Tokens per step of texts by their mean entropy, and the published curve."""
    groups = pooled(data["texts"])
    widest = max(0.6, 1.1 * max(entropy for entropy, _ in groups.values()))
    # on this scale the fit is a straight line
    axes.set_xscale("function", functions=(lambda x: np.abs(x) ** POWER, lambda x: np.abs(x) ** (1 / POWER)))
    marks = [mark for mark in (0, 0.1, 0.3, 0.6, 1, 2, 3, 4, 6, 8) if mark <= widest]
    axes.set_xticks(marks, [f"{mark:g}" for mark in marks])
    x = np.linspace(0, widest**POWER, 400) ** (1 / POWER)
    curve = np.array([published(entropy) for entropy in x])
    inside = (curve >= REPORTED[0]) & (curve <= REPORTED[1])
    axes.plot(x, curve, "--", color=GREY, linewidth=1.2, label="published fit, MiMo-V2-Flash")
    axes.plot(x[inside], curve[inside], color="black", linewidth=2.4, label="  where its report gives lengths")
    bins = [
        row
        for row in zip(data["mean_entropy"], data["mean_length"], data["steps"])
        if row[2] >= fewest(data) and row[0] <= widest
    ]
    axes.plot(*np.array(bins).T[:2], "-", color=ORANGE, linewidth=1.2, label="MiMo-Micro, single steps")
    for kind, (mark, color) in MARKS.items():
        few = [point for point in data["texts"] if point[0] == kind]
        axes.plot([p[2] for p in few], [p[3] for p in few], mark, color=color, markersize=3, alpha=0.25)
        found = [point for (name, _), point in groups.items() if name == kind]
        axes.plot(
            *np.array(found).T,
            mark,
            color=color,
            mec="white",
            markersize=8,
            clip_on=False,
            zorder=3,
            label=f"MiMo-Micro, {kind}",
        )
    axes.set_xlim(0, widest)
    axes.set_ylim(0.9, 4.1)
    axes.set_xlabel(f"mean entropy per token, nats (scale: x^{POWER})")
    axes.set_ylabel("tokens per step, of 4")
    axes.legend(loc="upper right", fontsize=7.5)
    best = max((length, kind) for (kind, temperature), (_, length) in groups.items() if temperature == 0)
    axes.set_title(f"Up to {best[0]:.1f} tokens per greedy step ({best[1]})")


def draw_acceptance(data: dict):
    figure, ((left, right),) = panels(1, 2, 4.0)
    draw_heads(left, data)
    draw_lengths(right, data)
    return figure


def text_acceptance(data: dict) -> list[str]:
    groups = pooled(data["texts"])
    away = [length - published(entropy) for entropy, length in groups.values()]
    greedy = ", ".join(f"{kind} {groups[kind, 0.0][1]:.2f}" for kind in MARKS if (kind, 0.0) in groups)
    steps, (below, above) = sum(data["steps"]), first_head(data)
    return [
        f"{steps:,} steps of drafting with {len(data['tried'])} heads. Left: a first draft is accepted in {below} of "
        f"the steps where the model's own distribution has less than {SURE:g} nats of entropy, and in {above} of "
        f"those with more than {UNSURE:g}; bars are 95 % intervals, and a draft behind a refused one is not checked. "
        "Right: large marks are all texts of a kind at one temperature, small ones single texts; greedy tokens per "
        f"step: {greedy}. The line of single steps sorts them by the entropy where the first draft stands.",
        "The published fit is 4 (1 - 0.58 x^0.58) tokens per step at x of next-token cross entropy, with R² 0.995 "
        "over benchmarks of MiMo-V2-Flash ([report](https://arxiv.org/abs/2601.02780), section 5.1); x is taken for "
        f"nats. MiMo-Micro's kinds of text are {min(away):+.2f} to {max(away):+.2f} tokens from it. Texts are answers "
        "to questions of the test split (stories follow one pattern, facts are learned by heart) and what follows "
        "pieces of this documentation. Greedy text has the entropy at temperature 1; temperatures "
        f"{', '.join(f'{t:g}' for t in TEMPERATURES[1:])} spread the rest. float32, batch 1; the last step of a text, "
        "which its end cuts, is left out.",
    ]

"""Two plots of the gallery: which experts see which modality, and what share of attention goes to the sinks."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from gallery_models import MODALITIES, answered, load, places
from gallery_style import BLUE, GREEN, GREY, ORANGE, RED, SHADES, panels
from tqdm import tqdm

from modeling_mimo import modeling_mimo_v2_text as text_model
from modeling_mimo.modeling_mimo_v2_base import causal_mask, eager_attention_forward
from modeling_mimo.training.micro_tasks import TASKS


MARKS = {"text": ("o", BLUE), "image": ("s", RED), "video": ("^", ORANGE), "audio": ("D", GREEN)}


def run_through(options: argparse.Namespace, model, what: str) -> Iterator[tuple[dict, dict[str, torch.Tensor]]]:
    """Inputs of held-out examples of all tasks, and where each modality is in them."""
    count = 1 if options.quick else options.count // 4
    examples = answered(options.model, max(1, count))
    for inputs in tqdm(examples, what, len(TASKS) * max(1, count), unit="example", disable=None):
        yield inputs, places(model, inputs["input_ids"])


@torch.inference_mode()
def measure_experts(options: argparse.Namespace) -> dict:
    model, chosen = load(options.model), {}

    def keep(layer: int):
        def take(module, args, output) -> None:
            chosen[layer] = output[2]

        return take

    layers = [index for index, kind in enumerate(model.config.mlp_layer_types) if kind == "sparse"]
    for layer in layers:
        model.model.layers[layer].mlp.gate.register_forward_hook(keep(layer))
    experts = model.config.n_routed_experts
    counts = torch.zeros(len(layers), len(MODALITIES), experts, dtype=torch.long)
    tokens = dict.fromkeys(MODALITIES, 0)
    for inputs, found in run_through(options, model, "experts"):
        model(**inputs, use_cache=False)
        for row, kind in enumerate(MODALITIES):
            tokens[kind] += int(found[kind].sum())
            for place, layer in enumerate(layers):
                counts[place, row] += chosen[layer][found[kind]].flatten().bincount(minlength=experts)
    return {
        "layers": layers,
        "experts_per_token": model.config.num_experts_per_tok,
        "tokens": tokens,
        "modalities": list(MODALITIES),
        "counts": counts.tolist(),
    }


def shares(data: dict) -> np.ndarray:
    """[layers, modalities, experts], each row with the sum 1."""
    counts = np.array(data["counts"], float)
    return counts / counts.sum(-1, keepdims=True).clip(min=1)


def apart(data: dict) -> dict[str, float]:
    """Modality -> share of its expert choices that would have to change to be those of text, mean over layers."""
    share = shares(data)
    return {
        kind: float(np.abs(share[:, row] - share[:, 0]).sum(-1).mean() / 2)
        for row, kind in enumerate(data["modalities"])
        if row
    }


def draw_experts(data: dict):
    share, layers = shares(data), data["layers"]
    columns = min(3, len(layers))
    rows = -(-len(layers) // columns)
    figure, grid = panels(rows, columns, 0.9 + 1.75 * rows)
    experts, most = share.shape[-1], 100 * share.max()
    for place, axes in enumerate(axes for row in grid for axes in row):
        axes.grid(False)
        if place >= len(layers):
            axes.set_axis_off()
            continue
        image = axes.imshow(100 * share[place], cmap=SHADES, vmin=0, vmax=most, aspect="auto")
        axes.set_yticks(range(len(data["modalities"])), data["modalities"])
        axes.set_xticks(range(experts))
        for (row, column), value in np.ndenumerate(100 * share[place]):
            color = "white" if value > 0.6 * most else "#222222"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7.5, color=color)
        axes.set_title(f"layer {layers[place]}")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        if place >= len(layers) - columns:
            axes.set_xlabel("expert")
    figure.colorbar(image, ax=grid, label=f"% of choices; even: {100 / experts:.3g}", shrink=0.8)
    away = apart(data)
    far = max(away, key=away.get)
    figure.suptitle(
        f"{far.capitalize()} is farthest from text: {100 * away[far]:.0f} % of its choices of experts are others",
        x=0.01,
        ha="left",
        fontsize=10,
        fontweight="bold",
    )
    return figure


def text_experts(data: dict) -> list[str]:
    away, tokens = apart(data), data["tokens"]
    listed = ", ".join(f"{100 * value:.0f} % for {kind}" for kind, value in away.items())
    seen = ", ".join(f"{count:,} {kind}" for kind, count in tokens.items())
    share = shares(data)
    low, high = 100 * share.mean(1).min(), 100 * share.mean(1).max()
    return [
        f"Each of the {len(data['layers'])} MoE layers sends a token to {data['experts_per_token']} of "
        f"{share.shape[-1]} experts; a row says in percent where the choices of a modality go. The share that would "
        f"have to move to make a row that of text, mean over layers: {listed}.",
        f"Tokens of held-out examples of all tasks with their answers ({seen}). With each modality weighed alike, an "
        f"expert gets between {low:.1f} % and {high:.1f} % of a layer's choices, of which an even share is "
        f"{100 / share.shape[-1]:.3g} %. What so few experts of a small model are for says nothing of larger ones.",
    ]


class SinkMass:
    """Share of attention that goes to the sinks.

    `text`: [heads, queries] of each attention with sinks in order of calls, draft heads behind the trunk's layers.
    `vision`: of each block and medium [2, frames, heads], the share of the first key with its learned bias and
    without, mean over the queries that see it. `largest`: how far the shares of sink and keys, from two separate
    computations, are from a sum of 1 at worst.
    """

    def __init__(self):
        self.text: list[torch.Tensor] = []
        self.vision: dict[int, list[torch.Tensor]] = {}
        self.largest = 0.0

    def attend(self, module, query, key, value, attention_mask, scaling, **options):
        """The attention function of the text model, with a look at its sinks."""
        result = text_model.sdpa_attention_forward(module, query, key, value, attention_mask, scaling, **options)
        sinks = options["s_aux"]
        if sinks is not None:
            _, weights = eager_attention_forward(module, query, key, value, attention_mask, scaling, **options)
            keys = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
            visible = causal_mask(None, query.shape[2], key.shape[2], options["sliding_window"], query.device)
            scores = ((query @ keys.transpose(-1, -2)) * scaling).masked_fill(~visible, -torch.inf)
            mass = torch.sigmoid(sinks[:, None] - scores.logsumexp(-1))
            self.largest = max(self.largest, float((mass + weights.sum(-1) - 1).abs().max()))
            self.text.append(mass[0])
        return result

    def look(self, index: int, block) -> None:
        """Watches the attention of a vision block whose heads add a learned bias to the first key of a frame."""
        plain = block.attend

        def attend(query, key, value):
            keys = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
            # the queries that see the first key, and all keys that they see
            near = query[:, :, : block.window + 1] @ keys[:, :, : 2 * block.window + 1].transpose(-1, -2)
            row, column = torch.arange(near.shape[2])[:, None], torch.arange(near.shape[3])
            scores = (near * block.scaling).masked_fill(column > row + block.window, -torch.inf)
            rest = scores[..., 1:].logsumexp(-1)
            with_bias = torch.sigmoid(scores[..., 0] + block.sinks[:, None] - rest)
            without = torch.sigmoid(scores[..., 0] - rest)
            self.vision.setdefault(index, []).append(torch.stack((with_bias.mean(-1), without.mean(-1))))
            return plain(query, key, value)

        block.attend = attend


@contextmanager
def watched(model) -> Iterator[SinkMass]:
    """Forwards of `model` inside are looked at."""
    mass, functions = SinkMass(), text_model.ALL_ATTENTION_FUNCTIONS
    plain = functions["sdpa"]
    functions["sdpa"] = mass.attend
    blocks = [block.attn for block in model.visual.blocks]
    for index, block in enumerate(blocks):
        if block.sinks is not None and block.sink_type == "first_key":
            mass.look(index, block)
    try:
        yield mass
    finally:
        functions["sdpa"] = plain
        for block in blocks:
            block.__dict__.pop("attend", None)


@torch.inference_mode()
def measure_sinks(options: argparse.Namespace) -> dict:
    model = load(options.model, torch.float32, attn_implementation="sdpa")
    sliding = [index for index, kind in enumerate(model.config.layer_types) if kind == "sliding_attention"]
    names = [f"layer {index}" for index in sliding] + [f"draft {k + 1}" for k in range(len(model.model.mtp.layers))]
    heads = model.config.attention_geometry("sliding_attention").num_heads
    sums, tokens = torch.zeros(len(MODALITIES), len(names), heads), torch.zeros(len(MODALITIES))
    with watched(model) as mass:
        for inputs, found in run_through(options, model, "sinks"):
            mass.text = []
            # labels make the draft heads run
            model(**inputs, labels=inputs["input_ids"], mtp_loss_weight=1.0, use_cache=False)
            for row, kind in enumerate(MODALITIES):
                tokens[row] += found[kind].sum()
                for place, share in enumerate(mass.text):
                    sums[row, place] += share[:, found[kind]].sum(-1)
    vision = {index: torch.cat(parts, dim=1).mean(1) for index, parts in sorted(mass.vision.items())}
    return {
        "window": model.config.sliding_window,
        "largest_error": mass.largest,
        "names": names,
        "modalities": list(MODALITIES),
        "tokens": [int(count) for count in tokens],
        "text": (sums / tokens[:, None, None].clamp(min=1)).tolist(),
        "vision_blocks": list(vision),
        "vision_types": [model.visual.blocks[index].attn.block_type for index in vision],
        "vision_with_bias": [part[0].tolist() for part in vision.values()],
        "vision_without": [part[1].tolist() for part in vision.values()],
    }


def draw_sinks(data: dict):
    figure, ((left, right),) = panels(1, 2, 4.3, width_ratios=(1.7, 1))
    text = 100 * np.array(data["text"])
    names, kinds = data["names"], data["modalities"]
    trunk = text[filled(data)][:, [name.startswith("layer") for name in names]]
    for row, kind in enumerate(kinds):
        if not data["tokens"][row]:
            continue
        height = np.arange(len(names)) + 0.19 * (row - 1.5)
        mark, color = MARKS[kind]
        for place, y in enumerate(height):
            left.plot(text[row, place], [y] * text.shape[-1], mark, color=color, markersize=3.2, alpha=0.5)
        left.plot(text[row].mean(-1), height, "|", color=color, markersize=7, mew=2.4)
        left.plot([], [], mark, color=color, label=kind)
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.axvline(100 / (data["window"] + 1), color=GREY, linestyle=":", label="(even share)")
    left.set_xlim(0, 1.06 * text.max())
    left.set_xlabel("attention that goes to the sink, % (marks: heads, bars: their means)")
    left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=len(kinds) + 1, title="tokens of")
    left.set_title(f"Language model: sinks take {trunk.mean():.1f} % in sliding layers")
    for part, color, mark, label in (
        ("vision_without", GREY, "x", "without its bias"),
        ("vision_with_bias", RED, "o", "with its bias"),
    ):
        for place in range(len(data["vision_blocks"])):
            values = 100 * np.array(data[part][place])
            y = np.full(len(values), place) + (0.12 if part == "vision_without" else -0.12)
            right.plot(values, y, mark, color=color, markersize=4, alpha=0.8, label=label if place == 0 else None)
    blocks = zip(data["vision_blocks"], data["vision_types"])
    right.set_yticks(range(len(data["vision_blocks"])), [f"block {index}, {kind}" for index, kind in blocks])
    right.invert_yaxis()
    right.set_ylim(len(data["vision_blocks"]) - 0.5, -0.5)
    vision = data["vision_with_bias"] + data["vision_without"]
    right.set_xlim(0, 106 * np.max(vision) if vision else 1)
    right.set_xlabel("attention that goes to the first patch, %")
    right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)
    right.set_title("Vision: a frame's first patch")
    return figure


def filled(data: dict) -> np.ndarray:
    """Which modalities have tokens."""
    return np.array(data["tokens"]) > 0


def text_sinks(data: dict) -> list[str]:
    text = 100 * np.array(data["text"])[filled(data)]
    layers = [name.startswith("layer") for name in data["names"]]
    by_layer = text.mean((0, 2))
    listed = ", ".join(f"{name} {value:.1f} %" for name, value in zip(data["names"], by_layer))
    least, most = text[:, layers].min(), text[:, layers].max()
    paragraphs = [
        "A sink is a learned logit per head of the sliding layers (and of the draft heads) that takes part in the "
        f"softmax and has no value; beside a full window of {data['window']} keys an even share would be "
        f"{100 / (data['window'] + 1):.1f} %. Marks are heads, bars their means; mean over heads and modalities: "
        f"{listed}. Single heads of the trunk give it between {least:.1f} % and {most:.1f} %. Global layers have no "
        "sinks.",
        "Both shares are computed apart, the sink's from queries and keys, the keys' by the written-out attention, "
        f"and add up to 1 within {data['largest_error']:.0e}. Held-out examples of all tasks with their answers, "
        "float32.",
    ]
    if data["vision_blocks"]:
        with_bias, without = (100 * np.mean(data[part]) for part in ("vision_with_bias", "vision_without"))
        paragraphs.append(
            "The vision tower has another kind: windowed blocks add a learned bias to the logit of a frame's first "
            f"patch. Over the queries whose window reaches it, that patch gets {with_bias:.1f} % of the attention, "
            f"{without:.1f} % if the bias is left out of the same scores."
        )
    return paragraphs

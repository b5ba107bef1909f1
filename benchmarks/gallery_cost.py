"""Two plots of the gallery: bytes of the KV cache, and seconds of prefill and decoding, by context."""

import argparse
import tempfile

import torch
from common import interleaved
from gallery_models import load, page_ids
from gallery_style import BLUE, GREY, RED, byte_axis, bytes_label, number_axis, panels, token_axis, tokens_label
from kv_cache import KINDS, fill_layer
from prefill import SHARED_FIELDS, split_weights
from prefill import load as load_side
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, DynamicCache
from transformers.models.mimo_v2_flash import MiMoV2FlashConfig, MiMoV2FlashForCausalLM

from modeling_mimo import HybridCache
from modeling_mimo.cache_names_mimo_v2 import CACHE_NAME
from modeling_mimo.cli.plan import plan_kv
from modeling_mimo.cli.releases import shipped_config


RELEASE = "MiMo-V2.5"
# bytes of bf16
ELEMENT = 2
# a configuration's longest context bounds what it is trained for, and not what it can compute
LONG = {"max_position_embeddings": 65536}
# tokens whose logits both sides must agree on, the last of them decoded, and by how much, in float32
COMPARED, COMPARED_DECODED, AGREEMENT = 512, 16, 1e-4


def powers(low: int, high: int) -> list[int]:
    """`low`, twice as much and so on, up to `high`."""
    return [low << step for step in range((high // low).bit_length())]


def planned(config, contexts: list[int]) -> dict:
    """Bytes that `mimo plan` tells, and the layers that they are of."""
    plans = [plan_kv(config, context, 1, ELEMENT) for context in contexts]
    return {
        "layers": len(config.layer_types),
        "sliding": config.layer_types.count("sliding_attention"),
        "window": config.sliding_window,
        "windows": plans[0]["sliding_attention"],
        "contexts": contexts,
        "hybrid": [plan["total"] for plan in plans],
        "all_global": [plan["all_full"] for plan in plans],
    }


def filled_release(config, contexts: list[int]) -> list[int]:
    """Bytes allocated by caches that were really written: one layer of each type, times the number of such layers."""
    totals = []
    for context in tqdm(contexts, desc=RELEASE, unit="context", disable=None):
        layers = {kind: fill_layer(config, kind, context, max(1024, context // 4)) for kind in KINDS}
        totals.append(sum(config.layer_types.count(kind) * layers[kind]["allocated"] for kind in KINDS))
    return totals


@torch.inference_mode()
def filled_by(model, ids: torch.Tensor, contexts: list[int]) -> list[int]:
    """Bytes allocated behind prefills of the model itself."""
    totals = []
    for context in tqdm(contexts, desc="MiMo-Micro", unit="context", disable=None):
        cache = HybridCache(model.config)
        model(ids[:, :context], cache=cache, logits_to_keep=1)
        totals.append(cache.nbytes()["total"])
    return totals


def measure_kv_bytes(options: argparse.Namespace) -> dict:
    release, model = shipped_config(RELEASE), load(options.model, load_mtp=False, **LONG)
    long, short = powers(1024, release.max_position_embeddings), powers(256, options.longest)
    filled = [context for context in long[::2] if context <= (16384 if options.quick else 262144)]
    ids = page_ids(AutoTokenizer.from_pretrained(options.model), short[-1])
    return {
        RELEASE: planned(release, long) | {"filled": filled, "measured": filled_release(release, filled)},
        "MiMo-Micro": planned(model.config, short)
        | {"filled": short, "measured": filled_by(model, ids, short), "allowed": allowed(options.model)},
    }


def allowed(path: str) -> int:
    """The longest context of a checkpoint's own configuration."""
    return AutoConfig.from_pretrained(path).max_position_embeddings


def overridden(most: int, contexts: list[int]) -> str:
    """What the page says of contexts beyond `most`; nothing if there are none."""
    if contexts[-1] <= most:
        return ""
    return (
        f" MiMo-Micro's `max_position_embeddings` of {most} is overridden for longer contexts, which it was not "
        "trained for: there the plot shows what the code costs, not what the model can use."
    )


def draw_kv_bytes(data: dict):
    figure, ((*row,),) = panels(1, 2, 3.7)
    for axes, (name, part) in zip(row, data.items()):
        contexts, hybrid, full = part["contexts"], part["hybrid"], part["all_global"]
        axes.plot(contexts, full, "--", color=RED, label="all layers global, planned")
        axes.plot(contexts, hybrid, color=BLUE, label="hybrid, planned")
        axes.plot(part["filled"], part["measured"], "o", color=BLUE, mfc="white", label="hybrid, allocated")
        token_axis(axes, contexts)
        byte_axis(axes)
        axes.set_ylabel("bytes of keys and values (bf16, batch 1)")
        for size, color in ((full[-1], RED), (hybrid[-1], BLUE)):
            axes.annotate(
                bytes_label(size),
                (contexts[-1], size),
                (-5, 7),
                textcoords="offset points",
                ha="right",
                va="bottom",
                color=color,
            )
        axes.set_title(f"{name} at {tokens_label(contexts[-1])}: {full[-1] / hybrid[-1]:.1f} times less")
        axes.margins(y=0.08)
    row[0].legend(loc="upper left")
    return figure


def text_kv_bytes(data: dict) -> list[str]:
    release, micro = data[RELEASE], data["MiMo-Micro"]
    over = [got / plan for part in (release, micro) for got, plan in zip(part["measured"], matching(part))]
    short, long = (100 * release["windows"] / release["hybrid"][place] for place in (0, -1))
    return [
        f"At {tokens_label(release['contexts'][-1])} tokens {RELEASE}'s cache takes "
        f"{bytes_label(release['hybrid'][-1])} instead of {bytes_label(release['all_global'][-1])}: "
        f"{release['sliding']} of its {release['layers']} layers keep a window of {release['window']} tokens, which "
        f"is {short:.0f} % of the hybrid cache at {tokens_label(release['contexts'][0])} tokens and {long:.1g} % at "
        f"{tokens_label(release['contexts'][-1])}. Lines are what `mimo plan` computes; circles are caches that were "
        f"really filled ({RELEASE}: one layer of each type in its real geometry, times the number of such layers; "
        "MiMo-Micro: the whole model without draft heads).",
        f"What is allocated is {min(over):.2f} to {max(over):.2f} times what is planned: `HybridCache` keeps rows in "
        "reserve, so that appending does not copy (256, or up to an eighth)."
        + overridden(micro["allowed"], micro["contexts"]),
    ]


def matching(part: dict) -> list[int]:
    """Planned bytes of the contexts that were filled."""
    by_context = dict(zip(part["contexts"], part["hybrid"]))
    return [by_context[context] for context in part["filled"]]


def write_twin(model, folder: str) -> None:
    """Transformers' V2-Flash checkpoint with the weights of the text model of `model`, where `load_side` reads it."""
    twin = MiMoV2FlashForCausalLM(MiMoV2FlashConfig(**{name: getattr(model.config, name) for name in SHARED_FIELDS}))
    # towers have no place in it
    weights = split_weights(model)
    twin.load_state_dict({name: weights[name] for name in twin.state_dict()})
    twin.save_pretrained(f"{folder}/transformers")


def new_cache(name: str, config):
    return HybridCache(config) if name == "ours" else DynamicCache(config=config)


@torch.inference_mode()
def difference(sides: dict, ids: torch.Tensor) -> float:
    """Largest difference of the logits of a prefill and of tokens decoded behind it.

    ValueError: more than rounding in float32, the sides are not the same model.
    """
    logits = {}
    prompt, *single = ids.split([ids.shape[1] - COMPARED_DECODED, *[1] * COMPARED_DECODED], dim=1)
    for name, model in sides.items():
        cache = new_cache(name, model.config)
        parts = [model(part, **{CACHE_NAME: cache}, use_cache=True).logits for part in (prompt, *single)]
        logits[name] = torch.cat(parts, dim=1)
    largest = (logits["ours"] - logits["transformers"]).abs().max().item()
    # NaN is no agreement
    if not largest <= AGREEMENT:
        raise ValueError(f"logits: expected a difference of at most {AGREEMENT} in float32, got {largest:.3g}.")
    return largest


@torch.inference_mode()
def seconds_at(sides: dict, ids: torch.Tensor, context: int, tokens: int, repeats: int) -> dict:
    """Median seconds of a prefill and per decoded token of each side, in turn; both get the same tokens."""
    caches = {}

    def fill(name: str) -> None:
        caches[name] = new_cache(name, sides[name].config)
        sides[name](ids[:, :context], **{CACHE_NAME: caches[name]}, use_cache=True, logits_to_keep=1)

    def decode(name: str) -> None:
        for place in range(tokens):
            sides[name](ids[:, place : place + 1], **{CACHE_NAME: caches[name]}, use_cache=True)

    prefill = interleaved({name: lambda name=name: fill(name) for name in sides}, repeats)
    decoding = interleaved({name: lambda name=name: decode(name) for name in sides}, repeats)
    return {"prefill": prefill, "decode": {name: took / tokens for name, took in decoding.items()}}


def measure_time(options: argparse.Namespace) -> dict:
    contexts, tokens = powers(256, options.longest), 4 if options.quick else 16
    ids = page_ids(AutoTokenizer.from_pretrained(options.model), contexts[-1])
    with tempfile.TemporaryDirectory() as folder:
        exact = load(options.model, torch.float32, load_mtp=False, **LONG)
        write_twin(exact, folder)
        twin = load_side("transformers", folder, torch.float32)
        largest = difference({"ours": exact, "transformers": twin}, ids[:, :COMPARED])
        sides = {
            "ours": load(options.model, load_mtp=False, **LONG),
            "transformers": load_side("transformers", folder),
        }
    bar = tqdm(contexts, desc="time", unit="context", disable=None)
    results = [seconds_at(sides, ids, context, tokens, options.repeats) for context in bar]
    return {
        "contexts": contexts,
        "allowed": allowed(options.model),
        "compared": [min(COMPARED, ids.shape[1]), COMPARED_DECODED],
        "fp32_difference": largest,
        "repeats": options.repeats,
        "decoded": tokens,
        "sides": {
            name: {
                "attention": model.config._attn_implementation,
                "experts": model.config._experts_implementation,
                "cache": type(new_cache(name, model.config)).__name__,
            }
            for name, model in sides.items()
        },
        **{part: {name: [result[part][name] for result in results] for name in sides} for part in results[0]},
    }


def ratios(data: dict, part: str) -> list[float]:
    """How many times as long Transformers' class takes."""
    return [other / ours for ours, other in zip(data[part]["ours"], data[part]["transformers"])]


def draw_time(data: dict):
    figure, ((*row,),) = panels(1, 3, 3.4)
    contexts = data["contexts"]
    heads = {
        "prefill": ("Prefill", "seconds", 1),
        "decode": ("One decoded token", "milliseconds", 1000),
    }
    for axes, (part, (title, unit, factor)) in zip(row, heads.items()):
        for name, style, color, label in (
            ("transformers", "s--", RED, "Transformers' mimo_v2_flash"),
            ("ours", "o-", BLUE, "modeling_mimo"),
        ):
            axes.plot(contexts, [factor * took for took in data[part][name]], style, color=color, label=label)
        axes.set_ylabel(unit)
        axes.set_title(title)
    row[0].set_yscale("log")
    number_axis(row[0].yaxis)
    row[1].set_ylim(0, 1.25 * row[1].get_ylim()[1])
    row[1].legend(loc="upper left")
    for part, style, label in (("prefill", "o-", "prefill"), ("decode", "D:", "one token")):
        row[2].plot(contexts, ratios(data, part), style, color=BLUE, label=label)
        row[2].annotate(
            f"{ratios(data, part)[-1]:.1f}",
            (contexts[-1], ratios(data, part)[-1]),
            (0, 6),
            textcoords="offset points",
            ha="center",
        )
    row[2].axhline(1, color=GREY, linewidth=1)
    row[2].set_ylabel("Transformers' time / ours")
    fast = ratios(data, "prefill")[-1]
    row[2].set_title(f"Prefill of {tokens_label(contexts[-1])}: {fast:.1f} times as fast")
    row[2].set_ylim(0, 1.2 * row[2].get_ylim()[1])
    row[2].legend(loc="upper left")
    for axes in row:
        token_axis(axes, contexts)
    return figure


def text_time(data: dict) -> list[str]:
    contexts, prefill, decode = data["contexts"], ratios(data, "prefill"), ratios(data, "decode")
    seconds = {name: f"{data['prefill'][name][-1]:.2f} s" for name in data["prefill"]}
    token = {name: f"{1000 * data['decode'][name][-1]:.1f} ms" for name in data["decode"]}
    length, decoded = data["compared"]
    forms = "; ".join(
        f"{'modeling_mimo' if name == 'ours' else 'Transformers'}: attention `{form['attention']}`, experts "
        f"`{form['experts']}`, {form['cache']}"
        for name, form in data["sides"].items()
    )
    return [
        "The text model of MiMo-Micro against Transformers' own class for this decoder, the same weights and tokens, "
        f"batch 1, bf16 (ours keeps routers in float32). In float32 the logits of {length} tokens, of which {decoded} "
        f"are decoded, differ by at most {data['fp32_difference']:.1e}. A prefill of {tokens_label(contexts[-1])} "
        f"tokens takes {seconds['ours']} instead of {seconds['transformers']}, a token behind it {token['ours']} "
        f"instead of {token['transformers']}. At {contexts[0]} tokens Transformers takes {prefill[0]:.2f} and "
        f"{decode[0]:.2f} times as long.",
        f"Both sides in turn in one process, a turn that does not count and then medians of {data['repeats']}; "
        f"decoding is forwards over {data['decoded']} given tokens, one by one. Each class as it is by default "
        f"({forms}); the other one's only attention holds heads x tokens x tokens scores."
        f"{overridden(data['allowed'], contexts)} Larger models and longer contexts: [benchmarks.md](benchmarks.md).",
    ]

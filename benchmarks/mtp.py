"""Drafting with MTP heads that were trained on real text: accepted length, speed-up, cost of the loop.

    python benchmarks/mtp.py --steps 900

A small model in the released format learns the source text of Python's standard library, by the released recipe: the
trunk with one head, then three copies of that head on the frozen trunk. Prompts are files it has not seen. The
published curve, 4 (1 - 0.58 x ** 0.58) tokens per step at x nats of entropy per token, is MiMo-V2-Flash's.
"""

import statistics
import sys
import sysconfig
from pathlib import Path

import torch
from common import Bar, finish, parse, parser, progress, seconds
from transformers.utils import logging

from modeling_mimo import HybridCache, MiMoV2Config, MiMoV2ForCausalLM
from modeling_mimo.conversion.random_checkpoint import released_config
from modeling_mimo.conversion.small_tokenizer import build_small_tokenizer


# two periods of five sliding layers and a global one
PATTERN = [0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 0]
SHAPE = {
    "hidden_size": 192,
    "intermediate_size": 384,
    "moe_intermediate_size": 96,
    "sliding_window": 32,
    "sliding_window_size": 32,
    "num_nextn_predict_layers": 1,
}
BATCH, LENGTH = 8, 128
# of the steps
TRUNK_SHARE = 0.65
STEPS, QUICK_STEPS = 900, 6
PROMPT = 96
# a row of the vocabulary without a token
NEVER = 2175
TEMPERATURES = (0.0, 0.4, 0.6, 0.8, 1.0)


def published(entropy: float) -> float:
    """Tokens per step of MiMo-V2-Flash at this entropy, in nats per token."""
    return max(1.0, 4 * (1 - 0.58 * entropy**0.58))


def add_steps(options) -> None:
    """`--steps` of the training; the same weights on every machine, whatever its speed."""
    options.add_argument("--steps", type=int, help=f"of training (default: {STEPS}, quick: {QUICK_STEPS})")


def steps_of(options) -> int:
    return options.steps or (QUICK_STEPS if options.quick else STEPS)


def library_text(tokenizer, quick: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of modules of the standard library to learn from, and of others to be asked about."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in files]
    known = "\n".join(text for index, text in enumerate(texts) if index % 10)
    unknown = "\n".join(texts[::10])
    limit = 2**17 if quick else 2**22
    return tuple(torch.tensor(tokenizer(text[:limit]).input_ids) for text in (known, unknown))


def train(model, ids: torch.Tensor, steps: int, rate: float, weight: float, what: str) -> None:
    """AdamW on random pieces of `ids`."""
    parameters = [part for part in model.parameters() if part.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 20) * (1 - 0.9 * step / steps)
        places = torch.randint(0, len(ids) - LENGTH, (BATCH,), generator=generator).tolist()
        batch = torch.stack([ids[place : place + LENGTH] for place in places])
        output = model(batch, labels=batch, mtp_loss_weight=weight, use_cache=False)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses = " ".join(f"{loss.item():.2f}" for loss in output.mtp_losses)
        progress(f"{what}: step {step + 1} of {steps}, heads {losses}")
    progress("")
    model.eval()


def trained_model(ids: torch.Tensor, steps: int, quick: bool) -> MiMoV2ForCausalLM:
    """A float32 model with three trained heads; quick: half its layers."""
    pattern = PATTERN[:6] if quick else PATTERN
    shape = SHAPE | {"hybrid_layer_pattern": pattern, "num_hidden_layers": len(pattern)}
    shape["moe_layer_freq"] = [0] + [1] * (len(pattern) - 1)
    torch.manual_seed(0)
    model = MiMoV2ForCausalLM(MiMoV2Config.from_dict(released_config("tiny", "bf16", overrides=shape))).float()
    of_trunk = round(steps * TRUNK_SHARE)
    train(model, ids, of_trunk, 2e-3, 0.3, "trunk with one head")
    model.replicate_mtp_head()
    model.requires_grad_(False)
    model.model.mtp.requires_grad_(True)
    train(model, ids, steps - of_trunk, 1e-3, 1.0, "three heads")
    return model.requires_grad_(False)


def prompts_of(ids: torch.Tensor, count: int) -> torch.Tensor:
    """[count, PROMPT] from places all over the text."""
    starts = [index * (len(ids) - PROMPT) // count for index in range(count)]
    return torch.stack([ids[start : start + PROMPT] for start in starts])


def generate(model, prompts: torch.Tensor, tokens: int, depth=None, temperature: float = 0.0):
    options = {"do_sample": False}
    if temperature > 0:
        options = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    if depth is not None:
        options |= {"use_mtp": True, "mtp_depth": depth}
    torch.manual_seed(0)
    return model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=tokens,
        eos_token_id=NEVER,
        return_dict_in_generate=True,
        pad_token_id=0,
        **options,
    )


def entropy_rows(model, prompts: torch.Tensor, tokens: int) -> list[list]:
    """Per temperature: entropy of the distributions that tokens are drawn from, and the accepted length."""
    rows = []
    for temperature in TEMPERATURES:
        sums, counts, accepted, forwards = 0.0, 0, 0, 0
        for prompt in prompts:
            progress(f"entropy at temperature {temperature}")
            output = generate(model, prompt[None], tokens, 3, temperature)
            with torch.inference_mode():
                logits = model(output.sequences).logits[:, PROMPT - 1 : -1].float()
            # greedy generation has no distribution; what it leaves out is that of the model
            chances = (logits / (temperature or 1.0)).softmax(-1)
            sums += float(torch.special.entr(chances).sum())
            counts += tokens
            accepted += sum(output.mtp_stats.accepted)
            forwards += output.mtp_stats.forwards - 1
        entropy = sums / counts
        name = f"temperature {temperature}" if temperature else "greedy, temperature 1 entropy"
        rows.append([name, entropy, 1 + accepted / forwards, published(entropy)])
    progress("")
    return rows


class Experts:
    """Counts distinct experts per MoE layer in forwards of the trunk."""

    def __init__(self, model):
        self.counts = []
        routers = [layer.mlp.gate for layer in model.model.layers[1:]]
        self.handles = [router.register_forward_hook(self.take) for router in routers]

    def take(self, module, args, output):
        indices = next(part for part in output if not part.is_floating_point())
        self.counts.append(indices.unique().numel())

    def mean(self) -> float:
        for handle in self.handles:
            handle.remove()
        return statistics.mean(self.counts)


def distinct_experts(model, prompts: torch.Tensor, tokens: int, depth) -> float:
    """Per layer and forward, the prefill left out."""
    prefill = len(model.model.layers) - 1
    counter = Experts(model)
    generate(model, prompts, tokens, depth)
    counter.counts = counter.counts[prefill:]
    return counter.mean()


def forward_times(model, prompts: torch.Tensor, repeats: int) -> dict[int, float]:
    """Median seconds of a forward over n = 1 ... 4 tokens of each row behind the prompts."""
    cache = HybridCache(model.config)
    with torch.inference_mode():
        model(prompts, cache=cache, use_cache=True, logits_to_keep=1)
        times = {count: [] for count in range(1, 5)}
        for repeat in range(10 * repeats + 3):
            for count, values in times.items():
                took = seconds(lambda n=count: model(prompts[:, :n], cache=cache, use_cache=True))
                cache.crop(-count)
                values += [took] if repeat >= 3 else []
    return {count: statistics.median(values) for count, values in times.items()}


def speeds(model, prompts: torch.Tensor, tokens: int, repeats: int, depths) -> dict:
    """Per depth (None is plain): median seconds of generation, the last statistics, and the tokens."""
    times, outputs = {depth: [] for depth in depths}, {}
    for repeat in range(repeats + 1):
        for depth in depths:
            progress(f"{repeat}/{repeats} batch {len(prompts)}, drafts {depth}")
            took = seconds(lambda d=depth: outputs.update({d: generate(model, prompts, tokens, d)}))
            times[depth] += [took] if repeat else []
    progress("")
    return {depth: (statistics.median(times[depth]), outputs[depth]) for depth in depths}


def speed_rows(
    model, ids: torch.Tensor, batch: int, tokens: int, repeats: int, count: int
) -> tuple[list[list], list[Bar]]:
    """The rows of one batch size, `count` prompts of batch 1: medians over prompts are sums of their medians."""
    depths = (None, 1, 2, 3, "auto")
    prompts = prompts_of(ids, 8)
    groups = prompts.split(batch) if batch > 1 else prompts[:count].split(1)
    parts = [speeds(model, group, tokens, repeats, depths) for group in groups]
    forwards = forward_times(model, groups[0], repeats)
    prefill = statistics.median(seconds(lambda: generate(model, groups[0], 1)) for _ in range(repeats)) * len(groups)
    totals = {depth: sum(part[depth][0] for part in parts) for depth in depths}
    rows, bars = [], []
    for depth in depths:
        outputs = [part[depth][1] for part in parts]
        same = all(torch.equal(output.sequences, part[None][1].sequences) for output, part in zip(outputs, parts))
        row = [f"batch {batch}", "none" if depth is None else depth, totals[None] / totals[depth]]
        if depth is None:
            rows.append([*row, 1.0, None, None, distinct_experts(model, groups[0], tokens // 2, None), "yes"])
            continue
        stats = [output.mtp_stats for output in outputs]
        steps = sum(sum(part.steps) for part in stats)
        taken = sum(part.tokens for part in stats) / batch - len(groups)
        # all rows of a batch go on together: tokens of a row per step, not per forward that verified it
        length, drafting = taken / steps, sum(part.seconds["draft"] for part in stats) / steps
        possible = ratio = None
        if depth != "auto":
            possible = length * forwards[1] / (forwards[1 + depth] + drafting)
            decoding = (totals[None] - prefill) / (totals[depth] - prefill)
            ratio = decoding / possible
            if batch == 1:
                bars.append(Bar(f"speed-up with {depth} drafts over what the forwards allow", ratio, 0.9))
        experts = distinct_experts(model, groups[0], tokens // 2, depth)
        rows.append([*row, length, possible, ratio, experts, "yes" if same else "no"])
    if batch == 1:
        bars.append(Bar("speed-up of the best depth at batch 1", max(row[2] for row in rows), 1.5))
    return rows, bars


def auto_bar(model, ids: torch.Tensor, tokens: int, repeats: int, what: str) -> tuple[list, Bar]:
    """Plain and `auto` generation in turn."""
    prompt = prompts_of(ids, 3)[1:2]
    measured = speeds(model, prompt, tokens, repeats, (None, "auto"))
    stats, ratio = measured["auto"][1].mtp_stats, measured["auto"][0] / measured[None][0]
    row = [f"auto, {what}", "auto", 1 / ratio, tokens / sum(stats.steps), None, None, None, None]
    return row, Bar(f"time with auto over plain, {what}", ratio, 1.03, at_least=False)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    options = parser("Accepted length and speed-up of trained MTP heads.", "mtp.py --steps 900")
    add_steps(options)
    options = parse(options, arguments, repeats=3)
    logging.set_verbosity_error()
    tokens, prompts = (8, 1) if options.quick else (192, 4)
    known, unknown = library_text(build_small_tokenizer(2048), options.quick)
    steps = steps_of(options)
    model = trained_model(known, steps, options.quick)
    entropies = entropy_rows(model, prompts_of(unknown, 1 if options.quick else 6), tokens)
    rows, bars = speed_rows(model, unknown, 1, tokens, options.repeats, prompts)
    more, _ = speed_rows(model, unknown, 8, tokens, options.repeats, prompts)
    rows += more
    bars.append(Bar("the same tokens at every depth", float(all(row[-1] == "yes" for row in rows)), 1))
    row, bar = auto_bar(model, unknown, 2 * tokens, 2 * options.repeats, "trained heads")
    rows, bars = [*rows, row], [*bars, bar]
    for layer in model.model.mtp.layers:
        torch.nn.init.normal_(layer.eh_proj.weight, std=0.5)
    row, bar = auto_bar(model, unknown, 2 * tokens, 2 * options.repeats, "useless heads")
    rows, bars = [*rows, row], [*bars, bar]
    if options.quick:
        bars = [bar if "same tokens" in bar.name else Bar(bar.name, None, bar.limit, bar.at_least) for bar in bars]
    setting = (
        f"{model.num_parameters() / 1e6:.1f}M parameters, {model.config.num_hidden_layers} layers, 2 of 8 experts, "
        f"window 32, float32; trained for {steps} steps of {BATCH} x {LENGTH} tokens on the standard library of "
        f"Python. {tokens} greedy tokens behind {PROMPT} of unseen modules; prompts: {prompts} at batch 1, 8 at batch "
        f"8; medians of {options.repeats}. `possible` is tokens per step x t(1) / (t(1 + drafts) "
        "+ drafting), with t(n) a forward over n tokens; `of it` is the measured speed-up behind the prefill over it."
    )
    headings = [
        "run",
        "drafts",
        "speed-up",
        "tokens per step",
        "possible",
        "of it",
        "experts per layer",
        "same tokens",
    ]
    notes = [
        f"{name}: {entropy:.2f} nats per token, accepted length {length:.2f}, published curve {curve:.2f}"
        for name, entropy, length, curve in entropies
    ]
    return finish(options.json, setting, headings, rows, bars, notes)


if __name__ == "__main__":
    sys.exit(main())

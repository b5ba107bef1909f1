"""A plot of the gallery: accuracy and loss of MiMo-Micro in bf16, as stored FP8 and in nf4."""

import argparse

import numpy as np
from gallery_models import load
from gallery_style import BLUE, GREY, ORANGE, RED, panels
from transformers import AutoProcessor

from modeling_mimo.cli.bench_micro import evaluate, pooled, score_row
from modeling_mimo.training.micro_tasks import TASKS


BATCH = 16
# relative distance of weights that FP8 leaves at most
ROUNDED = 0.05
# one task of each kind
QUICK = ("shape", "motion", "match", "tone", "tool")
FORMS = {"bf16": (None, "o", BLUE), "FP8": ("FP8", "s", ORANGE), "nf4": ("nf4", "^", RED)}


def check_original(original: str, quantized: str) -> None:
    """ValueError: `quantized` is not what rounding the weights of `original` to FP8 gives."""
    wanted, got = (load(path).state_dict() for path in (original, quantized))
    for name, weight in wanted.items():
        away = float((got[name].float() - weight.float()).norm() / weight.float().norm().clamp(min=1e-30))
        if not away <= ROUNDED:
            raise ValueError(f"--original: expected the weights before FP8, got {name} {away:.0%} away from them.")


def measure_quality(options: argparse.Namespace) -> dict:
    processor, scores = AutoProcessor.from_pretrained(options.model), {}
    count = 1 if options.quick else options.count
    tasks = QUICK if options.quick else tuple(TASKS)
    limit = {"max_new_tokens": 16} if options.quick else {}
    if options.original:
        check_original(options.original, options.model)
    for name, (form, _, _) in FORMS.items():
        path = options.original if name == "bf16" and options.original else options.model
        model = load(path, form=form)
        found = evaluate(model, processor, tasks, count, BATCH, with_loss=True, **limit)
        scores[name] = {
            "all": score_row(pooled(found.values())),
            **{task: score_row(part) for task, part in found.items()},
        }
    return {
        "bf16_is": "trained" if options.original else "dequantized",
        "tasks": {
            name: {"bar": TASKS[name].bar, "chance": TASKS[name].chance, "kind": TASKS[name].kind} for name in tasks
        },
        "scores": scores,
    }


def draw_quality(data: dict):
    figure, ((left, right),) = panels(1, 2, 1.7 + 0.19 * (1 + len(data["tasks"])), sharey=True, width_ratios=(1.5, 1))
    names = ["all", *data["tasks"]]
    rows = np.arange(len(names))
    for place, (form, (_, mark, color)) in enumerate(FORMS.items()):
        scores = [data["scores"][form][name] for name in names]
        y = rows + 0.23 * (place - 1)
        middle, low, high = (100 * np.array([part[key] for part in scores]) for key in ("accuracy", "low", "high"))
        error = np.clip([middle - low, high - middle], 0, None)
        left.errorbar(middle, y, xerr=error, fmt=mark, color=color, elinewidth=1, markersize=4.5, label=form)
        more = [part["loss"] - data["scores"]["bf16"][name]["loss"] for name, part in zip(names, scores)]
        if form != "bf16":
            right.plot(more, y, mark, color=color, markersize=4.5, label=form)
    for place, task in enumerate(data["tasks"].values(), start=1):
        for value, style in ((task["chance"], ":"), (task["bar"], "-")):
            if value is not None:
                left.plot([100 * value] * 2, [place - 0.42, place + 0.42], style, color=GREY, linewidth=1.4)
    left.set_yticks(rows, [f"{name}  {data['scores']['bf16'][name]['loss']:.3f}" for name in names])
    left.set_ylim(len(names) - 0.4, -0.6)
    left.set_xlim(-2, 102)
    left.set_xlabel("held-out accuracy, % (dotted: chance, solid: required)")
    left.set_title(f"All tasks: {', '.join(f'{form} {100 * total(data, form):.1f} %' for form in FORMS)}")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    right.axvline(0, color=BLUE, linewidth=1.2)
    right.set_xlabel("loss above bf16, nats per token of the answers")
    right.locator_params(axis="x", nbins=4)
    right.set_title("Loss (of bf16: beside the names)")
    return figure


def total(data: dict, form: str) -> float:
    return data["scores"][form]["all"]["accuracy"]


def text_quality(data: dict) -> list[str]:
    everything = {form: data["scores"][form]["all"] for form in FORMS}
    accuracy = ", ".join(
        f"{form} {100 * part['accuracy']:.1f} % ({100 * part['low']:.1f} to {100 * part['high']:.1f})"
        for form, part in everything.items()
    )
    losses = ", ".join(f"{form} {part['loss']:.4f}" for form, part in everything.items())
    below = {
        name: [form for form in FORMS if data["scores"][form][name]["accuracy"] < (task["bar"] or 0)]
        for name, task in data["tasks"].items()
    }
    missed = [f"{name} ({', '.join(forms)})" for name, forms in below.items() if forms]
    count = data["scores"]["bf16"]["all"]["count"] // len(data["tasks"])
    bf16 = {
        "trained": "bf16 is the trained checkpoint before it was quantized",
        "dequantized": "bf16 is the shipped FP8 checkpoint dequantized while loading, the same weights",
    }
    return [
        f"All tasks together, with 95 % intervals: {accuracy}; loss in nats per token of the expected answers: "
        f"{losses}. {count} held-out examples per task, greedy; bars are the intervals. "
        + (f"Below what is required: {', '.join(missed)}." if missed else "No task is below what is required."),
        f"{bf16[data['bf16_is']]}; FP8 is kept as stored and dequantized at each use; nf4 is made of the FP8 weights "
        "by bitsandbytes, linear layers and experts of the language model, and computes in bf16 "
        "([quantization.md](quantization.md)). Towers, embeddings and head stay bf16 in all three, a larger share "
        "here than in a released model.",
    ]

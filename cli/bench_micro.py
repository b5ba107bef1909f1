"""`mimo bench --micro`: how often MiMo-Micro is right on held-out examples, and what its draft heads bring on text."""

import argparse
import json
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoProcessor, BitsAndBytesConfig
from transformers.utils import logging

from modeling_mimo import MiMoV2FP8Config, micro
from modeling_mimo.training import ConversationCollator
from modeling_mimo.training.collator import IGNORED
from modeling_mimo.training.micro_tasks import TASKS, example, is_right

from .bench import cut_prompts
from .demo import read_text
from .demo_micro import draft_counts, timed
from .loading import read_config


PRECISIONS = ("fp8", "bf16", "nf4")
# numbers of the examples of one seed; the first ones of all are left to whoever watches a training
SEED_STRIDE = 100_000
# tokens for reasoning and answer; the longest answers, stories, have about half as many
ANSWER_TOKENS = 256
# normal quantile of 95 %
Z = 1.959964

# most prompts of one kind of text that are drafted behind
PROMPTS = 8
# tasks whose answers are long enough to draft
LONG_ANSWERS = ("story", "fact")


@dataclass
class Score:
    """Held-out examples of one task: `right` of `count`. With `loss`, `nats` is the cross entropy of the `tokens` of
    the expected answers."""

    count: int = 0
    right: int = 0
    nats: float = 0.0
    tokens: int = 0

    @property
    def accuracy(self) -> float:
        return self.right / self.count

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.right, self.count)

    @property
    def loss(self) -> float | None:
        """Nats per expected token; None where they were not computed."""
        return self.nats / self.tokens if self.tokens else None


def wilson(right: int, count: int, z: float = Z) -> tuple[float, float]:
    """Wilson's score interval (low, high) of a share. ValueError: `right` of `count` is no share."""
    if not 0 <= right <= count or count == 0:
        raise ValueError(f"`right`: expected 0 to `count`, which is at least 1, got {right} of {count}.")
    share, weight = right / count, z * z / count
    middle = (share + weight / 2) / (1 + weight)
    half = math.sqrt(weight * share * (1 - share) + weight * weight / 4) / (1 + weight)
    # rounding alone would leave 0 and 1 where nothing or everything is right
    return max(0.0, middle - half) if right else 0.0, min(1.0, middle + half) if right < count else 1.0


def numbered(seed: int, index: int) -> int:
    """Number in micro_tasks of example `index` of a seed; seeds have no example in common."""
    return (seed + 1) * SEED_STRIDE + index


def evaluate(
    model,
    processor,
    tasks: Iterable[str],
    count: int,
    batch_size: int = 16,
    seed: int = 0,
    with_loss: bool = False,
    max_new_tokens: int = ANSWER_TOKENS,
) -> dict[str, Score]:
    """Asks `model` `count` held-out examples of each of `tasks` (names in micro_tasks.TASKS), greedily, in batches
    that are padded on the left; with_loss: also the loss of the expected answers."""
    scores, collator = {task: Score() for task in tasks}, ConversationCollator(processor)
    # disable=None: no bar where stderr is not a terminal
    with tqdm(total=len(scores) * count, unit="example", disable=None) as bar:
        for task, score in scores.items():
            bar.set_description(task)
            for start in range(0, count, batch_size):
                numbers = range(start, min(start + batch_size, count))
                examples = [example(task, numbered(seed, number)) for number in numbers]
                for asked, response in zip(examples, responses(model, processor, examples, max_new_tokens)):
                    score.right += is_right(asked, response)
                score.count += len(examples)
                if with_loss:
                    nats, tokens = expected_loss(model, collator, examples)
                    score.nats, score.tokens = score.nats + nats, score.tokens + tokens
                bar.update(len(examples))
    return scores


def responses(model, processor, examples: list[dict], max_new_tokens: int = ANSWER_TOKENS) -> list[dict]:
    """The message that `model` answers each of `examples` with, as `processor.parse_response` gives it."""
    # a batch has one set of tools and of template variables
    groups: dict[str, list[int]] = {}
    for place, asked in enumerate(examples):
        key = json.dumps([asked.get("tools"), asked.get("chat_template_kwargs")], sort_keys=True)
        groups.setdefault(key, []).append(place)
    found: dict[int, dict] = {}
    for places in groups.values():
        tools = examples[places[0]].get("tools")
        inputs = processor.apply_chat_template(
            [examples[place]["messages"] for place in places],
            tools=tools,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **examples[places[0]].get("chat_template_kwargs", {}),
        ).to(model.device)
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        # a prompt may have begun the answer
        messages = processor.parse_response(
            output[:, inputs["input_ids"].shape[1] :], prefix=inputs["input_ids"], tools=tools
        )
        found.update(zip(places, messages))
    return [found[place] for place in range(len(examples))]


def expected_loss(model, collator, examples: list[dict]) -> tuple[float, int]:
    """Cross entropy in nats of what is expected of the assistant in `examples`, summed, and its tokens."""
    batch = collator([{**asked, "messages": [*asked["messages"], asked["reply"]]} for asked in examples])
    labels = batch.pop("labels")[:, 1:].to(model.device)
    with torch.inference_mode():
        logits = model(**{name: value.to(model.device) for name, value in batch.items()}).logits[:, :-1]
    learned = labels != IGNORED
    nats = F.cross_entropy(logits[learned].float(), labels[learned], reduction="sum")
    return nats.item(), int(learned.sum())


def run_micro(args: argparse.Namespace) -> int:
    """0, whatever the accuracy. Raises ValueError or OSError for bad input, before a model is loaded.

    args: of `mimo bench`, with its defaults filled in.
    """
    args.path = micro() if args.path is None else args.path
    tasks = args.task or list(TASKS)
    if unknown := [task for task in tasks if task not in TASKS]:
        raise ValueError(f"`--task`: expected some of {', '.join(TASKS)}, got {unknown[0]}.")
    if args.temperature != 0:
        raise ValueError(f"`--temperature`: expected 0 with --micro, which answers greedily, got {args.temperature}.")
    is_fp8 = check_checkpoints(args)
    columns = chosen_columns(args, is_fp8)
    text = read_text(args.text)
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    scores, parameters = {}, {}
    for name, (path, options) in columns.items():
        model, processor = load(path, args.device_map, options)
        parameters[name] = model.num_parameters()
        scores[name] = evaluate(
            model, processor, tasks, args.count, args.batch, args.seed, bool(args.precision), args.new_tokens
        )
        # two models need not fit at a time
        del model
    result = {
        "model": args.path,
        # quantized models count their scales, too
        "parameters": parameters.get("bf16", parameters[next(iter(columns))]),
        "count": args.count,
        "seed": args.seed,
        "columns": list(columns),
        "tasks": [task_row(TASKS[task], {name: scores[name][task] for name in columns}) for task in tasks],
        "all": {name: score_row(pooled(scores[name].values())) for name in columns},
        "mtp": drafting(args, text, is_fp8) if args.mtp else None,
    }
    print(json.dumps(result, indent=2) if args.json else as_text(result))
    return 0


def check_checkpoints(args: argparse.Namespace) -> bool:
    """Whether the weights of PATH are FP8. ValueError: a checkpoint that does not see and hear, or cannot draft."""
    for path in (*args.compare, args.path):
        config = read_config(path, omni=True)
    if args.mtp and not config.num_mtp_layers:
        raise ValueError(f"`--mtp`: expected a checkpoint with MTP heads, got {args.path} without.")
    # one that bitsandbytes has quantized has an entry, too
    return (config.to_dict().get("quantization_config") or {}).get("quant_method") == "fp8"


def chosen_columns(args: argparse.Namespace, is_fp8: bool) -> dict[str, tuple[str, dict]]:
    """Name of a column -> checkpoint and what `from_pretrained` gets to hold its weights so.

    ValueError: an unknown precision, `--dtype` or `--fp8-resident` beside one, FP8 of a checkpoint in floats.
    """
    resident = {"quantization_config": MiMoV2FP8Config(dequantize=False)}
    if not args.precision:
        if args.compare:
            raise ValueError("`--compare`: expected --precision with it, got none.")
        options = {"dtype": args.dtype, **(resident if args.fp8_resident else {})}
        return {"fp8" if args.fp8_resident else args.dtype: (args.path, options)}
    if args.fp8_resident or args.dtype != "auto":
        raise ValueError("`--precision`: expected neither --dtype nor --fp8-resident with it, got one.")
    held = {
        "fp8": resident,
        "bf16": in_floats(is_fp8),
        "nf4": {
            "quantization_config": BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
            )
        },
    }
    columns: dict[str, tuple[str, dict]] = {}
    for precision in args.precision.split(","):
        if precision not in PRECISIONS:
            raise ValueError(f"`--precision`: expected some of {', '.join(PRECISIONS)}, got {precision!r}.")
        if precision == "fp8" and not is_fp8:
            raise ValueError(
                f"`--precision`: expected bf16 or nf4 for {args.path}, whose weights are not FP8, got fp8."
            )
        columns[precision] = (args.path, {"dtype": torch.bfloat16, **held[precision]})
    for path in args.compare:
        name = Path(path).name
        columns[path if name in columns else name] = (path, {"dtype": "auto"})
    return columns


def in_floats(is_fp8: bool) -> dict:
    """What `from_pretrained` gets so that no GPU computes in FP8."""
    return {"quantization_config": MiMoV2FP8Config(dequantize=True)} if is_fp8 else {}


def load(path: str, device_map: str, options: dict):
    """Model and processor."""
    model = AutoModelForCausalLM.from_pretrained(path, device_map=device_map, **options)
    return model.eval(), AutoProcessor.from_pretrained(path)


def pooled(scores: Iterable[Score]) -> Score:
    """The score of all examples together."""
    total = Score()
    for score in scores:
        for name in ("count", "right", "nats", "tokens"):
            setattr(total, name, getattr(total, name) + getattr(score, name))
    return total


def score_row(score: Score, bar: float | None = None) -> dict:
    low, high = score.interval
    return {
        "right": score.right,
        "count": score.count,
        "accuracy": score.accuracy,
        "low": low,
        "high": high,
        "loss": score.loss,
        "passes": None if bar is None else score.accuracy >= bar,
    }


def task_row(task, scores: dict[str, Score]) -> dict:
    """A task of micro_tasks.TASKS with the scores of all columns."""
    about = {name: getattr(task, name) for name in ("name", "kind", "about", "chance", "bar")}
    return about | {"scores": {name: score_row(score, task.bar) for name, score in scores.items()}}


def drafting(args: argparse.Namespace, text: str, is_fp8: bool) -> list[dict]:
    """Per kind of text: greedy decoding without drafts, with all draft heads and with "auto", in turn, in float32,
    where neither way rounds otherwise than the other."""
    model, processor = load(args.path, args.device_map, {"dtype": torch.float32, **in_floats(is_fp8)})
    modes = {"plain": {}, "full": {"use_mtp": True}, "auto": {"use_mtp": True, "mtp_depth": "auto"}}
    kinds = text_prompts(processor, text, args)
    rows = []
    with tqdm(total=sum(map(len, kinds.values())) + 1, desc="drafting", unit="prompt", disable=None) as bar:
        for options in modes.values():
            # what is slow once alone
            timed(model, next(iter(kinds.values()))[0], args.new_tokens, options)
        bar.update()
        for kind, prompts in kinds.items():
            runs: dict[str, list] = {name: [] for name in modes}
            for prompt in prompts:
                for name, options in modes.items():
                    runs[name].append(timed(model, prompt, args.new_tokens, options))
                bar.update()
            rows.append(drafting_row(kind, **runs))
    return rows


def text_prompts(processor, text: str, args: argparse.Namespace) -> dict[str, list]:
    """Kind of text -> prompts, ids [1, tokens]: requests that are answered at length, and pieces of `text`."""
    count = min(args.count, PROMPTS)
    kinds = {}
    for task in LONG_ANSWERS:
        asked = [example(task, numbered(args.seed, number)) for number in range(count)]
        kinds[task] = [
            processor.apply_chat_template(
                one["messages"],
                add_generation_prompt=True,
                tokenize=True,
                return_tensors="pt",
                **one.get("chat_template_kwargs", {}),
            )
            for one in asked
        ]
    ids = processor.tokenizer(text).input_ids
    kinds["package text" if args.text is None else args.text.name] = list(
        cut_prompts(ids, count, args.prompt_tokens).split(1)
    )
    return kinds


def drafting_row(kind: str, plain: list[dict], full: list[dict], auto: list[dict]) -> dict:
    """Over the prompts of one kind of text, each token with the same weight."""
    tokens, seconds = sum(len(run["tokens"]) for run in plain), sum(run["seconds"] for run in plain)
    return {
        "text": kind,
        "prompts": len(plain),
        "tokens": tokens,
        **draft_counts(full),
        "plain_tokens_per_second": tokens / seconds,
        "times_plain": seconds / sum(run["seconds"] for run in full),
        "times_plain_auto": seconds / sum(run["seconds"] for run in auto),
        "same_tokens": all(
            run["tokens"] == expected["tokens"] for runs in (full, auto) for run, expected in zip(runs, plain)
        ),
    }


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def table(rows: list[list[str]], left: tuple[int, ...]) -> list[str]:
    """Aligned lines, the columns with numbers in `left` on the left."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join(
            cell.ljust(width) if place in left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]


def task_table(result: dict) -> list[str]:
    """A line per task and one for all: what each column got right, and with one column alone what the task asks."""
    columns = result["columns"]
    alone, with_loss = len(columns) == 1, any(row["loss"] is not None for row in result["all"].values())
    heads = ["task"]
    for name in columns:
        heads += ["right" if alone else f"{name} right", "interval", *(["loss"] if with_loss else [])]
    rows = [[*heads, "chance", "bar", "passes", *(["asks"] if alone else [])]]
    everything = {"name": "all", "scores": result["all"], "chance": None, "bar": None, "about": ""}
    for row in (*result["tasks"], everything):
        cells, verdicts = [row["name"]], [row["scores"][name]["passes"] for name in columns]
        for score in (row["scores"][name] for name in columns):
            cells += [percent(score["accuracy"]), f"{percent(score['low'])} - {percent(score['high'])}"]
            cells += [f"{score['loss']:.3f}"] if with_loss else []
        passes = "" if row["bar"] is None else "yes" if all(verdicts) else "NO"
        rows.append([*cells, percent(row["chance"]), percent(row["bar"]), passes, *([row["about"]] if alone else [])])
    return table(rows, left=(0, len(rows[0]) - 1) if alone else (0,))


def drafting_table(rows: list[dict]) -> list[str]:
    """A line per kind of text."""
    cells = [
        [
            "text",
            "prompts",
            "tokens",
            "accepted length",
            "accepted per head",
            "tokens/s plain",
            "times",
            "auto",
            "tokens",
        ]
    ]
    for row in rows:
        shares = " ".join(f"{done / max(1, asked):.0%}" for done, asked in zip(row["accepted"], row["proposed"]))
        cells.append(
            [
                row["text"],
                str(row["prompts"]),
                str(row["tokens"]),
                f"{row['mean_accepted_length']:.2f} of {1 + len(row['proposed'])}",
                shares,
                f"{row['plain_tokens_per_second']:.1f}",
                f"{row['times_plain']:.2f}",
                f"{row['times_plain_auto']:.2f}",
                "the same" if row["same_tokens"] else "NOT the same",
            ]
        )
    return ["greedy decoding with draft heads, float32, one prompt at a time:", *table(cells, left=(0,))]


def as_text(result: dict) -> str:
    """The same for people."""
    columns = result["columns"]
    same = "" if len(columns) == 1 else ", the same in every column"
    lines = [
        f"{result['model']}: {result['parameters']:,} parameters",
        f"{result['count']} held-out examples per task{same}, seed {result['seed']}; percent with the 95 % "
        "interval (Wilson), loss in nats per expected token",
        "",
        *task_table(result),
    ]
    if result["mtp"]:
        lines += ["", *drafting_table(result["mtp"])]
    lines.append("")
    for name in columns:
        misses = [
            f"{row['name']} {percent(row['scores'][name]['accuracy'])} of {percent(row['bar'])}"
            for row in result["tasks"]
            if row["scores"][name]["passes"] is False
        ]
        where = "" if len(columns) == 1 else f" in {name}"
        lines.append(f"bars missed{where}: {', '.join(misses) or 'none'}")
    return "\n".join(lines)

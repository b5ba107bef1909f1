"""Trains MiMo-Micro on tasks that are drawn anew for every step. Can be stopped and started again.

    python examples/micro/train.py trunk runs/untrained runs/trunk
    python examples/micro/train.py heads runs/trunk runs/heads

On two cores: `OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 examples/micro/train.py ...`, a process for each.

`trunk` trains the language model on what the towers, which are frozen, see and hear; `heads` trains the three MTP
heads, and leaves the rest as it is.
"""

import argparse
import json
import os
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from muon import Muon
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, AutoProcessor, TrainerCallback, TrainingArguments

import modeling_mimo  # noqa: F401 registers the model
from modeling_mimo.training import ConversationCollator, MiMoV2Trainer, RouterBiasCallback
from modeling_mimo.training.micro_tasks import TASKS, conversation, example


# conversations of an optimizer step, and the parts of similar cost that they are computed in
BATCH, PARTS = 32, 4
# trained before; with a language model that knows nothing yet they would forget most of it
TOWERS = ("visual.", "audio_encoder.", "speech_embeddings.")
STAGES = {
    "trunk": {"steps": 3400, "learning_rate": 2e-3},
    "heads": {"steps": 300, "learning_rate": 2e-3},
}


class Buckets(Dataset):
    """Item `i` is part `i % PARTS` of step `i // PARTS`: conversations of about the same length, to pad little."""

    def __init__(self, steps: int):
        self.steps = steps

    def __len__(self) -> int:
        return self.steps * PARTS

    def __getitem__(self, index: int) -> list[dict]:
        step, part = divmod(index, PARTS)
        return parts_of(step)[part]


@lru_cache(maxsize=1)
def parts_of(step: int) -> list[list[dict]]:
    """The conversations of a step from short to long, in parts that take about the same time."""
    drawn = sorted((conversation(step * BATCH + number) for number in range(BATCH)), key=length)
    shares = np.cumsum([length(one) for one in drawn])
    places = np.minimum((shares / shares[-1] * PARTS - 1e-9).astype(int), PARTS - 1)
    parts = [[one for one, place in zip(drawn, places) if place == part] for part in range(PARTS)]
    # a single conversation can be longer than a part
    return [part or drawn[:1] for part in parts]


def length(one: dict) -> float:
    """About how many tokens a conversation has; the numbers were fitted to 400 of them."""
    tokens = 28 + 5 * len(one["messages"]) + 476 * ("tools" in one)
    for message in one["messages"]:
        tokens += 0.76 * len(message.get("reasoning_content") or "")
        parts = message["content"]
        for part in [{"type": "text", "text": parts}] if isinstance(parts, str) else parts:
            if part["type"] == "text":
                tokens += len(part["text"]) / 4
            else:
                tokens += 74 if part["type"] == "video" else 0
    return tokens


class BucketCollator(ConversationCollator):
    """The Trainer's batches hold one bucket each."""

    def __call__(self, buckets: list[list[dict]]) -> dict[str, torch.Tensor]:
        (bucket,) = buckets
        return super().__call__(bucket)


class MicroTrainer(MiMoV2Trainer):
    """Every parameter takes part in every bucket, those of a tower without pictures or sound with a gradient of 0:
    two processes that add up their gradients count on it."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss = loss + 0.0 * sum(parameter.sum() for parameter in model.parameters() if parameter.requires_grad)
        return (loss, outputs) if return_outputs else loss


class Scores(TrainerCallback):
    """Accuracy on held-out examples every so often: an answer is right if each of its tokens is the likeliest one,
    that is if it would be generated greedily. One line of JSON each time, in the run's folder."""

    def __init__(self, processor, folder: Path, every: int, count: int):
        self.collator, self.folder, self.every, self.count = ConversationCollator(processor), folder, every, count
        self.batches = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        due = state.global_step % self.every == 0 or state.global_step == state.max_steps
        if due and state.is_world_process_zero:
            model.eval()
            scores = {task: round(self.score(model, task), 3) for task in TASKS}
            model.train()
            with (self.folder / "scores.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **scores}) + "\n")
            print(f"step {state.global_step}: " + ", ".join(f"{task} {score:.2f}" for task, score in scores.items()))

    @torch.no_grad()
    def score(self, model, task: str) -> float:
        if task not in self.batches:
            drawn = [example(task, number) for number in range(self.count)]
            self.batches[task] = self.collator(
                [{**one, "messages": [*one["messages"], one["reply"]]} for one in drawn]
            )
        labels = self.batches[task]["labels"][:, 1:]
        inputs = {name: tensor for name, tensor in self.batches[task].items() if name != "labels"}
        found = model(**inputs, use_cache=False).logits[:, :-1].argmax(-1)
        return ((found == labels) | (labels < 0)).all(1).float().mean().item()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("source", type=Path, help="checkpoint to begin with")
    parser.add_argument("folder", type=Path, help="folder of the run; one with checkpoints goes on where it stopped")
    parser.add_argument("--steps", type=int, help="optimizer steps")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--score-every", type=int, default=400, help="steps between scores (default: 400)")
    parser.add_argument("--save-every", type=int, default=400, help="steps between checkpoints (default: 400)")
    parser.add_argument("--score-count", type=int, default=48, help="held-out examples per task (default: 48)")
    parser.add_argument(
        "--frozen",
        nargs="*",
        default=TOWERS,
        metavar="NAME",
        help=f"beginnings of the names of what the trunk's stage leaves alone (default: {' '.join(TOWERS)})",
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not (args.source / "config.json").is_file():
        parser.error(f"source: expected a checkpoint, got {args.source}")
    steps = args.steps or STAGES[args.stage]["steps"]
    torch.manual_seed(args.seed)
    processor = AutoProcessor.from_pretrained(args.source)
    model = AutoModelForCausalLM.from_pretrained(args.source, dtype=torch.float32)
    callbacks = [Scores(processor, args.folder, args.score_every, args.score_count)]
    if args.stage == "trunk":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(("model.mtp.", *args.frozen)))
        callbacks.append(RouterBiasCallback(rate=1e-3))
    else:
        model.config.mtp_loss_weight = 1.0
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("model.mtp."))
    settings = TrainingArguments(
        args.folder,
        max_steps=steps,
        learning_rate=args.learning_rate or STAGES[args.stage]["learning_rate"],
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.02},
        warmup_steps=steps // 25,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=PARTS // int(os.environ.get("WORLD_SIZE", 1)),
        ddp_find_unused_parameters=False,
        # the parts of a step stay together, and steps are drawn anew: there is nothing to shuffle
        train_sampling_strategy="sequential",
        dataloader_num_workers=1,
        dataloader_prefetch_factor=2 * PARTS,
        save_steps=args.save_every,
        save_total_limit=1,
        logging_steps=20,
        report_to=[],
        seed=args.seed,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = MicroTrainer(
        model,
        settings,
        BucketCollator(processor),
        train_dataset=Buckets(steps),
        callbacks=callbacks,
        # a schedule of None: the one that the settings say
        optimizers=(Muon(model, settings.learning_rate), None),
    )
    args.folder.mkdir(parents=True, exist_ok=True)
    trainer.train(resume_from_checkpoint=any(args.folder.glob("checkpoint-*")))
    model.config.mtp_loss_weight = 0.0
    model.save_pretrained(args.folder)
    processor.save_pretrained(args.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())

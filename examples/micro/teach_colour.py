"""Teaches MiMo-Micro the name of a colour that it has never seen, with adapters (LoRA), in a minute on a CPU core.

    python examples/micro/teach_colour.py --output taught

Half of the lessons show the new colour, the other half are of its old training, so that it forgets little.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoProcessor, TrainingArguments
from transformers.utils import logging

from modeling_mimo import micro
from modeling_mimo.cli.bench_micro import responses, wilson
from modeling_mimo.training import ConversationCollator, MiMoV2Trainer, load_adapter, lora_config
from modeling_mimo.training import micro_pictures as pictures
from modeling_mimo.training.micro_tasks import TASKS, Scene, Turn, example, image, is_right


# far from the seven colours of micro_pictures.COLOURS
NAME, COLOUR = "cyan", (60, 215, 215)
PARTS = ("attention", "experts", "mlp", "projectors")
BATCH = 16
# first numbers of the generators: pictures to learn from, and others to be asked about
LESSONS, TESTS = 1, 2


def new_colour(random: np.random.Generator) -> Scene:
    """A shape of the new colour, and the questions that name it."""
    thing = pictures.thing(random, int(random.integers(9)), colour=COLOUR)
    turns = [
        Turn("colour", "What colour is it?", NAME),
        Turn("describe", "Describe the picture.", f"A {NAME} {thing.shape} at the {thing.place}."),
    ]
    return Scene(turns, image(pictures.draw([thing], pictures.background(random))))


def lessons(count: int) -> list[dict]:
    """Conversations to learn from, the new colour in every other one."""
    made = []
    for number in range(count):
        random = np.random.default_rng([LESSONS, number])
        scene = TASKS["colour"].scene(random, False) if number % 2 else new_colour(random)
        # in any order: a colour that was named before could be copied
        made.append(scene.conversation([scene.turns[turn] for turn in random.permutation(len(scene.turns))]))
    return made


def questions(count: int) -> dict[str, list[dict]]:
    """What is asked before and after, `count` of each kind, as `example` of micro_tasks has it."""
    scenes = [new_colour(np.random.default_rng([TESTS, number])) for number in range(count)]
    asked = {f"{NAME}: what colour": 0, f"{NAME}: describe": 1}
    kinds = {}
    for kind, place in asked.items():
        kinds[kind] = []
        for scene in scenes:
            talk = scene.conversation([scene.turns[place]])
            user, reply = talk.pop("messages")
            kinds[kind].append({**talk, "messages": [user], "reply": reply, "answer": reply["content"]})
    for task in ("colour", "describe", "shape"):
        kinds[f"old colours: {task}"] = [example(task, number) for number in range(count)]
    return kinds


def accuracies(model, processor, kinds: dict[str, list[dict]]) -> dict[str, tuple[int, int]]:
    """Kind of question -> right answers, and questions."""
    model.eval()
    found = {}
    for kind, asked in kinds.items():
        answers = [
            answer
            for start in range(0, len(asked), BATCH)
            for answer in responses(model, processor, asked[start : start + BATCH])
        ]
        found[kind] = sum(map(is_right, asked, answers)), len(asked)
    return found


def teach(model, processor, steps: int, output: Path, learning_rate: float = 1e-3):
    """`model` with adapters that have learned the colour and are saved in `output`."""
    torch.manual_seed(0)
    model = get_peft_model(model, lora_config(model, PARTS, r=16, lora_alpha=32))
    model.print_trainable_parameters()
    trainer = MiMoV2Trainer(
        model,
        TrainingArguments(
            output,
            per_device_train_batch_size=BATCH,
            max_steps=steps,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=steps // 10,
            logging_steps=max(1, steps // 10),
            save_strategy="no",
            dataloader_pin_memory=False,
            report_to=[],
        ),
        data_collator=ConversationCollator(processor),
        train_dataset=lessons(BATCH * steps),
    )
    trainer.train()
    trainer.save_model(output)
    return model


def load(path: str):
    """In float32: the fastest on most CPUs, and adapters learn in it."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def table(before: dict, after: dict) -> str:
    lines = []
    for kind, (right, count) in before.items():
        now = after[kind][0]
        low, high = wilson(now, count)
        lines.append(
            f"{kind:28} {right / count:6.1%} -> {now / count:6.1%}   ({low:.1%} to {high:.1%}, {count} pictures)"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the adapters")
    parser.add_argument("--steps", type=int, default=120, help="steps of 16 conversations (default: 120)")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--count", type=int, default=100, help="test pictures of each kind (default: 100)")
    args = parser.parse_args(arguments)
    logging.set_verbosity_error()
    start = time.perf_counter()
    model, processor, kinds = load(micro()), AutoProcessor.from_pretrained(micro()), questions(args.count)
    before = accuracies(model, processor, kinds)
    learned = time.perf_counter()
    teach(model, processor, args.steps, args.output, args.learning_rate)
    learned = time.perf_counter() - learned
    # as another program would: the shipped weights, and the adapters from their files
    after = accuracies(load_adapter(load(micro()), args.output), processor, kinds)
    size = sum(path.stat().st_size for path in args.output.glob("adapter_*"))
    print(table(before, after))
    print(
        f"{args.steps} steps in {learned:.0f} s, {time.perf_counter() - start:.0f} s in all; {size / 1e6:.1f} MB saved"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Fine-tunes a MiMo-V2 checkpoint on conversations with images, videos and sound.

    python examples/finetune/finetune.py path/to/MiMo-V2.5 conversations.jsonl --output tuned --lora attention,experts

Each line of the JSONL file is `{"messages": [...]}`, with `tools` and `chat_template_kwargs` where they are needed.
Media are paths, relative to the file, or URLs: `{"type": "image", "path": "cat.jpg"}`.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    TrainingArguments,
)

from modeling_mimo import MiMoV2FP8Config
from modeling_mimo.training import (
    LORA_PARTS,
    STAGES,
    AudioCodeCache,
    ConversationCollator,
    MiMoV2Trainer,
    RouterBiasCallback,
    apply_stage,
    load_adapter,
    lora_config,
)


BASES = ("bf16", "fp8", "nf4")
BAD_INPUT = 2


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Fine-tune a MiMo-V2 checkpoint on conversations with media.",
        epilog="example: finetune.py path/to/MiMo-V2.5 data.jsonl --output tuned --lora attention,experts --base fp8",
    )
    parser.add_argument("model", help="checkpoint: a folder or a Hub repository")
    parser.add_argument("data", type=Path, help="JSONL file of conversations")
    parser.add_argument("--output", type=Path, required=True, help="new folder for the result")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--stage", choices=STAGES, help="train the weights of this stage")
    what.add_argument("--lora", metavar="PARTS", help=f"train adapters on some of: {', '.join(LORA_PARTS)}")
    parser.add_argument("--base", choices=BASES, default="bf16", help="weights under adapters (default: bf16)")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters (default: 16)")
    parser.add_argument("--merge", action="store_true", help="also write OUTPUT/merged, the model with the adapters")
    parser.add_argument("--turns", choices=("all", "last"), default="all", help="assistant turns that are learned")
    parser.add_argument("--max-length", type=int, default=8192, help="tokens of a conversation; longer ones are cut")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--accumulate", type=int, default=8, help="batches per step (default: 8)")
    parser.add_argument("--steps", type=int, default=-1, help="steps; by default one epoch")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--mtp-loss-weight", type=float, default=0.0, help="of each MTP head; 0 leaves them alone")
    parser.add_argument("--router-bias-rate", type=float, default=0.0, help="balance experts (with --stage)")
    return parser


def read_conversations(path: Path) -> list[dict]:
    """The lines of a JSONL file, with media paths relative to it. ValueError: a line that is no conversation."""
    examples = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            example = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: expected JSON, got {error}") from error
        if not isinstance(example, dict) or not isinstance(example.get("messages"), list):
            raise ValueError(f"{path}:{number}: expected an object with a list of `messages`")
        for message in example["messages"]:
            for part in message.get("content") if isinstance(message.get("content"), list) else ():
                if isinstance(part.get("path"), str):
                    part["path"] = str(path.parent / part["path"])
        examples.append(example)
    if not examples:
        raise ValueError(f"{path}: expected conversations, got none")
    return examples


def load_model(name: str, base: str):
    """The model with its weights in bfloat16, FP8 as in the files, or 4 bits."""
    try:
        stored = AutoConfig.from_pretrained(name).to_dict().get("quantization_config")
    except OSError as error:
        raise OSError(
            f"{name}: expected a checkpoint's folder or Hub repository, got none that can be read"
        ) from error
    settings = None
    if base == "nf4":
        settings = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    elif stored is not None:
        settings = MiMoV2FP8Config(dequantize=base == "bf16")
    elif base == "fp8":
        raise ValueError(f"--base fp8: expected a checkpoint in FP8, got {name} in floats; use --base bf16 or nf4")
    return AutoModelForCausalLM.from_pretrained(
        name, dtype=torch.bfloat16, device_map="auto", quantization_config=settings
    )


def load_processor(name: str, config, output: Path):
    """The processor and what keeps its sounds as codes, or the tokenizer of a checkpoint for text only."""
    if config.processor_config is None:
        return AutoTokenizer.from_pretrained(name), None
    processor = AutoProcessor.from_pretrained(name)
    return processor, AudioCodeCache(processor, output / "audio_codes")


def train(args: argparse.Namespace) -> None:
    examples = read_conversations(args.data)
    if args.stage and args.base != "bf16":
        raise ValueError(f"--base {args.base}: expected --lora with it; weights that train are bf16")
    if args.lora and args.router_bias_rate:
        raise ValueError("--router-bias-rate: expected --stage with it; adapters hold no router biases")
    model = load_model(args.model, args.base)
    model.config.mtp_loss_weight = args.mtp_loss_weight
    if args.lora:
        from peft import get_peft_model

        # a frozen embedding gives checkpointed layers no gradient
        model.enable_input_require_grads()
        parts = tuple(args.lora.split(","))
        model = get_peft_model(model, lora_config(model, parts, r=args.rank, lora_alpha=2 * args.rank))
        model.print_trainable_parameters()
    else:
        for part, count in apply_stage(model, args.stage).items():
            print(f"{part}: {count:,} parameters learn")
    processor, cache = load_processor(args.model, model.config, args.output)
    trainer = MiMoV2Trainer(
        model,
        TrainingArguments(
            args.output,
            per_device_train_batch_size=args.batch_size,
            gradient_accumulation_steps=args.accumulate,
            max_steps=args.steps,
            num_train_epochs=1,
            learning_rate=args.learning_rate,
            activation_checkpointing=True,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
        ),
        data_collator=ConversationCollator(
            processor, args.max_length, truncation=True, turns=args.turns, prepare=cache
        ),
        train_dataset=examples,
        callbacks=[RouterBiasCallback(args.router_bias_rate)] if args.router_bias_rate else None,
    )
    trainer.train()
    trainer.save_model(args.output)
    processor.save_pretrained(args.output)
    if args.lora and args.merge:
        load_adapter(load_model(args.model, "bf16"), args.output).merge_and_unload().save_pretrained(
            args.output / "merged"
        )
        processor.save_pretrained(args.output / "merged")


def main(arguments: list[str] | None = None) -> int:
    args = build_parser().parse_args(arguments)
    try:
        train(args)
    except (ValueError, OSError) as error:
        print(f"finetune: error: {error}", file=sys.stderr)
        return BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())

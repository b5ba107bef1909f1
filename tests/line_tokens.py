"""Tokens of MiMo-Micro in every way of generating, which are the same on every supported line of Transformers.

python tests/line_tokens.py    # writes data/line_tokens.json, by the installed line
"""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import modeling_mimo
from modeling_mimo import HybridCache


FILE = Path(__file__).parent / "data" / "line_tokens.json"
CACHE_NAMES = ("cache", "past_key_values")
QUESTION, LATER = "Tell a story.", "Tell another story."
NEW_TOKENS = 24


def load():
    """MiMo-Micro in float32, and its tokenizer."""
    folder = modeling_mimo.micro()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tokenizer


def prompt(tokenizer, *questions: str) -> dict[str, torch.Tensor]:
    """A batch of conversations of one question each, padded on the left."""
    chats = [[{"role": "user", "content": question}] for question in questions]
    return tokenizer.apply_chat_template(
        chats,
        add_generation_prompt=True,
        enable_thinking=False,
        padding=True,
        return_dict=True,
        return_tensors="pt",
    )


# way of generating -> its arguments, made anew for each call, since caches fill
WAYS = {
    "greedy": lambda model: {},
    "without a cache": lambda model: {"use_cache": False},
    "sampled": lambda model: {"do_sample": True, "temperature": 1.0, "top_k": 20},
    "beams": lambda model: {"num_beams": 3},
    "mtp": lambda model: {"use_mtp": True},
    "mtp, sampled": lambda model: {"use_mtp": True, "do_sample": True, "temperature": 1.0, "top_k": 20},
    "static cache": lambda model: {"cache_implementation": "static"},
    "prompt lookup": lambda model: {"prompt_lookup_num_tokens": 3},
    "assistant": lambda model: {"assistant_model": model},
    "chunked prefill": lambda model: {"prefill_chunk_size": 5},
    **{
        f"{way} into a {name}": lambda model, name=name, options=options: {name: HybridCache(model.config), **options}
        for name in CACHE_NAMES
        for way, options in {"greedy": {}, "mtp": {"use_mtp": True}, "chunks": {"prefill_chunk_size": 5}}.items()
    },
}
ALONE = ("prompt lookup", "assistant")


def generated(model, inputs: dict[str, torch.Tensor], options: dict) -> list[list[int]]:
    """The new tokens of each row."""
    torch.manual_seed(7)
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, **options}
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :].tolist()


def two_turns(model, tokenizer, name: str, options: dict) -> list[list[int]]:
    """New tokens behind a longer prompt, whose first part the cache, given as `name`, holds from another call."""
    inputs, cache = prompt(tokenizer, QUESTION), HybridCache(model.config)
    first = model.generate(**inputs, **{name: cache}, do_sample=False, max_new_tokens=8, **options)
    later = tokenizer(LATER, return_tensors="pt")["input_ids"]
    longer = {"input_ids": torch.cat((first, later), dim=1)}
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    return generated(model, longer, {name: cache, **options})


def tokens(model, tokenizer) -> dict[str, list[list[int]]]:
    """Way of generating -> new tokens of each row."""
    batch, single = prompt(tokenizer, QUESTION, "What is 3 + 4?"), prompt(tokenizer, QUESTION)
    found = {way: generated(model, single if way in ALONE else batch, make(model)) for way, make in WAYS.items()}
    for name in CACHE_NAMES:
        for way, options in {"greedy": {}, "mtp": {"use_mtp": True}}.items():
            found[f"{way} behind a reused {name}"] = two_turns(model, tokenizer, name, options)
    return found


if __name__ == "__main__":
    FILE.write_text(json.dumps(tokens(*load()), indent=1) + "\n", encoding="utf-8")

"""A small tokenizer with the layout of the released one, for small models and tests.

The tokenizer of MiMo-V2.5 is a byte-level BPE of 151,643 tokens that splits text as Qwen2 does, followed by the 32
added tokens 151643 to 151674 (source of this and of every setting below: the `tokenizer_config.json` of
XiaomiMiMo/MiMo-V2.5). Here the base vocabulary is trained on a short English text, and the same added tokens follow
directly after it.
"""

import importlib.resources
import json
import os
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer


# Added tokens in the order of their ids. Decoding with skip_special_tokens keeps the text tokens and drops all others.
_CONTROL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_TEXT_TOKENS = (
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)
_MIMO_TOKENS = (
    "<|audio_pad|>",
    "<|mimo_video_start|>",
    "<|mimo_video_end|>",
    "<|mimo_audio_eod|>",
    "<|mimo_audio_start|>",
    "<|mimo_audio_end|>",
)
ADDED_TOKENS = tuple(
    AddedToken(content, special=content not in _TEXT_TOKENS, normalized=False)
    for content in _CONTROL_TOKENS + _TEXT_TOKENS + _MIMO_TOKENS
)

# The config's name of each token id that a model or processor needs. Source: config.json and its processor_config.
_CONFIG_TOKENS = {
    "eos_token_id": "<|im_end|>",
    "pad_token_id": "<|endoftext|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "audio_token_id": "<|audio_pad|>",
    "video_start_token_id": "<|mimo_video_start|>",
    "video_end_token_id": "<|mimo_video_end|>",
    "audio_start_token_id": "<|mimo_audio_start|>",
    "audio_end_token_id": "<|mimo_audio_end|>",
    "audio_eod_token_id": "<|mimo_audio_eod|>",
}

_BYTES = 256


def build_small_tokenizer(vocab_size: int = 2048, text: str | None = None) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE and append the released tokenizer's added tokens and chat template.

    Args:
        vocab_size: Number of tokens in all: 256 bytes, `vocab_size - 288` merges and 32 added tokens. The added token
            with the released id `i` gets the id `vocab_size - 32 + (i - 151643)`.
        text: The text to learn merges from; by default an English one that suffices for 3,400 tokens. The same text
            and size give the same ids on every run.

    Returns:
        A `Qwen2Tokenizer`, the class that the released `tokenizer_config.json` names.

    Raises:
        ValueError: `vocab_size` has no room for the bytes and added tokens, or asks for more merges than `text` has.
    """
    smallest = _BYTES + len(ADDED_TOKENS)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size: expected at least {smallest} (bytes and added tokens), got {vocab_size}")
    if text is None:
        text = _read_data("tokenizer_text.txt")

    base_size = vocab_size - len(ADDED_TOKENS)
    bpe = _train_bpe(text, base_size)
    if len(bpe["vocab"]) < base_size:
        largest = len(bpe["vocab"]) + len(ADDED_TOKENS)
        raise ValueError(
            f"vocab_size: expected at most {largest} for a text of {len(text)} characters, got {vocab_size}; "
            "pass a longer text"
        )

    return Qwen2Tokenizer(
        vocab=bpe["vocab"],
        merges=[tuple(merge) for merge in bpe["merges"]],
        added_tokens_decoder={base_size + index: token for index, token in enumerate(ADDED_TOKENS)},
        # All special tokens but <|endoftext|>, as released.
        additional_special_tokens=[token.content for token in ADDED_TOKENS[1:] if token.special],
        bos_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        add_bos_token=False,
        add_prefix_space=False,
        clean_up_tokenization_spaces=False,
        errors="replace",
        model_max_length=131072,
        split_special_tokens=False,
        chat_template=_read_data("chat_template.jinja"),
    )


def special_token_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """The ids of the tokens that a config names, by the config's names (`eos_token_id`, `image_token_id`, ...).

    Works for the released tokenizer as well. Raises ValueError naming all tokens that `tokenizer` lacks.
    """
    vocab = tokenizer.get_vocab()
    missing = [content for content in _CONFIG_TOKENS.values() if content not in vocab]
    if missing:
        raise ValueError(f"tokenizer: expected a MiMo-V2.5 tokenizer, got one without {', '.join(missing)}")
    return {name: vocab[content] for name, content in _CONFIG_TOKENS.items()}


def save_small_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: str | os.PathLike) -> None:
    """Write tokenizer.json, vocab.json, merges.txt and tokenizer_config.json as in the released repository.

    `save_pretrained` of transformers 5 differs: it writes no vocab.json and merges.txt, moves the chat template to a
    file of its own, and leaves `add_bos_token`, `added_tokens_decoder` and `additional_special_tokens` out of
    tokenizer_config.json.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    # Writes vocab.json and merges.txt.
    tokenizer.backend_tokenizer.model.save(str(folder))

    config = {
        "add_bos_token": tokenizer.add_bos_token,
        "add_prefix_space": tokenizer.add_prefix_space,
        "added_tokens_decoder": {
            str(index): {
                "content": token.content,
                "lstrip": token.lstrip,
                "normalized": token.normalized,
                "rstrip": token.rstrip,
                "single_word": token.single_word,
                "special": token.special,
            }
            for index, token in tokenizer.added_tokens_decoder.items()
        },
        "additional_special_tokens": [str(token) for token in tokenizer.extra_special_tokens],
        "bos_token": tokenizer.bos_token,
        "chat_template": tokenizer.chat_template,
        "clean_up_tokenization_spaces": tokenizer.clean_up_tokenization_spaces,
        "eos_token": tokenizer.eos_token,
        "errors": "replace",
        "model_max_length": tokenizer.model_max_length,
        "pad_token": tokenizer.pad_token,
        "split_special_tokens": tokenizer.split_special_tokens,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": tokenizer.unk_token,
    }
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _train_bpe(text: str, size: int) -> dict:
    """Up to `size` tokens learned from `text`: the `model` part of a tokenizer.json, with `vocab` and `merges`."""
    # An empty tokenizer of the class brings Qwen2's normalizer and split pattern.
    qwen2 = Qwen2Tokenizer(vocab={}, merges=[]).backend_tokenizer
    trained = Tokenizer(models.BPE())
    trained.normalizer = qwen2.normalizer
    trained.pre_tokenizer = qwen2.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    trained.train_from_iterator([text], trainer)
    return json.loads(trained.to_str())["model"]


def _read_data(name: str) -> str:
    return (importlib.resources.files("modeling_mimo") / "data" / name).read_text(encoding="utf-8")

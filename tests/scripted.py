"""Checkpoints with random weights that answer with given texts, by `sequence_bias`, which any checkpoint may have."""

import json

from transformers import AutoProcessor


# more than any logit of the random weights
BIAS = 1000.0
# tokens of the prompt that tell which text comes
TAIL = 16


def script(folder, answers: dict[str, str], **variables) -> None:
    """Lets the checkpoint in `folder` answer a user who says a key of `answers` with its value, then stop.

    variables: of the chat template, e.g. enable_thinking. Answers that were scripted before stay.
    """
    processor = AutoProcessor.from_pretrained(folder)
    tokenizer = getattr(processor, "tokenizer", processor)
    path = folder / "generation_config.json"
    settings = json.loads(path.read_text())
    biases = settings.setdefault("sequence_bias", [])
    for question, answer in answers.items():
        messages = [{"role": "user", "content": question}]
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **variables)
        tail = tokenizer(prompt)["input_ids"][-TAIL:]
        ids = tokenizer(f"{answer}<|im_end|>")["input_ids"]
        biases += [[[*tail, *ids[: length + 1]], BIAS] for length in range(len(ids))]
    path.write_text(json.dumps(settings))

"""The chat template with marks on what the assistant writes, for tokenizers and for TRL."""

import importlib.resources


# the line of the shipped template that writes a turn, and the same with Transformers' marks
_TURN = "{{- '<|im_start|>' + message.role + '\\n' + body + '<|im_end|>' -}}"
_MARKED_TURN = """{{- '<|im_start|>' + message.role + '\\n' -}}
        {%- if message.role == 'assistant' -%}
            {#- Without thinking, and where reasoning was left out, the empty pair is not the model's. -#}
            {%- set given = not enable_thinking | default(true) or not keep_all_reasoning | default(true) -%}
            {%- set prefix = '<think></think>' if given and body.startswith('<think></think>') else '' -%}
            {{- prefix -}}
            {%- generation -%}
                {{- body[prefix | length:] + '<|im_end|>' -}}
            {%- endgeneration -%}
        {%- else -%}
            {{- body + '<|im_end|>' -}}
        {%- endif -%}"""


def training_chat_template() -> str:
    """The shipped chat template, which renders like the released one, with `{% generation %}` around what the
    assistant writes, its `<|im_end|>` included.

    TRL's `assistant_only_loss` looks for these marks: `tokenizer.chat_template = training_chat_template()`. Not the
    shipped form, because other programs that read chat templates do not know the tag.

    Raises:
        RuntimeError: the shipped template was changed and has no such line.
    """
    template = importlib.resources.files("modeling_mimo") / "data" / "chat_template.jinja"
    text = template.read_text(encoding="utf-8")
    if text.count(_TURN) != 1:
        raise RuntimeError("chat_template.jinja: expected one line that writes a turn, got none or several.")
    return text.replace(_TURN, _MARKED_TURN)


__all__ = ["training_chat_template"]

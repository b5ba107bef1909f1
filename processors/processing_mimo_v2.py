# Copyright 2026 The modeling-mimo authors.
#
# Licensed under the MIT License (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     https://opensource.org/license/mit
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""MiMoV2Processor: conversations, texts, images and videos -> the inputs of the model; and its answers read back."""

import importlib.resources
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import BatchFeature, PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin
from transformers.audio_utils import AudioInput
from transformers.image_utils import ImageInput
from transformers.processing_utils import ProcessingKwargs, TextKwargs
from transformers.utils import auto_docstring
from transformers.utils.chat_template_utils import _get_template_variables
from transformers.video_utils import VideoInput

from .chat_mimo_v2 import TEXT_START, Media, mark_chats, take_media, with_mapped_arguments
from .image_processing_mimo_v2 import MiMoV2ImageProcessor, MiMoV2ImageProcessorKwargs
from .media_loading_mimo_v2 import flatten_images, flatten_videos
from .response_parsing_mimo_v2 import MiMoV2ResponseStreamParser, parse_response
from .token_layout_mimo_v2 import TokenLayout, token_layout
from .video_processing_mimo_v2 import MiMoV2VideoProcessor, MiMoV2VideoProcessorKwargs


# name of an id in the released config.json -> the token
TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "audio_token_id": "<|audio_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "video_start_token_id": "<|mimo_video_start|>",
    "video_end_token_id": "<|mimo_video_end|>",
    "audio_start_token_id": "<|mimo_audio_start|>",
    "audio_end_token_id": "<|mimo_audio_end|>",
}
VISION_START, VISION_END = TOKENS["vision_start_token_id"], TOKENS["vision_end_token_id"]


def _placeholder(pattern: str) -> re.Pattern:
    # a token with the mark in front is a user's text
    return re.compile(f"(?<!{TEXT_START}){pattern}")


# of what the template writes for a video all is replaced
_VIDEO_TOKEN = re.escape(TOKENS["video_token_id"])
_PLACEHOLDERS = {
    "image": _placeholder(re.escape(TOKENS["image_token_id"])),
    "video": _placeholder(f"(?:{re.escape(VISION_START)}{_VIDEO_TOKEN}{re.escape(VISION_END)}|{_VIDEO_TOKEN})"),
    "audio": _placeholder(re.escape(TOKENS["audio_token_id"])),
}


class MiMoV2ProcessorKwargs(ProcessingKwargs, total=False):
    text_kwargs: TextKwargs
    images_kwargs: MiMoV2ImageProcessorKwargs
    videos_kwargs: MiMoV2VideoProcessorKwargs


# argument of a call that sorts others -> their names; `timeout` is for what is downloaded
_KWARGS = {
    "text_kwargs": set(TextKwargs.__annotations__),
    "images_kwargs": {"timeout", *MiMoV2ImageProcessorKwargs.__annotations__},
    "videos_kwargs": {"timeout", *MiMoV2VideoProcessorKwargs.__annotations__},
}


@auto_docstring(
    custom_intro="""
    Tokenizer, image processor and video processor of a MiMo-V2 checkpoint in one. Batches are padded on the left, so
    that generation starts behind every prompt; `padding` is on by default.
    """
)
class MiMoV2Processor(ProcessorMixin):
    valid_processor_kwargs = MiMoV2ProcessorKwargs

    def __init__(
        self,
        image_processor: MiMoV2ImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        video_processor: MiMoV2VideoProcessor,
        chat_template: str | None = None,
        token_ids: dict[str, int] | None = None,
        use_video_timestamps: bool = True,
    ):
        r"""
        token_ids (`dict[str, int]`, *optional*):
            Ids by their names in TOKENS. ValueError if the tokenizer lacks one of TOKENS or has another id for it.
        use_video_timestamps (`bool`, *optional*, defaults to `True`):
            Whether "MM:SS" stands before each pair of frames. NotImplementedError if not, which no release uses.
        """
        if not use_video_timestamps:
            raise NotImplementedError("use_video_timestamps: expected true, as every release has it, got false")
        chat_template = chat_template or tokenizer.chat_template or _default_chat_template()
        super().__init__(image_processor, tokenizer, video_processor, chat_template=chat_template)
        # pipelines pad with the tokenizer's side as well
        tokenizer.padding_side = "left"
        self.use_video_timestamps = use_video_timestamps
        self.token_ids = _checked_token_ids(tokenizer, token_ids or {})
        self.image_token, self.image_token_id = TOKENS["image_token_id"], self.token_ids["image_token_id"]
        self.video_token, self.video_token_id = TOKENS["video_token_id"], self.token_ids["video_token_id"]

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> type:
        # Transformers' own check of a video processor needs torchvision
        classes = {"image_processor": MiMoV2ImageProcessor, "video_processor": MiMoV2VideoProcessor}
        if argument_name not in classes:
            return super().check_argument_for_proper_class(argument_name, argument)
        if not isinstance(argument, classes[argument_name]):
            expected = classes[argument_name].__name__
            raise TypeError(f"{argument_name}: expected a {expected}, got a {type(argument).__name__}")
        return classes[argument_name]

    @classmethod
    def get_processor_dict(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> tuple[dict, dict]:
        """What `save_pretrained` wrote, or the same made of the `processor_config` in `config` or config.json."""
        processor_dict, unused = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        if "image_processor" not in processor_dict:
            config = kwargs.get("config")
            if isinstance(config, PreTrainedConfig):
                config = vars(config)
            else:
                config, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **kwargs)
            released = config.get("processor_config")
            if released is None:
                raise ValueError(
                    f"{pretrained_model_name_or_path}: expected `processor_config` in config.json, got a checkpoint "
                    "for text only; use AutoTokenizer"
                )
            processor_dict |= {
                "image_processor": MiMoV2ImageProcessor.from_processor_config(released).to_dict(),
                "video_processor": MiMoV2VideoProcessor.from_processor_config(released).to_dict(),
                "token_ids": {name: released[name] for name in TOKENS if name in released},
                "use_video_timestamps": released.get("use_video_timestamps", True),
            }
        # as of an image processor: AutoProcessor.from_pretrained(..., max_pixels=...)
        for part in ("image_processor", "video_processor"):
            known = processor_dict[part].keys() & unused.keys()
            processor_dict[part] = {**processor_dict[part], **{name: unused[name] for name in known}}
        return processor_dict, unused

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs) -> list:
        # Transformers' own would follow the released preprocessor_config.json, which names Qwen's classes
        tokenizer = cls._load_tokenizer_from_pretrained("tokenizer", pretrained_model_name_or_path, **kwargs)
        image_processor = MiMoV2ImageProcessor.from_dict(processor_dict["image_processor"])
        video_processor = MiMoV2VideoProcessor.from_dict(processor_dict["video_processor"])
        return [image_processor, tokenizer, video_processor]

    @auto_docstring(
        custom_intro="""
        Over all texts, every `<|image_pad|>` stands for the next image, and every
        `<|vision_start|><|video_pad|><|vision_end|>` for the next video.
        """
    )
    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | None = None,
        videos: VideoInput | None = None,
        audio: AudioInput | None = None,
        **kwargs,
    ) -> BatchFeature:
        r"""
        images (`ImageInput`, *optional*):
            One image, a list, or a list per text: paths, URLs, base64, bytes, PIL images, arrays or tensors.
        videos (`VideoInput`, *optional*):
            One video, a list, or a list per text: paths, URLs, bytes, frames or pairs (frames, timestamps).
        audio (`AudioInput`, *optional*):
            Not supported yet (NotImplementedError).
        kwargs (`dict`, *optional*):
            Fields of MiMoV2ImageProcessorKwargs, MiMoV2VideoProcessorKwargs and Transformers' TextKwargs, flat or in
            `images_kwargs`, `videos_kwargs` and `text_kwargs`; `timeout` in seconds for downloads.

        Returns:
            `BatchFeature`: `input_ids` and `attention_mask` [texts, tokens] (lists without `return_tensors`),
            `pixel_values` [patches, 1536], `image_grid_thw` [images, 3], `pixel_values_videos`, `video_grid_thw`.

        Raises:
            ValueError, OSError: Media that cannot be used or opened, or more or fewer of them than placeholders.
        """
        if audio is not None:
            raise NotImplementedError("audio: not supported yet, only text, images and videos")
        return self._inputs(text, Media(flatten_images(images)), Media(flatten_videos(videos)), kwargs)

    def apply_chat_template(
        self,
        conversation: list[dict] | list[list[dict]],
        chat_template: str | None = None,
        tools: list[dict | Callable] | None = None,
        tokenize: bool = False,
        return_tensors: str | None = None,
        return_dict: bool = False,
        processor_kwargs: dict | None = None,
        sanitize_control_tokens: bool = True,
        return_assistant_tokens_mask: bool = False,
        load_audio_from_video: bool = False,
        **kwargs,
    ) -> str | list[str] | list[list[int]] | torch.Tensor | BatchFeature:
        """One conversation, or a list of them, as the text or (`tokenize`) the inputs that the model was trained on.

        tools: functions, or JSON schemas of functions.
        sanitize_control_tokens: whether control tokens that a message, a tool or a template variable contains become
            plain text, so that only the template opens turns and places media. Of assistant messages, special tokens
            alone: `<think>` and `<tool_call>` are theirs. With `tokenize` only.
        kwargs: `add_generation_prompt`, `continue_final_message`, the template's `enable_thinking` and
            `keep_all_reasoning`, and whatever `__call__` takes (also in `processor_kwargs`).

        Returns text(s), `input_ids`, or with `return_dict` all inputs.

        ValueError: a message with a part that cannot be used, named by its indices. NotImplementedError: audio, and
        `return_assistant_tokens_mask`, which needs a template that marks what the assistant wrote.
        """
        if return_assistant_tokens_mask or load_audio_from_video:
            name = "return_assistant_tokens_mask" if return_assistant_tokens_mask else "load_audio_from_video"
            raise NotImplementedError(f"{name}: expected false, got true, which is not supported")
        if not conversation:
            raise ValueError("conversation: expected at least one message, got none")
        batched = not isinstance(conversation[0], dict)
        chats = with_mapped_arguments(conversation if batched else [conversation], batched)
        names = _get_template_variables(self._resolve_chat_template(chat_template)) | {
            "documents",
            "add_generation_prompt",
            "continue_final_message",
        }
        variables = {name: value for name, value in kwargs.items() if name in names}
        processor_kwargs = {**(processor_kwargs or {}), **{n: v for n, v in kwargs.items() if n not in names}}
        if not tokenize:
            _sorted_kwargs(processor_kwargs)
            texts = super().apply_chat_template(chats, chat_template, tools, **variables)
            return texts if batched else texts[0]
        chats, media = take_media(chats, batched)
        if sanitize_control_tokens:
            chats, tools, variables = mark_chats(self.tokenizer, chats, tools, variables)
            processor_kwargs["sanitize_control_tokens"] = True
        if return_tensors is not None:
            processor_kwargs["return_tensors"] = return_tensors
        texts = super().apply_chat_template(chats, chat_template, tools, **variables)
        inputs = self._inputs(texts, media["image"], media["video"], processor_kwargs)
        return inputs if return_dict else inputs["input_ids"]

    def explain(self, inputs) -> TokenLayout:
        """What each token of `inputs`, as this processor returned them, stands for; prints as a table.

        ValueError: the placeholders do not fit the grids.
        """
        return token_layout(self.tokenizer, self.token_ids, self.image_processor.merge_size, inputs)

    def parse_response(
        self, response, schema: dict | None = None, *, prefix=None, tools: list[dict | Callable] | None = None
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """The message of an answer: `role`, `content`, and `reasoning_content` and `tool_calls` where there are any.

        response: text or token ids of what was generated, or a batch: a list of them, or ids [answers, tokens].
        prefix: the prompt, one for all or one per answer; needed where it begins the answer with text of its own.
        tools: as for `apply_chat_template`; the arguments get the types that the schemas name.
        schema: a `response_template` of Transformers instead of MiMo's format.

        What counts as reasoning and calls: `MiMoV2ResponseStreamParser`, which reads the same from a stream.
        """
        if schema is not None:
            return super().parse_response(response, schema, prefix=prefix, tools=tools)
        texts, batched = self._texts(response)
        prefixes, _ = self._texts("" if prefix is None else prefix)
        if len(prefixes) not in (1, len(texts)):
            raise ValueError(f"prefix: expected 1 or {len(texts)}, one per answer, got {len(prefixes)}")
        prefixes = prefixes * len(texts) if len(prefixes) == 1 else prefixes
        messages = [parse_response(text, tools, before) for text, before in zip(texts, prefixes)]
        return messages if batched else messages[0]

    def response_stream_parser(self, tools: list[dict | Callable] | None = None, prefix=None):
        """A `MiMoV2ResponseStreamParser` for one answer as it is generated."""
        (text,), _ = self._texts("" if prefix is None else prefix)
        return MiMoV2ResponseStreamParser(tools, text)

    def _texts(self, value) -> tuple[list[str], bool]:
        """Texts of a text, ids, or a batch of either, and whether it is a batch."""
        if isinstance(value, str):
            return [value], False
        if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
            return list(value), True
        decoded = self.tokenizer.decode(value)
        return ([decoded], False) if isinstance(decoded, str) else (decoded, True)

    def _inputs(self, text, images: Media, videos: Media, kwargs: dict) -> BatchFeature:
        kwargs = _sorted_kwargs(kwargs)
        if text is None and not images.items and not videos.items:
            raise ValueError("text: expected a text, images or videos, got nothing")
        texts = [text] if isinstance(text, str) else text
        if texts is not None:
            if not isinstance(texts, (list, tuple)) or not all(isinstance(row, str) for row in texts):
                raise ValueError(f"text: expected a string or a list of strings, got {type(text).__name__}")
            _check_placeholders(texts, images.items, videos.items)
        text_kwargs = {"padding": True, **kwargs["text_kwargs"]}
        with_types = text_kwargs.pop("return_mm_token_type_ids", False)
        image_inputs = _processed(self.image_processor, images, kwargs["images_kwargs"])
        video_inputs = _processed(self.video_processor, videos, kwargs["videos_kwargs"])
        timestamps = video_inputs.pop("video_timestamps", [])
        video_inputs.pop("video_metadata", None)
        text_inputs = {}
        if texts is not None:
            image_texts = self._image_texts(image_inputs)
            expanded = _expanded(texts, image_texts, self._video_texts(video_inputs, timestamps))
            text_inputs = self.tokenizer(expanded, **text_kwargs)
            self._check_special_mm_tokens(expanded, text_inputs, modalities=["image", "video"])
            if with_types:
                text_inputs["mm_token_type_ids"] = self.create_mm_token_type_ids(text_inputs["input_ids"])
        data = {**text_inputs, **image_inputs, **video_inputs}
        return BatchFeature(data, tensor_type=text_kwargs.get("return_tensors"))

    def _image_texts(self, image_inputs: dict) -> list[str]:
        merged = self.image_processor.merge_size**2
        return [
            self.image_token * (time * height * width // merged)
            for time, height, width in image_inputs.get("image_grid_thw", torch.empty(0, 3)).tolist()
        ]

    def _video_texts(self, video_inputs: dict, timestamps: list[list[float]]) -> list[str]:
        merged = self.video_processor.merge_size**2
        texts = []
        grids = video_inputs.get("video_grid_thw", torch.empty(0, 3)).tolist()
        for (_, height, width), seconds in zip(grids, timestamps):
            frames = VISION_START + self.video_token * (height * width // merged) + VISION_END
            pairs = [f"{int(second) // 60:02d}:{int(second) % 60:02d}{frames}" for second in seconds]
            texts.append(TOKENS["video_start_token_id"] + "".join(pairs) + TOKENS["video_end_token_id"])
        return texts


def _default_chat_template() -> str:
    return (importlib.resources.files("modeling_mimo") / "data" / "chat_template.jinja").read_text(encoding="utf-8")


def _checked_token_ids(tokenizer, expected: dict[str, int]) -> dict[str, int]:
    vocab = tokenizer.get_vocab()
    missing = [token for token in TOKENS.values() if token not in vocab]
    if missing:
        raise ValueError(f"tokenizer: expected a tokenizer of MiMo-V2.5, got one without {', '.join(missing)}")
    ids = {name: vocab[token] for name, token in TOKENS.items()}
    for name, value in expected.items():
        if value != ids[name]:
            raise ValueError(
                f"{name}: expected the same in config and tokenizer, got {value} in the config and {ids[name]} "
                f"for {TOKENS[name]} in the tokenizer"
            )
    return ids


def _sorted_kwargs(kwargs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Arguments by what takes them. Transformers' `_merge_kwargs` drops unknown names with a warning only."""
    by_taker = {taker: dict(kwargs.get(taker) or {}) for taker in _KWARGS}
    for name, value in kwargs.items():
        takers = [taker for taker, names in _KWARGS.items() if name in names]
        if not takers and name not in _KWARGS:
            raise ValueError(
                f"{name}: expected an argument of the chat template or the processor, got an unknown name"
            )
        for taker in takers:
            by_taker[taker][name] = value
    return by_taker


def _processed(processor, media: Media, settings: dict) -> dict[str, Any]:
    """Media processed in one call, or one by one where some bring settings of their own."""
    if not media.items:
        return {}
    if not any(media.options):
        return dict(processor(media.items, **settings, return_tensors="pt"))
    parts = []
    for index, (item, options) in enumerate(zip(media.items, media.options)):
        # one way of sampling stands in for the other
        sampling = {"fps", "num_frames"} if options.keys() & {"fps", "num_frames"} else set()
        shared = {name: value for name, value in settings.items() if name not in sampling}
        try:
            parts.append(processor([item], **{**shared, **options}, return_tensors="pt"))
        except (ValueError, OSError) as error:
            # the processor counts within its call
            raise type(error)(str(error).replace("s[0]:", f"s[{index}]:", 1)) from error
    return {
        key: torch.cat([part[key] for part in parts])
        if isinstance(value, torch.Tensor)
        else [item for part in parts for item in part[key]]
        for key, value in parts[0].items()
    }


def _check_placeholders(texts: Sequence[str], images: list, videos: list) -> None:
    """One placeholder per medium and the other way round, before anything is decoded."""
    for kind, items in {"image": images, "video": videos, "audio": []}.items():
        found = [index for index, text in enumerate(texts) for _ in _PLACEHOLDERS[kind].finditer(text)]
        if kind == "audio" and found:
            raise NotImplementedError(f"text[{found[0]}]: audio is not supported yet, got {TOKENS['audio_token_id']}")
        if len(found) > len(items):
            index = found[len(items)]
            nth = found[: len(items)].count(index)
            raise ValueError(
                f"{kind}s: expected {len(found)}, one per placeholder in the text, got {len(items)}; "
                f"placeholder {nth} of text[{index}] has none"
            )
        if len(found) < len(items):
            raise ValueError(
                f"{kind}s[{len(found)}]: expected a placeholder in the text, got {len(found)} for {len(items)} {kind}s"
            )


def _expanded(texts: Sequence[str], images: list[str], videos: list[str]) -> list[str]:
    """`texts` with what stands for each medium in place of its placeholder."""
    for kind, replacements in {"image": images, "video": videos}.items():
        rest = list(reversed(replacements))
        texts = [_PLACEHOLDERS[kind].sub(lambda _, rest=rest: rest.pop(), text) for text in texts]
    return list(texts)

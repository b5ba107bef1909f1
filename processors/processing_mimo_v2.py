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
"""MiMoV2Processor: conversations, images, videos and sounds -> the inputs of the model; and its answers read back."""

import importlib.resources
import os
from collections.abc import Callable
from typing import Any

import torch
from transformers import BatchFeature, PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin
from transformers.audio_utils import AudioInput
from transformers.image_utils import ImageInput
from transformers.utils import CONFIG_NAME, auto_docstring
from transformers.utils.chat_template_utils import _get_template_variables
from transformers.video_utils import VideoInput

from modeling_mimo.messages_mimo_v2 import plain_chats
from modeling_mimo.unknown_names_mimo_v2 import unknown_name

from .assistant_turns_mimo_v2 import assistant_masks
from .audio_codes_mimo_v2 import AUDIO_TOKENIZER_FOLDER, HUB_KWARGS, AudioTokenizerSource, Hearing, audio_inputs
from .audio_files_mimo_v2 import flatten_audio
from .call_arguments_mimo_v2 import MiMoV2ProcessorKwargs, names_of, processed, sorted_kwargs
from .chat_mimo_v2 import Media, mark_chats, take_media
from .feature_extraction_mimo_v2 import MiMoV2FeatureExtractor
from .image_processing_mimo_v2 import MiMoV2ImageProcessor
from .loading_arguments_mimo_v2 import TOKENIZER_ARGUMENTS, check_loading_arguments
from .media_loading_mimo_v2 import TIMEOUT, flatten_images, flatten_videos
from .modeling_mimo_audio_tokenizer import MiMoAudioTokenizer
from .placeholders_mimo_v2 import AUDIO, IMAGE, TOKENS, VIDEO, check_placeholders, expanded, placeholders
from .response_parsing_mimo_v2 import MiMoV2ResponseStreamParser, parse_response
from .token_layout_mimo_v2 import TokenLayout, token_layout
from .video_processing_mimo_v2 import MiMoV2VideoProcessor
from .video_sound_mimo_v2 import Unit, video_text


PARTS = {
    "image_processor": MiMoV2ImageProcessor,
    "video_processor": MiMoV2VideoProcessor,
    "feature_extractor": MiMoV2FeatureExtractor,
}
# settings by the same name in the released `processor_config`
RELEASED_KEYS = (
    "use_video_timestamps",
    "use_per_grid_t_timestamps",
    "video_audio_interleave_length",
    "audio_group_size",
    "audio_input_id_per_second",
)


@auto_docstring(
    custom_intro="""
    Tokenizer, image processor, video processor, feature extractor and audio tokenizer of a MiMo-V2 checkpoint in one.
    Batches are padded on the left, so that generation starts behind every prompt; `padding` is on by default.
    """
)
class MiMoV2Processor(ProcessorMixin):
    valid_processor_kwargs = MiMoV2ProcessorKwargs

    def __init__(
        self,
        image_processor: MiMoV2ImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        video_processor: MiMoV2VideoProcessor,
        feature_extractor: MiMoV2FeatureExtractor | None = None,
        chat_template: str | None = None,
        token_ids: dict[str, int] | None = None,
        use_video_timestamps: bool = True,
        use_per_grid_t_timestamps: bool = False,
        video_audio_interleave_length: float = 0.0,
        audio_group_size: int = 4,
        audio_input_id_per_second: float = 25.0,
        audio_tokenizer: MiMoAudioTokenizer | None = None,
        audio_codec_source: AudioTokenizerSource | dict[str, str] | None = None,
    ):
        r"""
        token_ids (`dict[str, int]`, *optional*):
            Ids by their names in TOKENS. ValueError if the tokenizer lacks one of TOKENS or has another id for it.
        use_video_timestamps (`bool`, *optional*, defaults to `True`):
            Whether "MM:SS" stands before each pair of frames. NotImplementedError if not, which no release uses.
        use_per_grid_t_timestamps (`bool`, *optional*, defaults to `False`):
            Whether it also stands inside stretches of several pairs. NotImplementedError if so, which no release uses.
        video_audio_interleave_length (`float`, *optional*, defaults to 0.0):
            Seconds of a video whose frames come before their sound: 0 for each pair of frames with its own sound, -1
            for all frames and then all sound.
        audio_group_size (`int`, *optional*, defaults to 4):
            Code frames that become one token.
        audio_input_id_per_second (`float`, *optional*, defaults to 25.0):
            Code frames per second.
        audio_tokenizer (`MiMoAudioTokenizer`, *optional*):
            A loaded audio tokenizer.
        audio_codec_source (`dict[str, str]`, *optional*):
            Where to load it from when the first sound comes. Without either, the processor takes no sound.
        """
        for name, got, expected in (
            ("use_video_timestamps", use_video_timestamps, True),
            ("use_per_grid_t_timestamps", use_per_grid_t_timestamps, False),
        ):
            if got is not expected:
                raise NotImplementedError(f"{name}: expected {expected}, as every release has it, got {got}")
        if video_audio_interleave_length < 0 and video_audio_interleave_length != -1:
            raise ValueError(
                f"video_audio_interleave_length: expected seconds or -1, got {video_audio_interleave_length}"
            )
        chat_template = chat_template or tokenizer.chat_template or _default_chat_template()
        feature_extractor = feature_extractor or MiMoV2FeatureExtractor()
        super().__init__(image_processor, tokenizer, video_processor, feature_extractor, chat_template=chat_template)
        # pipelines pad with the tokenizer's side as well
        tokenizer.padding_side = "left"
        self.use_video_timestamps, self.use_per_grid_t_timestamps = use_video_timestamps, use_per_grid_t_timestamps
        self.video_audio_interleave_length = video_audio_interleave_length
        self.audio_group_size, self.audio_input_id_per_second = audio_group_size, audio_input_id_per_second
        source = audio_codec_source if audio_tokenizer is None else audio_tokenizer
        self.audio_codec_source = None if source is None else AudioTokenizerSource.of(source)
        self.token_ids = _checked_token_ids(tokenizer, token_ids or {})
        self.image_token, self.image_token_id = IMAGE, self.token_ids["image_token_id"]
        self.video_token, self.video_token_id = VIDEO, self.token_ids["video_token_id"]
        self.audio_token, self.audio_token_id = AUDIO, self.token_ids["audio_token_id"]

    @property
    def audio_tokenizer(self) -> MiMoAudioTokenizer | None:
        """What encodes sound, loaded when it is first asked for; None for a checkpoint that does not hear.

        OSError: the checkpoint hears, but lacks the files.
        """
        return None if self.audio_codec_source is None else self.audio_codec_source.load()

    def to_dict(self) -> dict[str, Any]:
        """As in Transformers; of the audio tokenizer only where it is."""
        output = super().to_dict()
        source = self.audio_codec_source
        return output | {"audio_codec_source": None if source is None else source.to_dict()}

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> type:
        # Transformers' own check of a video processor needs torchvision
        if argument_name not in PARTS:
            return super().check_argument_for_proper_class(argument_name, argument)
        if not isinstance(argument, PARTS[argument_name]):
            expected = PARTS[argument_name].__name__
            raise TypeError(f"{argument_name}: expected a {expected}, got a {type(argument).__name__}")
        return PARTS[argument_name]

    @classmethod
    def get_processor_dict(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> tuple[dict, dict]:
        """What `save_pretrained` wrote, or the same made of the `processor_config` in `config` or config.json.

        ValueError: an argument that nobody reads.
        """
        check_loading_arguments(kwargs, {*_setting_names(), *names_of(cls.__init__), *TOKENIZER_ARGUMENTS})
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
                **{name: part.from_processor_config(released).to_dict() for name, part in PARTS.items()},
                "token_ids": {name: released[name] for name in TOKENS if name in released},
                **{name: released[name] for name in RELEASED_KEYS if name in released},
            }
            hears = config.get("audio_config") is not None
        else:
            hears = processor_dict.get("audio_codec_source") is not None
        if hears:
            own = cls._own_audio_tokenizer(pretrained_model_name_or_path, kwargs)
            # of a processor that was saved without its checkpoint, the one that it was saved with
            if processor_dict.get("audio_codec_source") is None or own.missing_file(CONFIG_NAME) is None:
                processor_dict["audio_codec_source"] = own
        # as of an image processor: AutoProcessor.from_pretrained(..., max_pixels=...)
        for name, part in PARTS.items():
            changes = {setting: unused[setting] for setting in part.setting_names() if setting in unused}
            processor_dict[name] = {**processor_dict[name], **changes}
        return processor_dict, unused

    @staticmethod
    def _own_audio_tokenizer(name_or_path: str | os.PathLike, kwargs: dict) -> AudioTokenizerSource:
        hub_kwargs = {name: kwargs[name] for name in HUB_KWARGS if name in kwargs}
        folder = os.path.join(kwargs.get("subfolder") or "", AUDIO_TOKENIZER_FOLDER)
        return AudioTokenizerSource(name_or_path, folder, hub_kwargs)

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs) -> list:
        # Transformers' own would follow the released preprocessor_config.json, which names Qwen's classes
        # the tokenizer would keep and save them
        own = {*_setting_names(), *RELEASED_KEYS}
        tokenizer = cls._load_tokenizer_from_pretrained(
            "tokenizer",
            pretrained_model_name_or_path,
            **{name: value for name, value in kwargs.items() if name not in own},
        )
        image_processor, *others = (part.from_dict(processor_dict[name]) for name, part in PARTS.items())
        return [image_processor, tokenizer, *others]

    @auto_docstring(
        custom_intro="""
        Over all texts, every `<|image_pad|>` stands for the next image, every
        `<|vision_start|><|video_pad|><|vision_end|>` for the next video, and every `<|audio_pad|>` for the next audio.
        """
    )
    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | None = None,
        videos: VideoInput | None = None,
        audio: AudioInput | None = None,
        use_audio_in_video: bool | None = None,
        **kwargs,
    ) -> BatchFeature:
        r"""
        images (`ImageInput`, *optional*):
            One image, a list, or a list per text: paths, URLs, base64, bytes, PIL images, arrays or tensors.
        videos (`VideoInput`, *optional*):
            One video, a list, or a list per text: paths, URLs, bytes, frames or pairs (frames, timestamps).
        audio (`AudioInput`, *optional*):
            One audio, a list, or a list per text: paths, URLs, base64, bytes, arrays [samples] or [channels, samples],
            pairs (array, rate), mappings with `array` and `sampling_rate`, or `{"audio_codes": [frames, 20]}` as
            `get_audio_codes` made them before.
        use_audio_in_video (`bool`, *optional*):
            Whether the sound of videos is heard, where they have any; by default if the checkpoint hears.
        kwargs (`dict`, *optional*):
            Fields of MiMoV2ImageProcessorKwargs, MiMoV2VideoProcessorKwargs, MiMoV2AudioKwargs and Transformers'
            TextKwargs, flat or in `images_kwargs`, `videos_kwargs`, `audio_kwargs` and `text_kwargs`; `timeout` in
            seconds for downloads.

        Returns:
            `BatchFeature`: `input_ids` and `attention_mask` [texts, tokens] (lists without `return_tensors`),
            `pixel_values` [patches, 1536], `image_grid_thw` [images, 3], `pixel_values_videos`, `video_grid_thw`,
            `audio_codes` [code frames, 20] and `audio_code_lengths` [audios and videos with sound].

        Raises:
            ValueError, OSError: Media that cannot be used or opened, or more or fewer of them than placeholders.
        """
        media = {
            "image": Media(flatten_images(images)),
            "video": Media(flatten_videos(videos)),
            "audio": Media(flatten_audio(audio)),
        }
        return self._inputs(text, media, use_audio_in_video, sorted_kwargs(kwargs, names_of(self.__call__)))

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
        load_audio_from_video: Transformers' name for `use_audio_in_video=True`.
        return_assistant_tokens_mask: also return `assistant_masks`, 1 for what the model writes in its turns, its
            `<|im_end|>` included. Found by the control tokens of turns; the template needs no marks.

        Returns text(s), `input_ids`, or with `return_dict` all inputs.

        ValueError: a message with a part that cannot be used, named by its indices; a mask without `tokenize` and
        `return_dict`.
        """
        if return_assistant_tokens_mask and not (tokenize and return_dict):
            raise ValueError("return_assistant_tokens_mask: expected tokenize=True and return_dict=True with it")
        chats, batched = plain_chats(conversation)
        names = _get_template_variables(self._resolve_chat_template(chat_template)) - {"messages"}
        names |= {"add_generation_prompt", "continue_final_message"}
        variables = {name: value for name, value in kwargs.items() if name in names}
        processor_kwargs = {**(processor_kwargs or {}), **{n: v for n, v in kwargs.items() if n not in names}}
        use_sound = processor_kwargs.pop("use_audio_in_video", True if load_audio_from_video else None)
        if tokenize and return_tensors is not None:
            processor_kwargs["return_tensors"] = return_tensors
        others = {*names, *names_of(self.apply_chat_template), "use_audio_in_video"}
        by_taker = sorted_kwargs(processor_kwargs, others)
        chats, media = take_media(chats, batched, as_text=not tokenize)
        if not tokenize:
            texts = super().apply_chat_template(chats, chat_template, tools, **variables)
            return texts if batched else texts[0]
        if sanitize_control_tokens:
            chats, tools, variables = mark_chats(self.tokenizer, chats, tools, variables)
            by_taker["text_kwargs"]["sanitize_control_tokens"] = True
        texts = super().apply_chat_template(chats, chat_template, tools, **variables)
        inputs = self._inputs(texts, media, use_sound, by_taker)
        if return_assistant_tokens_mask:
            inputs["assistant_masks"] = assistant_masks(self.tokenizer, inputs, variables)
        return inputs if return_dict else inputs["input_ids"]

    def explain(self, inputs) -> TokenLayout:
        """What each token of `inputs`, as this processor returned them, stands for; prints as a table.

        ValueError: the placeholders do not fit the grids.
        """
        return token_layout(
            self.tokenizer, self.token_ids, self.image_processor.merge_size, self.audio_group_size, inputs
        )

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

    def _inputs(self, text, media: dict[str, Media], use_sound: bool | None, kwargs: dict) -> BatchFeature:
        if text is None and not any(kind.items for kind in media.values()):
            raise ValueError("text: expected a text, images, videos or audio, got nothing")
        texts = [text] if isinstance(text, str) else text
        if texts is not None:
            if not isinstance(texts, (list, tuple)) or not all(isinstance(row, str) for row in texts):
                raise ValueError(f"text: expected a string or a list of strings, got {type(text).__name__}")
            check_placeholders(texts, {kind: found.items for kind, found in media.items()})
        text_kwargs = {"padding": True, **kwargs["text_kwargs"]}
        with_types = text_kwargs.pop("return_mm_token_type_ids", False)
        hearing = self._hearing
        sounds = hearing.opened(media["audio"], kwargs["audio_kwargs"])
        image_inputs = processed(self.image_processor, media["image"], kwargs["images_kwargs"])
        video_kwargs = {**kwargs["videos_kwargs"], "return_soundtracks": hearing.wants_soundtracks(use_sound)}
        video_inputs = processed(self.video_processor, media["video"], video_kwargs)
        timestamps = video_inputs.pop("video_timestamps", [])
        soundtracks = video_inputs.pop("video_soundtracks", [None] * len(timestamps))
        video_inputs.pop("video_metadata", None)
        codes = hearing.encoded([*sounds, *hearing.of_videos(soundtracks, timestamps)])
        audio_codes, video_codes = codes[: len(sounds)], codes[len(sounds) :]
        units = list(map(hearing.units, video_codes, timestamps, soundtracks))
        video_codes = list(map(hearing.cut, video_codes, units))
        text_inputs = {}
        if texts is not None:
            replacements = {
                "image": self._image_texts(image_inputs),
                "video": self._video_texts(video_inputs, units),
                "audio": [self.audio_token * hearing.tokens(part) for part in audio_codes],
            }
            whole = expanded(texts, replacements)
            text_inputs = self.tokenizer(whole, **text_kwargs)
            self._check_special_mm_tokens(whole, text_inputs, modalities=["image", "video", "audio"])
            if with_types:
                text_inputs["mm_token_type_ids"] = self.create_mm_token_type_ids(text_inputs["input_ids"])
        order = ["audio"] * len(audio_codes) + ["video"] * len(video_codes)
        if texts is not None:
            order = [kind for _, kind in placeholders(texts)]
        data = {**text_inputs, **image_inputs, **video_inputs, **audio_inputs(audio_codes, video_codes, order)}
        return BatchFeature(data, tensor_type=text_kwargs.get("return_tensors"))

    def get_audio_codes(
        self,
        audio: AudioInput,
        sampling_rate: int | None = None,
        start: float | None = None,
        end: float | None = None,
        timeout: float = TIMEOUT,
        **kwargs,
    ) -> list[torch.Tensor]:
        """Codes [code frames, 20] of each audio, to be kept and given back as `{"audio_codes": codes}`.

        Args:
            audio: as for a call.
            start, end: seconds of each audio.

        Raises:
            ValueError, OSError: as a call.
        """
        for name in kwargs:
            raise ValueError(unknown_name(name, names_of(self.get_audio_codes), "an argument of `get_audio_codes`"))
        options = {name: value for name, value in (("start", start), ("end", end)) if value is not None}
        items = flatten_audio(audio)
        media = Media(items, [options] * len(items))
        settings = {"sampling_rate": sampling_rate, "timeout": timeout}
        return self._hearing.encoded(self._hearing.opened(media, settings))

    @property
    def _hearing(self) -> Hearing:
        return Hearing(
            self.feature_extractor, self.audio_codec_source, self.audio_group_size, self.audio_input_id_per_second
        )

    def _image_texts(self, image_inputs: dict) -> list[str]:
        merged = self.image_processor.merge_size**2
        return [
            self.image_token * (time * height * width // merged)
            for time, height, width in image_inputs.get("image_grid_thw", torch.empty(0, 3)).tolist()
        ]

    def _video_texts(self, video_inputs: dict, videos: list[list[Unit]]) -> list[str]:
        merged = self.video_processor.merge_size**2
        grids = video_inputs.get("video_grid_thw", torch.empty(0, 3)).tolist()
        return [
            video_text(units, height * width // merged, self.video_audio_interleave_length)
            for (_, height, width), units in zip(grids, videos)
        ]


def _setting_names() -> set[str]:
    return {name for part in PARTS.values() for name in part.setting_names()}


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

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
"""What `generate` needs to know about MiMo-V2: its cache, its masks, and media that are encoded once."""

import copy
import functools
import inspect
import itertools
from functools import partial

import torch
from transformers.cache_utils import Cache
from transformers.generation import GenerationConfig, GenerationMixin, GenerationMode
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import TransformersKwargs

from .cache_mimo_v2 import DEFAULT_ROLLBACK, HybridCache
from .cache_names_mimo_v2 import CACHE_NAME, rename_cache, takes_cache, with_both_names
from .configuration_mimo_v2 import MiMoV2Config
from .generation_mtp_mimo_v2 import mtp_decoding
from .unknown_names_mimo_v2 import unknown_name


# modality -> arguments of `forward` that hold its patches or frames, and the sizes of its media
MEDIA_INPUTS = {
    "image": ("pixel_values", "image_grid_thw"),
    "video": ("pixel_values_videos", "video_grid_thw"),
    "audio": ("audio_codes", "audio_code_lengths"),
}


def check_placeholders(places: torch.Tensor, modality: str, features: int) -> None:
    """Raises a `ValueError` unless `places` (bool, any shape) has exactly one place per feature row."""
    if (expected := int(places.sum())) != features:
        raise ValueError(
            f"`{MEDIA_INPUTS[modality][0]}`: expected {expected} features, one per {modality} placeholder in "
            f"`input_ids`, got {features}."
        )


def cached_length(input_ids: torch.Tensor, model_kwargs: dict, generation_config: GenerationConfig) -> int:
    """How many of the first `input_ids` [B, S] a reused cache holds: all it has if the mask is as long as the ids,
    none if the ids are only the new ones (the same rule as in Transformers' `_prefill`)."""
    cache, mask = model_kwargs.get(CACHE_NAME), model_kwargs.get("attention_mask")
    # `generate` takes away a mask of ones and leaves its length here
    length = generation_config._mask_length if mask is None else mask.shape[1]
    return cache.get_seq_length() if cache is not None and length == input_ids.shape[1] else 0


@takes_cache
def explicit_masks(
    config: MiMoV2Config,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Cache | None,
    position_ids: torch.Tensor | None = None,
    **kwargs,
) -> dict[str, torch.Tensor]:
    """Transformers' masks per layer type, [B, 1, queries, keys]: for static caches, packed sequences and 4-D masks.

    Never left out as "plain causal": that would align the first query with the first key of a static cache.
    """
    functions = {
        "full_attention": create_causal_mask,
        "sliding_attention": create_sliding_window_causal_mask,
    }
    return {
        layer_type: functions[layer_type](
            config,
            inputs_embeds,
            attention_mask,
            cache,
            position_ids=position_ids,
            allow_is_causal_skip=False,
        )
        for layer_type in dict.fromkeys(config.layer_types)
    }


def check_cache_choice(name: str | None) -> None:
    """Raises a `ValueError` for a `cache_implementation` that cannot hold sliding layers, or not on this machine."""
    if name == "quantized":
        raise ValueError(
            "`cache_implementation`: expected a cache for sliding layers, got 'quantized'; "
            "`cache=HybridCache(model.config, global_dtype=torch.float8_e4m3fn)` halves the global ones."
        )
    if name in ("offloaded", "offloaded_static") and not torch.accelerator.is_available():
        raise ValueError(
            f"`cache_implementation`: expected an accelerator for {name!r}, got none; "
            "`cache=HybridCache(model.config, offload_global=True)` works everywhere."
        )


def check_assisted(generation_config: GenerationConfig, model_kwargs: dict) -> None:
    """Raises a `ValueError` for drafts of a model or of the prompt where Transformers gives wrong tokens or fails."""
    cache = model_kwargs.get(CACHE_NAME)
    if cache is not None and (cached := cache.get_seq_length()) > 0:
        raise ValueError(
            "`cache`: expected an empty cache with `assistant_model` or `prompt_lookup_num_tokens`, got "
            f"{cached} tokens, which Transformers would feed again; `use_mtp=True` goes on from a cache."
        )
    if generation_config.assistant_early_exit is not None:
        raise ValueError(
            "`assistant_early_exit`: expected a model trained with early exits, which MiMo is not; `use_mtp=True` "
            "drafts with its own heads."
        )
    is_static = cache is not None and cache.is_compileable
    if is_static or generation_config.cache_implementation not in (None, "dynamic"):
        raise ValueError(
            "`cache_implementation`: expected none with `assistant_model` or `prompt_lookup_num_tokens`, since "
            "rejected drafts have to be taken back."
        )
    drafts = generation_config.prompt_lookup_num_tokens or 1
    if isinstance(cache, HybridCache) and cache.max_rollback < drafts:
        raise ValueError(
            f"`cache`: expected a HybridCache with `max_rollback` of at least {drafts}, got {cache.max_rollback}."
        )


class MiMoV2GenerationMixin(GenerationMixin):
    """`generate` with a `HybridCache` by default, and with media that are encoded before the prefill."""

    create_masks_for_generate = staticmethod(explicit_masks)

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args,
        use_mtp: bool | None = None,
        mtp_depth: int | str | None = None,
        **kwargs,
    ):
        """As in Transformers, whose own `use_mtp` chains the heads and feeds them normed states, which MiMo's are not
        made for. The cache is `cache` or `past_key_values`, on either line of Transformers.

        Args:
            use_mtp: draft with the MTP heads of the checkpoint and verify: the same tokens, or the same distribution
                when sampling, in fewer forwards. Any batch, padded on the left.
            mtp_depth: drafts per step; None for one of each head; "auto" for as many as pay on this run, which may
                be none.

        Raises:
            ValueError: as in Transformers, for what drafting cannot do (see `check_mtp`), and for an argument that
                nobody reads.
        """
        if not isinstance(generation_config, (GenerationConfig, type(None))):
            got = type(generation_config).__name__
            raise ValueError(f"`generation_config`: expected a GenerationConfig, got {got}.")
        kwargs, given = rename_cache(kwargs), generation_config
        defaults = [config.use_mtp for config in (given, self.generation_config) if config is not None]
        if any(defaults) and given is None:
            kwargs["use_mtp"] = False
        elif any(defaults):
            # on a copy: an argument beside a config is deprecated
            generation_config = copy.deepcopy(given)
            generation_config.use_mtp = False
        if not next((choice for choice in (use_mtp, *defaults) if choice is not None), False):
            if mtp_depth is not None:
                raise ValueError(f"`mtp_depth`: expected `use_mtp=True` with it, got {mtp_depth!r} alone.")
            return with_both_names(super().generate(inputs, generation_config, *args, **kwargs))
        for name in ("assistant_model", "custom_generate"):
            if kwargs.get(name) is not None:
                raise ValueError(f"`{name}`: expected nothing beside `use_mtp`, got both.")
        decoding = partial(mtp_decoding, mtp_depth=self.config.num_mtp_layers if mtp_depth is None else mtp_depth)
        return super().generate(inputs, generation_config, *args, custom_generate=decoding, **kwargs)

    # its signature says which arguments `generate` takes
    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, *args, tokenizer=None, **kwargs):
        # what stop strings were made of; Transformers hands it on to `forward`
        return super().prepare_inputs_for_generation(*args, **kwargs)

    def _validate_model_kwargs(self, model_kwargs):
        functions = (self.forward, self.prepare_inputs_for_generation)
        known = {name for function in functions for name in inspect.signature(function).parameters}
        known |= TransformersKwargs.__annotations__.keys()
        for name, value in model_kwargs.items():
            if name not in known and value is not None:
                options = {*inspect.signature(super().generate).parameters, *GenerationConfig().to_dict(), "mtp_depth"}
                raise ValueError(unknown_name(name, known | options, "an argument of `generate`"))
        super()._validate_model_kwargs(model_kwargs)

    def _extract_generation_mode_kwargs(self, custom_generate, *args, **kwargs):
        # Transformers gives a decoding function of others neither the streamer nor the tokenizer of stop strings
        is_ours = isinstance(custom_generate, partial) and custom_generate.func is mtp_decoding
        return super()._extract_generation_mode_kwargs(None if is_ours else custom_generate, *args, **kwargs)

    def init_continuous_batching(self, *args, **kwargs):
        # also behind `generate_batch` and `continuous_batching_context_manager`, which end in a failed request
        raise ValueError(
            "continuous batching: expected layers of one shape of keys and values, got two; `generate` takes a padded "
            "batch, vLLM and SGLang serve many requests."
        )

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        check_cache_choice(generation_config.cache_implementation)
        if generation_mode == GenerationMode.ASSISTED_GENERATION:
            check_assisted(generation_config, model_kwargs)
        # the default cache of this model; a cache or a cache_implementation that the user names is left alone
        wanted = generation_config.use_cache is not False and generation_config.cache_implementation is None
        if wanted and model_kwargs.get(CACHE_NAME) is None:
            # all drafts from the prompt may be rejected at once
            most = max(DEFAULT_ROLLBACK, generation_config.prompt_lookup_num_tokens or 0)
            model_kwargs[CACHE_NAME] = HybridCache(self.config, max_rollback=most)
        else:
            super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
        self.check_static_shapes(generation_config, model_kwargs.get(CACHE_NAME), max_cache_length)

    def check_static_shapes(self, generation_config: GenerationConfig, cache: Cache | None, length: int) -> None:
        """Raises a `ValueError` for a static cache beyond the positions, which a compiled step would not notice, and
        for a `compile_config` with a cache whose shapes change."""
        is_static = cache is not None and cache.is_compileable
        if is_static and length > self.config.max_position_embeddings:
            raise ValueError(
                f"context: expected at most max_position_embeddings={self.config.max_position_embeddings} tokens in a "
                f"static cache, got {length}."
            )
        if generation_config.compile_config is not None and not is_static:
            got = "no cache" if cache is None else type(cache).__name__
            raise ValueError(
                f"`compile_config`: expected `cache_implementation='static'` with it, got {got}, whose shapes change."
            )

    def _valid_auto_compile_criteria(self, model_kwargs, generation_config):
        if generation_config.compile_config is not None:
            # who asks for it gets it on a CPU too, where Transformers wants this flag of its own
            generation_config.compile_config._compile_all_devices = True
        return super()._valid_auto_compile_criteria(model_kwargs, generation_config)

    def _maybe_prepare_encoder_kwargs_for_generation(
        self, inputs_tensor, model_kwargs, model_input_name, generation_config
    ):
        """Replaces patches and codes by `mm_encoder_outputs`: chunked prefills and beams then find the features ready.

        Transformers' own version looks for the towers in the text backbone, knows no audio, and would encode again
        what a reused cache holds already.
        """
        if model_input_name != "input_ids":
            return model_kwargs
        cached = cached_length(inputs_tensor, model_kwargs, generation_config)
        outputs = dict(model_kwargs.get("mm_encoder_outputs") or {})
        for modality, (data_name, sizes_name) in MEDIA_INPUTS.items():
            data, sizes = model_kwargs.pop(data_name, None), model_kwargs.pop(sizes_name, None)
            if modality in outputs:
                if data is not None:
                    raise ValueError(f"`{data_name}`: expected nothing beside {modality} features, got both.")
                continue
            places = self.placeholders(inputs_tensor, modality)
            if data is not None:
                output = self.encode_new_media(modality, data, sizes, places, cached)
                outputs |= {modality: output} if output.pooler_output else {}
            else:
                check_placeholders(places[:, cached:], modality, 0)
        model_kwargs["mm_encoder_outputs"] = outputs
        return model_kwargs

    def _expand_multimodal_outputs(self, input_ids, mm_encoder_output, expand_size=1, inputs_embeds=None):
        """Features for `expand_size` copies of each row of `input_ids`; Transformers' own version knows no audio."""
        for modality, output in mm_encoder_output.items():
            features = torch.cat(list(output.pooler_output))
            tokens = self.placeholders(input_ids, modality).sum(-1).tolist()
            # a single row may have placeholders in a reused cache, whose features are not among these
            rows = [features]
            if len(tokens) > 1:
                check_placeholders(self.placeholders(input_ids, modality), modality, len(features))
                rows = features.split(tokens)
            output.pooler_output = [row for row in rows for _ in range(expand_size)]
        return mm_encoder_output

    def placeholders(self, input_ids: torch.Tensor, modality: str) -> torch.Tensor:
        """Where `input_ids` wait for features of "image", "video" or "audio", [B, S] bool."""
        part = self.config.audio_config if modality == "audio" else self.config.vision_config
        # CODEPATH: V2.5 and V2.6 see and hear; V2.5-Pro and V2-Flash have no placeholders
        if part is None:
            return torch.zeros_like(input_ids, dtype=torch.bool)
        return input_ids == getattr(self.config, f"{modality}_token_id")

    def media_sizes(self, modality: str, sizes: torch.Tensor) -> tuple[list[int], list[int]]:
        """Rows of the input and tokens of each medium: patches of an image or video, frames of an audio."""
        if modality == "audio":
            return sizes.tolist(), (-(-sizes // self.config.audio_config.group_size)).tolist()
        patches = sizes.prod(-1)
        return patches.tolist(), (patches // self.config.vision_config.spatial_merge_size**2).tolist()

    def encode_new_media(self, modality: str, data: torch.Tensor, sizes: torch.Tensor | None, places, cached: int):
        """Features of the media whose placeholders are not all among the first `cached` tokens.

        A medium that straddles the end of the cache is encoded whole, and only its missing rows are kept.
        """
        self.check_media(modality, data, sizes)
        rows, tokens = self.media_sizes(modality, sizes)
        # before minutes are spent on encoding
        check_placeholders(places, modality, sum(tokens))
        if cached == 0:
            return self.encode_media(modality, data, sizes)
        # placeholders in reading order, and whether each is new
        is_new = [part >= cached for part in places.nonzero()[:, 1].split(tokens)]
        wanted = [bool(part.any()) for part in is_new]
        if not any(wanted):
            return BaseModelOutputWithPooling(pooler_output=[])
        output = self.encode_media(
            modality,
            torch.cat(list(itertools.compress(data.split(rows), wanted))),
            sizes[torch.tensor(wanted, dtype=torch.bool, device=sizes.device)],
        )
        kept = itertools.compress(is_new, wanted)
        output.pooler_output = [
            features[part.to(features.device)] for features, part in zip(output.pooler_output, kept)
        ]
        return output


__all__ = ["MiMoV2GenerationMixin"]

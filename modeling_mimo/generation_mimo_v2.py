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

import itertools

import torch
from transformers.cache_utils import Cache
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .cache_mimo_v2 import HybridCache
from .configuration_mimo_v2 import MiMoV2Config


# modality -> arguments of `forward` that hold its patches and grids
MEDIA_INPUTS = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}


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
    cache, mask = model_kwargs.get("past_key_values"), model_kwargs.get("attention_mask")
    # `generate` takes away a mask of ones and leaves its length here
    length = generation_config._mask_length if mask is None else mask.shape[1]
    return cache.get_seq_length() if cache is not None and length == input_ids.shape[1] else 0


def explicit_masks(
    config: MiMoV2Config,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_key_values: Cache | None,
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
            config=config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
            allow_is_causal_skip=False,
        )
        for layer_type in dict.fromkeys(config.layer_types)
    }


class MiMoV2GenerationMixin(GenerationMixin):
    """`generate` with a `HybridCache` by default, and with images and videos that are encoded before the prefill."""

    create_masks_for_generate = staticmethod(explicit_masks)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        # the default cache of this model; a cache or a cache_implementation that the user names is left alone
        wanted = generation_config.use_cache is not False and generation_config.cache_implementation is None
        if wanted and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = HybridCache(self.config)
            return
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    def _maybe_prepare_encoder_kwargs_for_generation(
        self, inputs_tensor, model_kwargs, model_input_name, generation_config
    ):
        """Replaces pixels by `mm_encoder_outputs`: a chunked prefill and beams then find the features ready.

        Transformers' own version looks for the tower in the text backbone, and would encode again what a reused cache
        holds already.
        """
        if model_kwargs.get("mm_encoder_outputs") or model_input_name != "input_ids":
            return model_kwargs
        cached = cached_length(inputs_tensor, model_kwargs, generation_config)
        outputs = {}
        for modality, (pixels_name, grid_name) in MEDIA_INPUTS.items():
            pixels, grid_thw = model_kwargs.pop(pixels_name, None), model_kwargs.pop(grid_name, None)
            places = self.placeholders(inputs_tensor, modality)
            if pixels is not None:
                output = self.encode_new_media(modality, pixels, grid_thw, places, cached)
                outputs |= {modality: output} if output.pooler_output else {}
            elif places is not None:
                check_placeholders(places[:, cached:], modality, 0)
        model_kwargs["mm_encoder_outputs"] = outputs
        return model_kwargs

    def placeholders(self, input_ids: torch.Tensor, modality: str) -> torch.Tensor | None:
        """Where `input_ids` wait for features of "image" or "video", [B, S] bool; None without a vision config."""
        if self.config.vision_config is None:
            return None
        return input_ids == (self.config.image_token_id if modality == "image" else self.config.video_token_id)

    def encode_new_media(self, modality, pixels, grid_thw, places, cached: int):
        """Features of the media whose placeholders are not all among the first `cached` tokens.

        A medium that straddles the end of the cache is encoded whole, and only its missing rows are kept.
        """
        encode = self.get_image_features if modality == "image" else self.get_video_features
        if places is None or grid_thw is None:
            # raises, and says why
            return encode(pixels, grid_thw)
        tokens = (grid_thw.prod(-1) // self.config.vision_config.spatial_merge_size**2).tolist()
        # before minutes are spent on encoding
        check_placeholders(places, modality, sum(tokens))
        if cached == 0:
            return encode(pixels, grid_thw)
        # placeholders in reading order, and whether each is new
        is_new = [part >= cached for part in places.nonzero()[:, 1].split(tokens)]
        wanted = [bool(part.any()) for part in is_new]
        if not any(wanted):
            return BaseModelOutputWithPooling(pooler_output=[])
        patches = pixels.split(grid_thw.prod(-1).tolist())
        output = encode(
            torch.cat([pixels[:0], *itertools.compress(patches, wanted)]),
            grid_thw[torch.tensor(wanted, dtype=torch.bool, device=grid_thw.device)],
        )
        kept = itertools.compress(is_new, wanted)
        output.pooler_output = [
            features[part.to(features.device)] for features, part in zip(output.pooler_output, kept)
        ]
        return output


__all__ = ["MiMoV2GenerationMixin"]

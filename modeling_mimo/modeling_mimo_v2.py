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
"""The MiMo-V2 model: embeddings, decoder stack, head, and how a checkpoint gets into them."""

import os

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.masking_utils import find_packed_sequence_indices
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import PreTrainedModel, slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .adapters_mimo_v2 import MiMoV2AdaptersMixin, base_of_adapter, check_peft_suits, load_adapter_tensors
from .cache_mimo_v2 import HybridCache
from .cache_names_mimo_v2 import CACHE_NAME, CACHE_NAMES, takes_cache
from .checkpoint_mimo_v2 import Checkpoint, check_file_names, check_tensors, take_mtp_layers_from_files
from .configuration_mimo_v2 import QUANT_METHOD, MiMoV2Config
from .generation_mimo_v2 import MEDIA_INPUTS, MiMoV2GenerationMixin, check_placeholders, explicit_masks
from .lazy_weights_mimo_v2 import lazy_weights
from .modeling_mimo_v2_audio import GROUPS_PER_STEP, MiMoV2AudioEncoder, MiMoV2SpeechEmbeddings
from .modeling_mimo_v2_base import MiMoV2RMSNorm
from .modeling_mimo_v2_mtp import (
    MiMoV2CausalLMOutputWithPast,
    MiMoV2ModelOutputWithPast,
    MiMoV2MTP,
    MiMoV2MTPTrainingMixin,
)
from .modeling_mimo_v2_text import (
    MiMoV2Attention,
    MiMoV2DecoderLayer,
    MiMoV2Experts,
    MiMoV2RotaryEmbedding,
    MiMoV2Router,
)
from .modeling_mimo_v2_vision import MiMoV2VisionAttention, MiMoV2VisionModel, MiMoV2VisionRotaryEmbedding
from .offload_mimo_v2 import MiMoV2OffloadMixin, check_device_map, load_beside_disk
from .parallel_mimo_v2 import MiMoV2ParallelMixin
from .quantization_bnb_mimo_v2 import check_saveable, choose_quantization, float_weights, is_saved_quantized
from .quantization_mimo_v2 import check_scales
from .saved_bnb_mimo_v2 import check_saved_tensors, scale_bytes
from .switches_mimo_v2 import SINK_KERNELS, MiMoV2SwitchesMixin
from .unknown_names_mimo_v2 import refuses_unknown_names
from .weight_mapping_mimo_v2 import expert_conversions, released_tensors, weight_name


logger = logging.get_logger(__name__)

# Transformers' arguments that no signature here names, of the loss, the recorded outputs, flash kernels and debugging
PASSED_ON = (
    *("num_items_in_batch", "shift_labels"),
    *("output_attentions", "output_hidden_states", "output_router_logits"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
    *("debug_io", "debug_io_dir", "prune_layers"),
)
MEDIA_NAMES = tuple(name for names in MEDIA_INPUTS.values() for name in names)


@auto_docstring
class MiMoV2PreTrainedModel(
    MiMoV2ParallelMixin, MiMoV2OffloadMixin, MiMoV2SwitchesMixin, MiMoV2AdaptersMixin, PreTrainedModel
):
    config: MiMoV2Config
    base_model_prefix = "model"
    input_modalities = ("image", "video", "audio", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = [
        "MiMoV2DecoderLayer",
        "MiMoV2MTPLayer",
        "MiMoV2VisionBlock",
        "MiMoV2AudioLayer",
        "MiMoV2SpeechEmbeddings",
    ]
    _skip_keys_device_placement = list(CACHE_NAMES)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = False
    _supports_attention_backend = True
    _compatible_flash_implementations = SINK_KERNELS
    # a CheckpointReport after `from_pretrained`
    load_report = None
    _can_record_outputs = {
        "hidden_states": MiMoV2DecoderLayer,
        "attentions": MiMoV2Attention,
        "router_logits": OutputRecorder(MiMoV2Router, index=0),
    }

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, MiMoV2Router):
            init.normal_(module.weight, mean=0.0, std=std)
            init.zeros_(module.e_score_correction_bias)
        elif isinstance(module, MiMoV2Experts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, MiMoV2Attention) and module.attention_sink_bias is not None:
            init.zeros_(module.attention_sink_bias)
        elif isinstance(module, MiMoV2VisionAttention) and module.sinks is not None:
            init.zeros_(module.sinks)
        elif isinstance(module, MiMoV2VisionRotaryEmbedding):
            init.copy_(module.inv_freq, module.inverse_frequencies())
        elif isinstance(module, MiMoV2RotaryEmbedding):
            for layer_type in module.layer_types:
                init.copy_(getattr(module, f"{layer_type}_inv_freq"), module.inverse_frequencies(layer_type))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args, **kwargs):
        """As in Transformers; `quantization_config` may differ from what the checkpoint is stored in."""
        if kwargs.get("use_safetensors") is False:
            raise ValueError("`use_safetensors`: expected None or True, got False: pickles are never read.")
        base = base_of_adapter(pretrained_model_name_or_path, kwargs)
        if kwargs.get("quantization_config") is not None:
            kwargs = choose_quantization(cls.config_class, base, kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes as in Transformers, with the scales that bitsandbytes keeps beside the parameters."""
        return super().get_memory_footprint(return_buffers) + scale_bytes(self)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs):
        """As in Transformers, with a warning for the parts of the checkpoint that are not in the saved folder."""
        if self._hf_peft_config_loaded:
            check_peft_suits("save_pretrained")
        check_saveable(vars(self).get("hf_quantizer"))
        if kwargs.get("save_original_format") is False:
            raise ValueError(
                "`save_original_format`: expected True, got False: `from_pretrained` checks the released names."
            )
        if self.load_report is not None and self.load_report.not_loaded:
            parts = ", ".join(f"{part} ({count} tensors)" for part, count in self.load_report.not_loaded.items())
            logger.warning(f"Not in {save_directory}, because they were left in the files: {parts}.")
        dtype = self.config.dtype
        super().save_pretrained(save_directory, *args, **kwargs)
        # Transformers leaves the name of the dtype here, which its MTP generation then takes for a dtype
        self.config.dtype = dtype

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys=None):
        """Checks every tensor of the files by name, shape and dtype before the first one is read.

        Transformers would report a missing or unknown tensor in a log line and go on with random weights.
        """
        if model._hf_peft_config_loaded:
            # set by `load_adapter` alone, which calls this on a model that is loaded already
            return load_adapter_tensors(model, state_dict, checkpoint_files, load_config, expected_keys)
        if state_dict is None and checkpoint_files:
            # whatever the files are called: a pickle, or a name outside the folder, must not get any further
            check_file_names((load_config.sharded_metadata or {}).get("weight_map", {}))
            checkpoint = Checkpoint.from_files(checkpoint_files)
            # the backbone alone, and a model loaded with load_towers=False, have no place for the towers
            text_only = not isinstance(model, MiMoV2ForCausalLM) or not model.config.load_towers
            left_out = ("vision", "audio") if text_only else ()
            if isinstance(model, MiMoV2Model):
                # a folder that a backbone saved has none
                left_out = (*left_out, "lm_head.weight")
            if not model.config.load_mtp:
                left_out = ("mtp", *left_out)
            take_mtp_layers_from_files(model.config, checkpoint.tensors)
            model.base_model.drop_missing_mtp_layers()
            if load_config.device_map is not None:
                check_device_map(model, load_config.device_map)
            if is_saved_quantized(load_config.hf_quantizer):
                model.load_report, names = check_saved_tensors(model, checkpoint.tensors, left_out)
                state_dict = {name: part for name, part in checkpoint.slices().items() if name in names}
                return PreTrainedModel._load_pretrained_model(
                    model, state_dict, checkpoint_files, load_config, expected_keys
                )
            report = check_tensors(model.config, checkpoint.tensors, left_out)
            if (report.fp8 or report.mxfp4) and load_config.hf_quantizer is None:
                raise ValueError("`quantization_config`: expected an entry in config.json for FP8 weights, got none.")
            slices = checkpoint.slices()
            check_scales(slices)
            quantizer = load_config.hf_quantizer
            keeps_released = quantizer is not None and quantizer.quantization_config.quant_method == QUANT_METHOD
            if report.layout == "plain":
                model.config.fused_qkv_layout = "plain"
                if keeps_released:
                    quantizer.set_plain_layout(model)
            targets = released_tensors(model.config, "plain" if report.layout == "plain" else "chunked")
            state_dict = {
                name: part for name, part in slices.items() if targets[weight_name(name)].part not in left_out
            }
            if model.is_distributed_loading_by_transformers:
                model.check_shared_layout(report.layout)
                state_dict = lazy_weights(state_dict, targets, model.state_dict())
            if quantizer is not None and not keeps_released:
                state_dict = float_weights(state_dict, targets, load_config.dtype)
            model.load_report = report
            logger.info(str(report))
            if load_config.device_map is not None and "disk" in load_config.device_map.values():
                return load_beside_disk(model, state_dict, checkpoint_files, load_config, expected_keys)
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys)


def check_checkpointing(cache: Cache | None) -> None:
    """What layers that run twice may fill: no cache, since they would append twice.

    ValueError: the cache has tokens, which attention would miss.
    """
    # Transformers 5.23 takes a cache away from layers by its older name alone
    if cache is not None and (cached := cache.get_seq_length()) > 0:
        raise ValueError(f"`cache`: expected none in gradient checkpointing, got {cached} cached tokens.")
    if cache is not None:
        logger.warning_once("`cache` stays empty in gradient checkpointing.")


@auto_docstring
class MiMoV2Model(MiMoV2PreTrainedModel):
    """Token embeddings, decoder layers and final norm, and the MTP heads, which `forward` runs on demand alone."""

    def __init__(self, config: MiMoV2Config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([MiMoV2DecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = MiMoV2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = MiMoV2RotaryEmbedding(config)
        # CODEPATH: three in every release, none in some re-exports
        self.mtp = MiMoV2MTP(config) if config.num_mtp_layers > 0 and config.load_mtp else None
        self.gradient_checkpointing = False
        self._keep_in_fp32_modules_strict = ["e_score_correction_bias"]
        # CODEPATH: V2.6 ships a bfloat16 router and computes it so; the others ship and need float32
        if config.moe_router_dtype == "float32":
            self._keep_in_fp32_modules_strict.append("mlp.gate.weight")
        self.post_init()

    def save_pretrained(self, save_directory: str | os.PathLike, *args, state_dict: dict | None = None, **kwargs):
        """As in Transformers, under the names of a whole checkpoint; a `MiMoV2Model` alone can read it again."""
        if self._hf_peft_config_loaded:
            # the adapter, which has names of its own
            return super().save_pretrained(save_directory, *args, state_dict=state_dict, **kwargs)
        tensors = self.state_dict() if state_dict is None else state_dict
        prefixed = {f"{self.base_model_prefix}.{name}": tensor for name, tensor in tensors.items()}
        super().save_pretrained(save_directory, *args, state_dict=prefixed, **kwargs)

    def drop_missing_mtp_layers(self) -> None:
        """Leaves `config.num_mtp_layers` heads, after the files turned out to have no more."""
        if self.mtp is not None:
            del self.mtp.layers[self.config.num_mtp_layers :]
            self.mtp = self.mtp if len(self.mtp.layers) else None

    def check_mtp_training(self, cache: Cache | None) -> None:
        """Raises a `ValueError` for heads that are not there, or that lack the states behind a cache."""
        if self.mtp is None:
            raise ValueError("`mtp_loss_weight`: expected a model with MTP heads, got one without.")
        if cache is not None and (cached := cache.get_seq_length()) > 0:
            raise ValueError(f"`cache`: expected none with `mtp_loss_weight`, got {cached} cached tokens.")

    def layer_masks(
        self,
        attention_mask: torch.Tensor | dict | None,
        inputs_embeds: torch.Tensor,
        cache: Cache | None,
        position_ids: torch.Tensor | None,
    ) -> dict[str, torch.Tensor | None]:
        """What attention needs to know per layer type: which keys are real, [B, keys] bool, or None for all of them.

        Packed sequences, static caches and 4-D masks get Transformers' explicit mask [B, 1, queries, keys] instead.
        """
        if isinstance(attention_mask, dict):
            # `generate` has built the masks of a static cache already
            return attention_mask
        static = cache is not None and cache.is_compileable
        if static or (attention_mask is not None and attention_mask.dim() == 4):
            return explicit_masks(self.config, inputs_embeds, attention_mask, cache, position_ids)
        past_length = 0 if cache is None else cache.get_seq_length()
        packed = None
        if position_ids is not None and attention_mask is None and past_length == 0:
            packed = find_packed_sequence_indices(position_ids)
        if packed is not None:
            # given a cache, even an empty one, Transformers' mask functions do not look for packed sequences
            return explicit_masks(self.config, inputs_embeds, attention_mask, None, position_ids)
        if attention_mask is None:
            return dict.fromkeys(self.config.layer_types)
        queries = inputs_embeds.shape[1]
        expected = (inputs_embeds.shape[0], past_length + queries)
        if attention_mask.shape != expected:
            raise ValueError(
                f"`attention_mask`: expected [batch, cached + new tokens] = {list(expected)}, "
                f"got {list(attention_mask.shape)}."
            )
        # without padding the kernels need no mask at all
        if attention_mask.all():
            return dict.fromkeys(self.config.layer_types)
        masks = {}
        for index, layer_type in enumerate(self.config.layer_types):
            if layer_type not in masks:
                length, offset = queries, 0
                if cache is not None:
                    length, offset = cache.get_mask_sizes(queries, index)
                masks[layer_type] = attention_mask[:, offset : offset + length].bool()
        return masks

    def check_lengths(self, cache: Cache | None, queries: int) -> None:
        """Raises a `ValueError` for a cache of another config, too long a context, or a trace of one prompt."""
        if torch.jit.is_tracing():
            raise ValueError("`torch.jit.trace`: expected `torch.export`, since a trace keeps one prompt's branches.")
        if isinstance(cache, HybridCache):
            cache.check_config(self.config)
        # `generate` has compared the longest sequence with the positions before the first compiled step
        if torch.compiler.is_compiling():
            return
        past_length = 0 if cache is None else cache.get_seq_length()
        if past_length + queries > self.config.max_position_embeddings:
            raise ValueError(
                f"context: expected at most max_position_embeddings={self.config.max_position_embeddings} tokens, "
                f"got {past_length} cached + {queries} new."
            )

    @merge_with_config_defaults
    @capture_outputs
    @auto_docstring
    @takes_cache
    # TRL's distillation gives the backbone `logits_to_keep` too, and cuts the hidden states itself
    @refuses_unknown_names(*PASSED_ON, *MEDIA_NAMES, "logits_to_keep")
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        run_mtp: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MiMoV2ModelOutputWithPast:
        """
        Args:
            input_ids: [B, S] token ids, or `inputs_embeds` [B, S, hidden] instead.
            attention_mask: [B, cached + S], 0 for padding on either side; fully padded rows are allowed.
            position_ids: [B, S]; plain 1-D positions for every modality.
            cache (`Cache`, *optional*): a `HybridCache` or any Transformers cache, also by its older name
                `past_key_values`; made here when `use_cache` asks for one.
            run_mtp (`bool`, *optional*, defaults to `False`): run the MTP heads too, for training.

        Returns:
            `last_hidden_state` [B, S, hidden] after the final norm, the cache, and `mtp_hidden_states` of the heads.

        Raises:
            ValueError: both or neither of `input_ids` and `inputs_embeds`; media; a mask of another shape; a cache of
                another config; a context beyond `max_position_embeddings`; `run_mtp` without heads, or behind a cache
                whose states the heads have not seen; a cache with tokens in gradient checkpointing; packed sequences
                without positions; an argument that nobody reads.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("`input_ids`, `inputs_embeds`: expected exactly one of the two.")
        if media := [name for name in MEDIA_NAMES if kwargs.get(name) is not None]:
            raise ValueError(
                f"`{media[0]}`: expected text alone, got media, which MiMoV2ForCausalLM takes; with TRL use "
                "modeling_mimo.training.MiMoV2SFTTrainer."
            )
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            cache = check_checkpointing(cache)
        elif use_cache and cache is None:
            cache = HybridCache(self.config)
        if kwargs.get("cu_seq_lens_q") is not None and position_ids is None:
            raise ValueError("`position_ids`: expected positions that restart with each packed sequence, got none.")
        self.check_lengths(cache, inputs_embeds.shape[1])
        if run_mtp:
            self.check_mtp_training(cache)
        masks = self.layer_masks(attention_mask, inputs_embeds, cache, position_ids)
        if position_ids is None:
            past_length = 0 if cache is None else cache.get_seq_length()
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None] + past_length
        rotary = {
            layer_type: self.rotary_emb(inputs_embeds, position_ids, layer_type)
            for layer_type in dict.fromkeys(self.config.layer_types)
        }
        hidden_states = inputs_embeds
        for layer, layer_type in zip(self.layers, self.config.layer_types):
            hidden_states = layer(
                hidden_states,
                position_embeddings=rotary[layer_type],
                attention_mask=masks[layer_type],
                cache=cache,
                **kwargs,
            )
        mtp_hidden_states = None
        if run_mtp:
            mtp_hidden_states = self.mtp(
                inputs_embeds,
                hidden_states,
                position_embeddings=rotary["sliding_attention"],
                attention_mask=masks["sliding_attention"],
            )
        return MiMoV2ModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states),
            **{CACHE_NAME: cache if use_cache else None},
            mtp_hidden_states=mtp_hidden_states,
        )


@auto_docstring
class MiMoV2ForCausalLM(MiMoV2PreTrainedModel, MiMoV2GenerationMixin, MiMoV2MTPTrainingMixin):
    """MiMo-V2 with its language-model head.

    ```python
    >>> import modeling_mimo
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer

    >>> model = AutoModelForCausalLM.from_pretrained("path/to/MiMo-V2.5", device_map="auto")
    >>> tokenizer = AutoTokenizer.from_pretrained("path/to/MiMo-V2.5")
    >>> inputs = tokenizer("The quick brown fox", return_tensors="pt").to(model.device)
    >>> print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))
    ```
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {
        "lm_head": "keep_full_weight",
        "visual.blocks.*": "free_full_weight",
        "audio_encoder.input_local_transformer.layers.*": "free_full_weight",
    }

    def __init__(self, config: MiMoV2Config):
        super().__init__(config)
        self.model = MiMoV2Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # CODEPATH: V2.5 and V2.6 see and hear, V2.5-Pro and V2-Flash have no vision_config and no audio_config
        sees = config.vision_config is not None and config.load_towers
        self.visual = MiMoV2VisionModel(config.vision_config) if sees else None
        hears = config.audio_config is not None and config.load_towers
        self.speech_embeddings = MiMoV2SpeechEmbeddings(config.audio_config) if hears else None
        self.audio_encoder = MiMoV2AudioEncoder(config.audio_config) if hears else None
        self.post_init()

    @can_return_tuple
    @auto_docstring
    @refuses_unknown_names()
    def get_image_features(
        self, pixel_values: torch.Tensor, image_grid_thw: torch.LongTensor, **kwargs
    ) -> BaseModelOutputWithPooling:
        """
        Args:
            pixel_values: [patches, channels * temporal_patch_size * patch_size**2], as the image processor makes them.
            image_grid_thw: [images, 3], frames / 2, rows and columns of patches.

        Returns:
            `pooler_output`: one tensor per image, [t * h * w / spatial_merge_size**2, hidden], in reading order.

        Raises:
            ValueError: the model has no vision tower; patches and grids do not fit together.
        """
        return self.encode_media("image", pixel_values, image_grid_thw)

    @can_return_tuple
    @auto_docstring
    @refuses_unknown_names()
    def get_video_features(
        self, pixel_values_videos: torch.Tensor, video_grid_thw: torch.LongTensor, **kwargs
    ) -> BaseModelOutputWithPooling:
        """`get_image_features` for videos; no attention between their temporal grids."""
        return self.encode_media("video", pixel_values_videos, video_grid_thw)

    @can_return_tuple
    @auto_docstring
    @refuses_unknown_names()
    def get_audio_features(
        self, audio_codes: torch.LongTensor, audio_code_lengths: torch.LongTensor, **kwargs
    ) -> BaseModelOutputWithPooling:
        """
        Args:
            audio_codes (`torch.LongTensor` of shape `(frames, audio_channels)`): codes of the audio tokenizer, audios
                one after the other.
            audio_code_lengths (`torch.LongTensor` of shape `(audios,)`): frames of each audio.

        Returns:
            `pooler_output`: one tensor per audio, [ceil(frames / group_size), hidden], in order of time.

        Raises:
            ValueError: the model has no audio encoder; codes and lengths do not fit together; a code out of range.
        """
        return self.encode_media("audio", audio_codes, audio_code_lengths)

    def check_media(self, modality: str, data: torch.Tensor, sizes: torch.Tensor | None) -> None:
        """Raises a `ValueError` for media that this model has no part for, or whose patches or frames do not fit."""
        names = MEDIA_INPUTS[modality]
        part, what, key = self.visual, "a vision tower", "vision_config"
        if modality == "audio":
            part, what, key = self.audio_encoder, "an audio encoder", "audio_config"
        if part is None:
            # CODEPATH: V2.5-Pro and V2-Flash have text only; V2.5 and V2.6 may be loaded without the towers
            why = f"no {key}" if getattr(self.config, key) is None else "loaded with load_towers=False"
            raise ValueError(f"`{names[0]}`: expected a model with {what}, got one without ({why}).")
        if sizes is None:
            expected = "[audios]" if modality == "audio" else "[media, 3]"
            raise ValueError(f"`{names[1]}`: expected {expected} beside `{names[0]}`, got nothing.")
        part.check_inputs(data, sizes)

    def encode_media(self, modality: str, data: torch.Tensor, sizes: torch.Tensor) -> BaseModelOutputWithPooling:
        """Features of all media of a modality, one tensor each."""
        self.check_media(modality, data, sizes)
        rows, tokens = self.media_sizes(modality, sizes)
        if modality == "audio":
            groups = self.audio_encoder.group_frames(data, rows).split(GROUPS_PER_STEP)
            features = torch.cat([self.audio_encoder(self.speech_embeddings(part)) for part in groups])
        else:
            features = self.visual(data, sizes)
        return BaseModelOutputWithPooling(pooler_output=list(features.split(tokens)))

    def embed_media(
        self, input_ids: torch.Tensor, media: dict[str, BaseModelOutputWithPooling], is_prefill: bool
    ) -> torch.Tensor:
        """[B, S] ids -> [B, S, hidden] embeddings, with the features of each modality at its placeholders."""
        inputs_embeds = self.model.embed_tokens(input_ids)
        for modality in MEDIA_INPUTS:
            places = self.placeholders(input_ids, modality)
            if modality in media and len(media[modality].pooler_output):
                features = torch.cat(list(media[modality].pooler_output))
                check_placeholders(places, modality, len(features))
                inputs_embeds = inputs_embeds.masked_scatter(places[..., None], features.to(inputs_embeds))
            elif is_prefill:
                # a placeholder token that the model writes itself is none of our business
                check_placeholders(places, modality, 0)
        return inputs_embeds

    @can_return_tuple
    @auto_docstring
    @takes_cache
    @refuses_unknown_names(*PASSED_ON)
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        pixel_values_videos: torch.FloatTensor | None = None,
        video_grid_thw: torch.LongTensor | None = None,
        audio_codes: torch.LongTensor | None = None,
        audio_code_lengths: torch.LongTensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mtp_loss_weight: float | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MiMoV2CausalLMOutputWithPast:
        """
        Text arguments that are not listed are those of `MiMoV2Model.forward`.

        Args:
            audio_codes (`torch.LongTensor` of shape `(frames, audio_channels)`, *optional*): codes of all audios of
                the batch, row by row in the order of their placeholders in `input_ids`.
            audio_code_lengths (`torch.LongTensor` of shape `(audios,)`, *optional*): frames of each audio.
            pixel_values, image_grid_thw, pixel_values_videos, video_grid_thw: patches and grids of all images and
                videos of the batch, row by row in the order of their placeholders in `input_ids`.
            cache (`Cache`, *optional*): as in `MiMoV2Model.forward`.
            mm_encoder_outputs: "image", "video" and "audio" features encoded before, instead of pixels and codes.
            labels: [B, S] token ids, -100 where no loss is wanted; shifted inside.
            logits_to_keep: compute logits for the last n positions only (0: all), or for these positions.
            mtp_loss_weight (`float`, *optional*): with `labels`, `loss` is that of the trunk plus this times the sum
                of the losses of the MTP heads; `config.mtp_loss_weight` if not given.

        Returns:
            `logits`, `loss` for `labels`, `mtp_losses` of the heads if they count, and the cache.

        Raises:
            ValueError: as `MiMoV2Model.forward`; features and placeholders differ in number; media with
                `inputs_embeds` instead of `input_ids`; media for a model without the part that encodes them.
        """
        media = dict(mm_encoder_outputs or {})
        if pixel_values is not None:
            media["image"] = self.get_image_features(pixel_values, image_grid_thw)
        if pixel_values_videos is not None:
            media["video"] = self.get_video_features(pixel_values_videos, video_grid_thw)
        if audio_codes is not None:
            media["audio"] = self.get_audio_features(audio_codes, audio_code_lengths)
        if media and (input_ids is None or inputs_embeds is not None):
            raise ValueError(f"`input_ids`: expected placeholders for {sorted(media)} features, got `inputs_embeds`.")
        # only the decode step is compiled, where a static cache's length is a tensor, which no branch may depend on
        is_prefill = not torch.compiler.is_compiling() and (cache is None or bool(cache.get_seq_length() == 0))
        # CODEPATH: V2.5 and V2.6 have placeholders to look for, V2.5-Pro and V2-Flash none
        has_placeholders = self.config.vision_config is not None or self.config.audio_config is not None
        if media or (is_prefill and inputs_embeds is None and has_placeholders):
            input_ids, inputs_embeds = None, self.embed_media(input_ids, media, is_prefill)
        weight = self.config.mtp_loss_weight if mtp_loss_weight is None else mtp_loss_weight
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            run_mtp=labels is not None and weight > 0,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss, mtp_losses, attentions = None, None, outputs.attentions
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size, **kwargs)
        if outputs.mtp_hidden_states is not None:
            mtp_losses = self.mtp_losses(outputs.mtp_hidden_states, labels, attention_mask, position_ids, **kwargs)
            loss = loss + weight * sum(mtp_losses)
            # those of the heads were captured as well
            attentions = None if attentions is None else attentions[: len(self.model.layers)]
        return MiMoV2CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=attentions,
            router_logits=outputs.router_logits,
            mtp_losses=mtp_losses,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )


# here and not in __init__, which exported Hub code does not have
for _model_class in (MiMoV2Model, MiMoV2ForCausalLM):
    register_checkpoint_conversion_mapping(_model_class.__name__, expert_conversions(), overwrite=True)


__all__ = ["MiMoV2ForCausalLM", "MiMoV2Model", "MiMoV2PreTrainedModel"]

"""Transformers' model mixins on MiMo-V2: text alone, and with towers."""

import inspect
import unittest
from unittest.mock import patch

import torch
from reasons import skip_tests
from tiny import AUDIO_ID, CHANNELS, CODES, IMAGE_ID, TINY_AUDIO, TINY_VISION, VIDEO_ID, tiny_config
from transformers.models.auto import modeling_auto
from transformers_tests import test_expert_parallel_mixin, test_tensor_parallel_mixin
from transformers_tests.test_expert_parallel_mixin import ExpertParallelTesterMixin
from transformers_tests.test_modeling_common import ModelTesterMixin
from transformers_tests.test_tensor_parallel_mixin import TensorParallelTesterMixin
from transformers_tests.test_training_mixin import TrainingTesterMixin

from modeling_mimo import MiMoV2ForCausalLM, MiMoV2Model


# what Transformers writes for its own models, and the mixins read: which classes take labels
modeling_auto.MODEL_MAPPING_NAMES["mimo_v2"] = "MiMoV2Model"
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["mimo_v2"] = "MiMoV2ForCausalLM"

# the mixins start processes for a few models only, unless these say every one
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_expert_parallel_mixin.EP_DISTRIBUTED_TEST_MODEL_TYPES = None

BATCH, LENGTH = 3, 14

DIFFERENT_ON_PURPOSE = {
    "every tensor of a checkpoint must be known and there: a missing one is an error, never a random weight": (
        "correct_missing_keys",
        "base_model_prefix_loads_base_weights",
        "model_weights_reload_no_missing_tied_weights",
    ),
    "files have the released names alone: `save_original_format=False` is refused": (
        "can_load_from_already_mapped_keys",
    ),
    "the error names the kernels that keep the attention sinks, in words of our own (tests/test_refusals.py)": (
        "can_set_attention_dynamically",
    ),
    "the plan has the projections of all layouts, of which a model has one (tests/test_parallel.py)": (
        "tp_plan_matches_params",
    ),
    "GenerationTesterMixin is not in the source distribution; tests/test_modeling_mimo_v2.py generates": (
        "generation_tester_mixin_inheritance",
    ),
    "the text model has one implementation, towers have their own": ("sdpa_can_dispatch_composite_models",),
    "no release scales its rotary tables, of which there is one per layer type (tests/test_reference.py)": (
        "model_rope_scaling_*",
        "model_rope_with_partial_rotation",
        "vision_axial_rope",
    ),
    "which layers slide is in `layer_types`, there is no `use_sliding_window` (tests/test_attention.py)": (
        "sliding_window_mask",
    ),
}


class TextTester:
    """Tiny configs and inputs for the mixins, which ask for "small" models: two layers, one global, one sliding."""

    batch_size, seq_length = BATCH, LENGTH
    is_training = True
    causal_lm_class, base_model_class = MiMoV2ForCausalLM, MiMoV2Model
    changes = {
        "hybrid_layer_pattern": [0, 1],
        "moe_layer_freq": [0, 1],
        "num_hidden_layers": 2,
        "vocab_size": 99,
        # the mixins ask for a gradient in every parameter, also of the MTP heads
        "mtp_loss_weight": 0.3,
    }

    def __init__(self, parent):
        self.parent = parent
        config = self.get_config()
        self.num_hidden_layers, self.num_attention_heads = config.num_hidden_layers, config.num_attention_heads
        self.hidden_size = config.hidden_size

    def get_config(self):
        return tiny_config(**self.changes)

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(1, 99, (BATCH, LENGTH))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class RouterTests:
    """A test that looks for the decorator of the experts in the source of the model, which is another file."""

    def test_moe_models_record_router_logits(self):
        with patch.object(inspect, "getsource", return_value="@use_experts_implementation"):
            super().test_moe_models_record_router_logits()


@skip_tests(
    {
        **DIFFERENT_ON_PURPOSE,
        "a config without towers": ("get_image_features_*", "get_video_features_*", "get_audio_features_*"),
    }
)
class MiMoV2TextModelTest(
    RouterTests,
    ModelTesterMixin,
    TensorParallelTesterMixin,
    ExpertParallelTesterMixin,
    TrainingTesterMixin,
    unittest.TestCase,
):
    all_model_classes = (MiMoV2Model, MiMoV2ForCausalLM)
    model_tester = None

    def setUp(self):
        self.model_tester = TextTester(self)


class OmniTester(TextTester):
    """An image, a video and a sound in each row."""

    changes = {
        **TextTester.changes,
        "vocab_size": 320,
        "vision_config": TINY_VISION,
        "audio_config": TINY_AUDIO,
        "image_token_id": IMAGE_ID,
        "video_token_id": VIDEO_ID,
        "processor_config": {"audio_token_id": AUDIO_ID},
    }

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(1, 299, (BATCH, LENGTH))
        ids[:, 1], ids[:, 3:5], ids[:, 7:9] = IMAGE_ID, VIDEO_ID, AUDIO_ID
        frames = 2 * TINY_AUDIO["group_size"]
        return self.get_config(), {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": torch.randn(BATCH * 4, 3 * 2 * 16 * 16),
            "image_grid_thw": torch.tensor([[1, 2, 2]] * BATCH),
            "pixel_values_videos": torch.randn(BATCH * 8, 3 * 2 * 16 * 16),
            "video_grid_thw": torch.tensor([[2, 2, 2]] * BATCH),
            "audio_codes": torch.randint(0, CODES, (BATCH * frames, CHANNELS)),
            "audio_code_lengths": torch.tensor([frames] * BATCH),
        }


@skip_tests(
    {
        **DIFFERENT_ON_PURPOSE,
        "towers return features alone: they work on parts of a medium at a time": (
            "get_image_features_hidden_states",
            "get_image_features_attentions",
            "get_video_features_hidden_states",
            "get_video_features_attentions",
            "get_audio_features_hidden_states",
            "get_audio_features_attentions",
            "multimodal_outputs_are_returned",
        ),
        "media need `input_ids`, whose placeholders say where they go": ("inputs_embeds",),
        "the mixin passes placeholders without their media; text runs it, tests/test_multimodal.py media": (
            "eager_matches_sdpa_inference_*",
        ),
    }
)
class MiMoV2OmniModelTest(RouterTests, ModelTesterMixin, unittest.TestCase):
    all_model_classes = (MiMoV2ForCausalLM,)
    model_tester = None
    skip_test_image_features_output_shape = True
    skip_test_video_features_output_shape = True
    skip_test_audio_features_output_shape = True

    def setUp(self):
        self.model_tester = OmniTester(self)

"""Transformers' processor mixins on MiMo-V2's processor and its parts."""

import tempfile
import unittest

import numpy as np
from reasons import skip_tests
from transformers import AutoTokenizer
from transformers_tests.test_image_processing_common import ImageProcessingTester, ImageProcessingTestMixin
from transformers_tests.test_processing_common import ProcessorTesterMixin, floats_list
from transformers_tests.test_sequence_feature_extraction_common import SequenceFeatureExtractionTestMixin
from transformers_tests.test_video_processing_common import VideoProcessingTestMixin

from modeling_mimo.conversion.random_checkpoint import write_random_checkpoint
from modeling_mimo.processors import (
    MiMoV2FeatureExtractor,
    MiMoV2ImageProcessor,
    MiMoV2Processor,
    MiMoV2VideoProcessor,
)


class ImageTester(ImageProcessingTester):
    """Pictures of 56 to 100 pixels a side."""

    def __init__(self, parent):
        super().__init__(parent, min_resolution=56, max_resolution=100)

    def _get_image_processing_classes(self):
        return {"pil": MiMoV2ImageProcessor}

    def prepare_image_processor_dict(self):
        return {"min_pixels": 4096, "max_pixels": 65536}


PACKED = "patches of all media are one packed tensor beside their grids"


@skip_tests(
    {
        f"{PACKED} (tests/test_image_processing_mimo_v2.py)": ("call_pil", "call_numpy", "call_pytorch"),
        "pictures have 3 channels, or 4 of which one is transparency: no others": ("call_numpy_4_channels",),
        "sizes are numbers of pixels: there is no `size`, `do_resize` or `do_convert_rgb`": (
            "image_processor_has_attributes",
            "image_processor_from_dict_has_attributes",
            "image_processor_from_dict_with_kwargs_has_attributes",
        ),
        "this package works without torchvision": ("new_models_require_torchvision_backend",),
    }
)
class MiMoV2ImageProcessorTest(ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = ImageTester


@skip_tests(
    {
        f"{PACKED} (tests/test_video_processing_mimo_v2.py)": (
            "call_pil",
            "call_numpy",
            "call_numpy_4_channels",
            "call_pytorch",
            "call_sample_frames",
            "nested_input",
        ),
        "sizes are numbers of pixels: there is no `size` or `crop_size`": ("video_processor_from_dict_with_kwargs",),
        "AutoVideoProcessor needs torchvision; AutoProcessor does not": (
            "video_processor_save_load_with_autovideoprocessor",
        ),
    }
)
class MiMoV2VideoProcessorTest(VideoProcessingTestMixin, unittest.TestCase):
    fast_video_processing_class = MiMoV2VideoProcessor

    def setUp(self):
        super().setUp()
        self.video_processor_dict = {"min_pixels": 4096, "max_pixels": 65536}


class SpeechTester:
    """Sounds of different lengths."""

    batch_size, feature_size = 3, 1
    min_seq_length, max_seq_length, seq_length_diff = 1600, 2400, 400

    def __init__(self, parent):
        self.parent = parent

    def prepare_feat_extract_dict(self):
        return {}

    def prepare_inputs_for_common(self, equal_length=False, numpify=False):
        lengths = [self.max_seq_length] * 3 if equal_length else range(1600, 2401, self.seq_length_diff)
        sounds = [floats_list((length, 1)) for length in lengths]
        return [np.asarray(sound) for sound in sounds] if numpify else sounds


@skip_tests({"pipelines pad on the left; the mixin looks on the right": ("padding_from_list", "padding_from_array")})
class MiMoV2FeatureExtractorTest(SequenceFeatureExtractionTestMixin, unittest.TestCase):
    feature_extraction_class = MiMoV2FeatureExtractor

    def setUp(self):
        self.feat_extract_tester = SpeechTester(self)


PARTS = {
    "image_processor": MiMoV2ImageProcessor,
    "video_processor": MiMoV2VideoProcessor,
    "feature_extractor": MiMoV2FeatureExtractor,
    "tokenizer": AutoTokenizer,
}


@skip_tests(
    {
        "unknown names are refused; the mixin passes do_rescale, do_sample_frames, is_override or common_kwargs": (
            "args_overlap_kwargs",
            "flat_kwarg_applied_when_modality_dict_lacks_it",
            "kwargs_overrides_default_subprocessor_kwargs_*_images",
            "kwargs_overrides_default_subprocessor_kwargs_*_videos",
            "subprocessor_defaults_preserved_by_kwargs_*_videos",
            "model_input_names",
            "processor_text_has_no_visual",
            "processor_with_multiple_inputs",
            "structured_kwargs_nested_from_dict_*",
            "unstructured_kwargs_*_images",
            "unstructured_kwargs_*_videos",
        ),
        "how a call pads is said in the call, not when its parts are made": (
            "subprocessor_defaults_preserved_by_kwargs*",
        ),
        "a processor made of parts hears with an audio tokenizer alone, which the mixin does not give it": (
            "kwargs_overrides_default_subprocessor_kwargs_*_audio",
            "subprocessor_defaults_preserved_by_kwargs_*_audio",
        ),
        f"{PACKED} (tests/test_processing_mimo_v2.py)": (
            "apply_chat_template_audio_*",
            "apply_chat_template_video_frame_sampling",
        ),
        "masks follow the turns of the released template (tests/test_training_collator.py)": (
            "apply_chat_template_assistant_mask",
        ),
        "the audio tokenizer is loaded when the first sound comes, behind a property": (
            "init_arguments_not_in_class_attributes",
            "processor_from_pretrained_vs_from_components",
        ),
        "AutoVideoProcessor needs torchvision; AutoProcessor does not": (
            "processor_from_and_save_pretrained_as_nested_dict",
        ),
        "images are always normalized: there is no `do_normalize`": ("save_load_pretrained_additional_features",),
        "vLLM asks for these numbers, and has a processor of its own for this model": (
            "get_num_multimodal_tokens_matches_processor_call*",
            "replacement_offsets",
        ),
    }
)
class MiMoV2ProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = MiMoV2Processor
    audio_input_name = "audio_codes"

    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory()
        path = write_random_checkpoint(f"{cls.folder.name}/checkpoint", "tiny", vision=True, audio=True)
        cls.model_id = str(path)
        super().setUpClass()

    def get_component(self, attribute, use_tiny_ckpt=True, **kwargs):
        # the mixin's own needs torchvision for AutoVideoProcessor
        return PARTS[attribute].from_pretrained(self.tmpdirname, **kwargs)

    @classmethod
    def tearDownClass(cls):
        super().tearDownClass()
        cls.folder.cleanup()

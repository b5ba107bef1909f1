"""What turns images, videos, sounds and conversations into the model's inputs, and its answers into messages."""

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModelForAudioTokenization,
    AutoProcessor,
)

from modeling_mimo.configuration_mimo_v2 import MiMoV2Config

from .configuration_mimo_audio_tokenizer import MiMoAudioTokenizerConfig
from .feature_extraction_mimo_v2 import MiMoV2FeatureExtractor
from .image_processing_mimo_v2 import MiMoV2ImageProcessor
from .media_opening_mimo_v2 import allow_any_format
from .modeling_mimo_audio_tokenizer import MiMoAudioTokenizer
from .processing_mimo_v2 import MiMoV2Processor
from .response_parsing_mimo_v2 import MiMoV2ResponseStreamParser
from .video_processing_mimo_v2 import MiMoV2VideoProcessor


AutoProcessor.register(MiMoV2Config, MiMoV2Processor, exist_ok=True)
AutoFeatureExtractor.register(MiMoV2Config, MiMoV2FeatureExtractor, exist_ok=True)
AutoImageProcessor.register(MiMoV2Config, image_processor_classes={"pil": MiMoV2ImageProcessor}, exist_ok=True)
AutoConfig.register(MiMoAudioTokenizerConfig.model_type, MiMoAudioTokenizerConfig, exist_ok=True)
AutoModelForAudioTokenization.register(MiMoAudioTokenizerConfig, MiMoAudioTokenizer, exist_ok=True)


__all__ = [
    "MiMoAudioTokenizer",
    "MiMoAudioTokenizerConfig",
    "MiMoV2FeatureExtractor",
    "MiMoV2ImageProcessor",
    "MiMoV2Processor",
    "MiMoV2ResponseStreamParser",
    "MiMoV2VideoProcessor",
    "allow_any_format",
]

"""What turns images, videos and conversations into the model's inputs, and its answers into messages."""

from transformers import AutoProcessor

from modeling_mimo.configuration_mimo_v2 import MiMoV2Config

from .image_processing_mimo_v2 import MiMoV2ImageProcessor
from .processing_mimo_v2 import MiMoV2Processor
from .response_parsing_mimo_v2 import MiMoV2ResponseStreamParser
from .video_processing_mimo_v2 import MiMoV2VideoProcessor


AutoProcessor.register(MiMoV2Config, MiMoV2Processor, exist_ok=True)


__all__ = ["MiMoV2ImageProcessor", "MiMoV2Processor", "MiMoV2ResponseStreamParser", "MiMoV2VideoProcessor"]

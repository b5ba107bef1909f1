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
"""`pipeline("any-to-any")` for MiMo-V2, imported when it is asked for."""

import torch
from transformers import AnyToAnyPipeline

from .configuration_mimo_v2 import MiMoV2Config
from .generation_mimo_v2 import MEDIA_INPUTS
from .messages_mimo_v2 import plain_chats


class MiMoV2AnyToAnyPipeline(AnyToAnyPipeline):
    """As in Transformers, without torchvision, which MiMo's processor does not use; a batch may mix conversations with
    different kinds of media, and messages may be objects. A model of another family gets Transformers' own class."""

    def __new__(cls, model, *args, **kwargs):
        if isinstance(model.config, MiMoV2Config):
            return super().__new__(cls)
        # not an instance of this class, so Python does not call __init__ on it again
        return AnyToAnyPipeline(model, *args, **kwargs)

    def __init__(self, *args, **kwargs):
        # past the __init__ of AnyToAnyPipeline, which only asks for torchvision
        super(AnyToAnyPipeline, self).__init__(*args, **kwargs)

    def __call__(self, text=None, *args, **kwargs):
        if isinstance(text, (list, tuple)):
            rows = [row if isinstance(row, (list, tuple)) else [row] for row in text]
            # Transformers' own takes mappings for messages, but only those of type dict
            if not all(isinstance(message, (str, dict)) for row in rows for message in row):
                chats, batched = plain_chats(text)
                # which Transformers asks for
                chats = [[{"content": "", **message} for message in chat] for chat in chats]
                text = chats if batched else chats[0]
        return super().__call__(text, *args, **kwargs)

    def preprocess(self, inputs=None, **kwargs):
        model_inputs = super().preprocess(inputs, **kwargs)
        # a batch is joined input by input, and every conversation must have the same ones
        for name, tensor in self._no_media().items():
            model_inputs.setdefault(name, tensor)
        return model_inputs

    def _forward(self, model_inputs, generate_kwargs=None):
        media = [name for names in MEDIA_INPUTS.values() for name in names]
        used = {name: value for name, value in model_inputs.items() if name not in media or len(value)}
        return super()._forward(used, generate_kwargs)

    def _no_media(self) -> dict[str, torch.Tensor]:
        """Inputs of the model that hold no medium, by name."""
        vision, audio = self.model.config.vision_config, self.model.config.audio_config
        tensors = {}
        # CODEPATH: V2.5 and V2.6 see and hear; V2.5-Pro and V2-Flash have no such inputs
        if vision is not None:
            values = vision.num_channels * vision.temporal_patch_size * vision.patch_size**2
            for kind in ("image", "video"):
                patches, sizes = MEDIA_INPUTS[kind]
                tensors |= {patches: torch.empty(0, values, dtype=self.dtype), sizes: torch.empty(0, 3).long()}
        if audio is not None:
            codes, lengths = MEDIA_INPUTS["audio"]
            tensors |= {codes: torch.empty(0, audio.audio_channels).long(), lengths: torch.empty(0).long()}
        return tensors

"""TRL's SFTTrainer for a model whose media are embedded ahead of the trunk, and whose MTP heads have losses."""

from torch import nn
from transformers import Trainer
from trl import SFTTrainer

from modeling_mimo.modeling_mimo_v2 import MiMoV2ForCausalLM

from .trainer import MTPLossLogs


class MiMoV2SFTTrainer(MTPLossLogs, SFTTrainer):
    """`trl.SFTTrainer` that trains with media, and with `config.mtp_loss_weight` the MTP heads.

    TRL computes losses from the trunk's hidden states, past the forward that embeds media and runs the heads: images
    would not be seen (the trunk refuses them), heads not trained. With a weight for the heads the loss is the
    model's own, and TRL's `entropy` and `mean_token_accuracy` are not logged.
    """

    def __init__(self, model, *args, **kwargs):
        super().__init__(model, *args, **kwargs)
        embed_media_of_trunk(self.model)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.model.config.mtp_loss_weight == 0:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs["use_cache"] = False
        loss, outputs = Trainer.compute_loss(self, model, inputs, True, num_items_in_batch)
        self.record_mtp_losses(outputs, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


def embed_media_of_trunk(model: nn.Module) -> None:
    """Makes the trunk of a `MiMoV2ForCausalLM` (or of an adapter around one) take media, for TRL's trainers."""
    (owner,) = (module for module in model.modules() if isinstance(module, MiMoV2ForCausalLM))

    def embed(trunk: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        media = {}
        for kind, data, sizes, encode in (
            ("image", "pixel_values", "image_grid_thw", owner.get_image_features),
            ("video", "pixel_values_videos", "video_grid_thw", owner.get_video_features),
            ("audio", "audio_codes", "audio_code_lengths", owner.get_audio_features),
        ):
            if kwargs.get(data) is not None:
                media[kind] = encode(kwargs.pop(data), kwargs.pop(sizes))
        if not media:
            return None
        kwargs["inputs_embeds"] = owner.embed_media(kwargs.pop("input_ids"), media, is_prefill=True)
        return args, kwargs

    owner.model.register_forward_pre_hook(embed, with_kwargs=True)


__all__ = ["MiMoV2SFTTrainer", "embed_media_of_trunk"]

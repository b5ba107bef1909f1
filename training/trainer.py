"""A Trainer that logs the losses of the MTP heads, which are part of the loss if `config.mtp_loss_weight` is set."""

import torch
from transformers import Trainer

from .collator import ConversationCollator


class MTPLossLogs:
    """For a Trainer: `mtp_loss_1`, `mtp_loss_2`, ... in the logs, each head's mean loss per step, unweighted."""

    _mtp_totals: torch.Tensor | None = None
    _mtp_steps = 0

    def record_mtp_losses(self, outputs, num_items_in_batch) -> None:
        """Takes the losses of one forward of training."""
        if outputs.mtp_losses is None or not self.model.training:
            return
        losses = torch.stack([part.detach().float() for part in outputs.mtp_losses])
        if num_items_in_batch is None:
            # then each is the mean over a share of the step; else a sum over the step's tokens
            losses = losses / self.current_gradient_accumulation_steps
        self._mtp_totals = losses if self._mtp_totals is None else self._mtp_totals + losses

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        steps = self.state.global_step - self._mtp_steps
        if self._mtp_totals is not None and steps > 0 and "loss" in logs:
            means = (self._mtp_totals / steps).tolist()
            logs |= {f"mtp_loss_{head}": round(mean, 4) for head, mean in enumerate(means, start=1)}
            self._mtp_totals, self._mtp_steps = None, self.state.global_step
        super().log(logs, start_time)


class MiMoV2Trainer(MTPLossLogs, Trainer):
    """`transformers.Trainer` with the losses of the MTP heads in its logs.

    Media and labels go in as a `ConversationCollator` makes them, which gets its examples whole.
    """

    def __init__(self, model=None, args=None, data_collator=None, **kwargs):
        if isinstance(data_collator, ConversationCollator) and args is not None:
            # the columns of conversations are none of the model's arguments
            args.remove_unused_columns = False
        super().__init__(model=model, args=args, data_collator=data_collator, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self.record_mtp_losses(outputs, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


__all__ = ["MTPLossLogs", "MiMoV2Trainer"]

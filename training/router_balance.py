"""Even load of the experts without an auxiliary loss: the router's correction bias follows the load (`noaux_tc`).

Source of the rule: DeepSeek-V3, section 2.1.2, after "Auxiliary-Loss-Free Load Balancing Strategy for
Mixture-of-Experts" (2024); MiMo-V2's `e_score_correction_bias` is trained so.
"""

import torch
import torch.distributed
from torch import nn
from transformers import TrainerCallback

from modeling_mimo.modeling_mimo_v2 import MiMoV2Model
from modeling_mimo.modeling_mimo_v2_text import MiMoV2Router


class RouterBalancer:
    """Counts how many tokens choose each expert, and moves the correction biases against it.

    Counted are the tokens of every training forward since the last `step`, so those of a whole optimizer step with
    gradient accumulation; not padding, not evaluation or generation, and not a second time what gradient
    checkpointing runs again in the backward pass.

    Args:
        model: a model with `MiMoV2Model` inside.
        rate: how far a bias moves per step; DeepSeek-V3 trained with 0.001.

    Raises:
        ValueError: a model without routers; a rate that is not positive.

    ```python
    >>> balancer = RouterBalancer(model)
    >>> optimizer.step()
    >>> balancer.step()
    ```
    """

    def __init__(self, model: nn.Module, rate: float = 1e-3):
        if not rate > 0:
            raise ValueError(f"`rate`: expected a positive number, got {rate!r}.")
        self.rate = rate
        self.routers = {name: module for name, module in model.named_modules() if isinstance(module, MiMoV2Router)}
        if not self.routers:
            raise ValueError("`model`: expected one with routers, got one without.")
        # tokens per expert since the last step, int64 [experts] by the name of the router
        self.counts = {
            name: torch.zeros(router.num_experts, dtype=torch.long, device=router.weight.device)
            for name, router in self.routers.items()
        }
        # those of the last step, over all processes
        self.last_counts: dict[str, torch.Tensor] = {}
        self._counting, self._real_tokens = False, None
        (trunk,) = (module for module in model.modules() if isinstance(module, MiMoV2Model))
        self._handles = [
            trunk.register_forward_pre_hook(self._begin, with_kwargs=True),
            trunk.register_forward_hook(self._end, always_call=True),
            *(router.register_forward_hook(self._counter(name)) for name, router in self.routers.items()),
        ]

    def _begin(self, trunk: nn.Module, args: tuple, kwargs: dict) -> None:
        # what checkpointing recomputes runs in the backward pass, outside of the trunk's forward
        self._counting = trunk.training and torch.is_grad_enabled()
        mask = kwargs.get("attention_mask")
        self._real_tokens = mask.flatten().bool() if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None

    def _end(self, *_) -> None:
        self._counting, self._real_tokens = False, None

    def _counter(self, name: str):
        @torch.no_grad()
        def count(router: nn.Module, args: tuple, outputs: tuple) -> None:
            if not self._counting:
                return
            indices = outputs[2]
            if self._real_tokens is not None:
                indices = indices[self._real_tokens.to(indices.device)]
            counts = torch.bincount(indices.flatten(), minlength=router.num_experts)
            self.counts[name] = self.counts[name].to(counts.device) + counts

        return count

    @torch.no_grad()
    def step(self) -> None:
        """Moves each bias by `rate` towards an even load, over all processes, and begins to count anew."""
        for name, router in self.routers.items():
            counts = self.counts[name]
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(counts)
            load = counts.float()
            direction = (load.mean() - load).sign()
            router.e_score_correction_bias.add_(direction.to(router.e_score_correction_bias.device), alpha=self.rate)
            self.last_counts[name], self.counts[name] = counts, torch.zeros_like(counts)

    def max_violation(self) -> float:
        """Load of the busiest expert over the mean load, minus 1, in the last step: 0 if all are even."""
        return max(
            float(counts.max() / counts.float().mean().clamp(min=1e-9)) - 1 for counts in self.last_counts.values()
        )

    def remove(self) -> None:
        """Takes the hooks off the model."""
        for handle in self._handles:
            handle.remove()


class RouterBiasCallback(TrainerCallback):
    """`RouterBalancer` for a Trainer: after each optimizer step. The biases are buffers and saved with the model.

    Raises:
        ValueError: at the beginning of training, for a model with adapters, whose files would not hold the biases.
    """

    def __init__(self, rate: float = 1e-3):
        self.rate, self.balancer = rate, None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if hasattr(model, "peft_config"):
            raise ValueError(
                "`RouterBiasCallback`: expected full fine-tuning, got a model with adapters, whose files hold no "
                "router biases; leave the callback out."
            )
        self.balancer = RouterBalancer(model, self.rate)

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.balancer.step()

    def on_train_end(self, args, state, control, **kwargs):
        self.balancer.remove()


__all__ = ["RouterBalancer", "RouterBiasCallback"]

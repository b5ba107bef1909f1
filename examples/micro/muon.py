"""The optimizer that trains MiMo-Micro's trunk: Muon for matrices, AdamW for embeddings and vectors.

After Keller Jordan, "Muon: an optimizer for hidden layers" (2024), with the step size of "Muon is scalable for LLM
training" (arXiv 2502.16982), by which both rules share a learning rate. torch.optim.Muon takes single matrices, and
the experts of a layer are stacked.
"""

import torch
from torch import nn


class Muon(torch.optim.Optimizer):
    """Matrices [..., m, n] move by their momentum made orthogonal, all other parameters as in AdamW."""

    def __init__(self, model: nn.Module, lr: float, weight_decay: float = 0.05):
        self.betas, self.momentum, self.eps = (0.9, 0.98), 0.95, 1e-8
        groups = [{"params": [], "decayed": True, "matrices": True}]
        groups += [{"params": [], "decayed": decayed, "matrices": False} for decayed in (True, False)]
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                matrix = parameter.dim() > 1 and not any(part in name for part in ("embed", "lm_head", "gate.weight"))
                groups[0 if matrix else 1 if parameter.dim() > 1 else 2]["params"].append(parameter)
        super().__init__([group for group in groups if group["params"]], {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            rule = self._orthogonal if group["matrices"] else self._adam
            for parameter in group["params"]:
                if parameter.grad is not None:
                    if group["decayed"]:
                        parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.sub_(rule(parameter.grad, self.state[parameter]), alpha=group["lr"])

    def _orthogonal(self, gradient: torch.Tensor, state: dict) -> torch.Tensor:
        if not state:
            state["momentum"] = torch.zeros_like(gradient)
        state["momentum"].lerp_(gradient, 1 - self.momentum)
        # entries of an orthogonal matrix are of 1 / sqrt(longer side), those of a step of AdamW about 0.2
        scale = 0.2 * max(gradient.shape[-2:]) ** 0.5
        return scale * orthogonal(gradient.lerp(state["momentum"], self.momentum))

    def _adam(self, gradient: torch.Tensor, state: dict) -> torch.Tensor:
        if not state:
            state["count"] = torch.zeros(())
            state["mean"], state["square"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
        state["count"] += 1
        state["mean"].lerp_(gradient, 1 - self.betas[0])
        state["square"].lerp_(gradient.square(), 1 - self.betas[1])
        mean, square = (
            state[name] / (1 - beta ** state["count"]) for name, beta in zip(("mean", "square"), self.betas)
        )
        return mean / (square.sqrt() + self.eps)


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """[..., m, n] with about the singular vectors of `matrices` and singular values of about 1 (0.7 to 1.2), by five
    steps of Newton and Schulz."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (2.0315 * square @ square - 4.775 * square) @ x
    return x.mT if tall else x

# SPDX-License-Identifier: Apache-2.0
"""MuonAdamW: Muon for the sampler head's matrices, AdamW for the LoRA, the mask embeddings and all vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer


class MuonAdamW(Optimizer):
    """Two optimizers of torch as one: Muon for the sampler head's matrices, AdamW for all other parameters.

    Muon's update of a matrix has equal singular values, so that directions with small gradients are learned as fast as the
    others. The sampler head, which is trained from nothing, gains by it.

    Args:
        params: pairs of a name and a parameter, as ``named_parameters()`` gives them.
        lr: AdamW's learning rate.
        muon_lr: Muon's learning rate; its updates are scaled to the size of AdamW's (``match_rms_adamw``).
        betas: AdamW's coefficients.
        weight_decay: of both.
        momentum: Muon's.

    Without a sampler head it is AdamW.
    """

    def __init__(
        self,
        params: Iterable[tuple[str, Tensor]],
        lr: float = 1e-3,
        muon_lr: float = 5e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.01,
        momentum: float = 0.95,
    ) -> None:
        for_muon, for_adamw = list[tuple[str, Tensor]](), list[tuple[str, Tensor]]()
        for name, parameter in params:
            is_matrix_of_head = parameter.ndim == 2 and "sampler_head" in name
            (for_muon if is_matrix_of_head else for_adamw).append((name, parameter))
        fused = all(parameter.device.type in ("cpu", "cuda") for _, parameter in for_adamw) or None  # None: torch decides
        self._parts: list[Optimizer] = [AdamW(for_adamw, lr=lr, betas=betas, weight_decay=weight_decay, fused=fused)]
        if for_muon:  # a model may have no sampler head
            scale = "match_rms_adamw"
            self._parts.append(Muon(for_muon, muon_lr, weight_decay, momentum=momentum, adjust_lr_fn=scale))
        super().__init__([part.param_groups[0] for part in self._parts], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both; ``closure`` computes the loss and its gradients first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part, group in zip(self._parts, self.param_groups, strict=True):
            part.state, part.param_groups = self.state, [group]  # loading a state replaces these objects
            part.step()
        return loss

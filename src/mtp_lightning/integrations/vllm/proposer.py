# SPDX-License-Identifier: Apache-2.0
"""The drafter that ``speculative_config`` names: drafts from the blocks that the last forward pass had."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class Proposer:
    """vLLM's interface for drafters of other packages (method ``custom_class``).

    Args:
        vllm_config: vLLM's configuration.

    Attributes:
        num_steps: passes in which a request gained tokens, added up over requests: the steps of our own decoder.
    """

    def __init__(self, vllm_config: Any) -> None:
        self.num_steps = 0
        self._vllm_config = vllm_config
        self._model: Any = None

    def load_model(self, model: Any) -> None:
        """Take the base, whose forward pass runs the masks and whose weights are loaded."""
        self._model = model
        model.measure_loads(self._vllm_config)

    @torch.inference_mode()
    def propose(
        self,
        sampled_token_ids: Sequence[Sequence[int]],
        num_tokens_no_spec: Any,
        token_ids_cpu: Any,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Draft tokens of each request of the batch, in its order; none where the pass had no block to draft from.

        Args:
            sampled_token_ids: what each request gained by the pass; nothing in the middle of a prompt.
            num_tokens_no_spec: tokens of each request's text by now, these included.
            token_ids_cpu: the texts, not used.
            slot_mappings: not used.

        Returns:
            As many lists as there are requests.
        """
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        rows = [row for row, gained in enumerate(sampled_token_ids) if gained]
        self.num_steps += len(rows)
        last = self._model.mtp.state.last() if rows else None
        if last is None:
            return drafts
        seq_lens = last.seq_lens.tolist()
        # The block after the last accepted token, which is the last one but one: the base's own token was not fed yet.
        # The last of the W blocks is after position seq_len - 1.
        blocks = [int(num_tokens_no_spec[row]) - 2 - (seq_lens[row] - last.blocks.number) for row in rows]
        # In linear decoding the one block is of no use unless all drafts were accepted.
        chosen = [(row, block) for row, block in zip(rows, blocks, strict=True) if block >= 0]
        if not chosen:
            return drafts
        device = last.hidden.device
        index, block = (torch.tensor(values, device=device) for values in zip(*chosen, strict=True))
        verified = torch.tensor([sampled_token_ids[row][-1] for row, _ in chosen], device=device)
        logits = None if last.logits is None else last.logits[index, block]
        tokens = self._model.draft(last.hidden[index, block], logits, verified).tolist()
        for (row, _), draft in zip(chosen, tokens, strict=True):
            drafts[row] = draft
        return drafts

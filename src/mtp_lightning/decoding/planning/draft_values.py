# SPDX-License-Identifier: Apache-2.0
"""Value of having a draft: an average-reward decision process over the number of drafts available, solved while decoding.

A step that makes a draft costs more than a plain one and pays off only later; often not in the next step alone, because
text whose drafts are accepted keeps having them. So the value of a draft of m tokens is the relative value of the state
"m drafts are available" when every following step is planned best. Steps take different times: it is a semi-Markov
decision process, and its average reward is the rate, in tokens per second.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

WARMUP_SWEEPS = 40
"""Sweeps from scratch, which reach about a per cent; afterwards probabilities and costs change slowly."""


def rows_with_block(
    path_prob: np.ndarray, all_accepted: np.ndarray, first_rejected: float, num_placements: int
) -> np.ndarray:
    """Expected number of rows with a block after their last accepted token.

    Args:
        path_prob: rows whose first c drafts are all accepted, for each size c, [c]; all rows at c = 0.
        all_accepted: rows whose verified drafts, c or as many as they have, are all accepted, [c].
        first_rejected: rows whose first draft is rejected.
        num_placements: 1: blocks at ``last``; 3: also at ``ends`` and ``all`` (see ``Plan.where``).

    Returns:
        [c, where].
    """
    last = all_accepted
    if num_placements == 1:
        return last[:, None]
    ends = path_prob + first_rejected
    ends[0] = path_prob[0]
    everywhere = np.full_like(path_prob, path_prob[0])
    return np.stack([last, ends, everywhere], axis=1)


class DraftValues:
    """Values of drafts, and the rate of the best plans.

    Args:
        sizes: numbers of drafts and of masks that plans use, ascending from 0.

    Attributes:
        draft_value: value of a draft of each size over having none, in tokens, [m].
        rate: tokens per second when all steps are planned best; 0 before the first sweep.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = np.array(sizes)
        self.draft_value = np.zeros(len(self.sizes))
        self.rate = 0.0

    def sweep(self, accept_prob: np.ndarray, seconds: np.ndarray, sweeps: int = 1, tolerance: float = 0.0) -> None:
        """Improve the values by damped relative value iteration, until they change by less than ``tolerance`` tokens.

        ``accept_prob`` [k] is the acceptance probability of each draft of a block, given that those before are accepted;
        ``seconds`` [c, m, where] is what each plan takes, drafting included.
        """
        path_prob = np.concatenate([[1.0], accept_prob.cumprod()])
        tokens = path_prob.cumsum()[self.sizes]  # expected tokens of verifying c drafts
        path_prob = path_prob[self.sizes]
        blocks = rows_with_block(path_prob, path_prob, 1.0 - accept_prob[0], seconds.shape[2])
        plain_rate = 1.0 / float(seconds[0, 0, 0])
        rate, value = max(self.rate, plain_rate), self.draft_value
        for _ in range(sweeps):
            gain = tokens[:, None, None] + blocks[:, None, :] * value[None, :, None] - rate * seconds  # [c, m, where]
            # With n drafts available any c <= n may be verified.
            best = np.maximum.accumulate(gain.max(axis=(1, 2)))
            surplus = float(best[0])  # 0 at the fixed point
            # Half a step only: plans that alternate between drafting and verifying would make the values oscillate.
            change = 0.5 * (best - surplus - value)
            value = value + change
            rate = max(plain_rate, rate + 0.25 * surplus * plain_rate)
            if abs(surplus) < tolerance and float(np.abs(change).max()) < tolerance:
                break
        self.rate, self.draft_value = rate, value


def expected_tokens(
    accept_probs: Sequence[np.ndarray], block_need: np.ndarray, num_masks: int, values: DraftValues, num_placements: int
) -> np.ndarray:
    """Expected tokens of every plan, those gained now and the value of drafts for later, summed over rows.

    Args:
        accept_probs: for each row, the acceptance probability of each of its drafts, given that those before are accepted,
            [at most k].
        block_need: how much of a block's value counts for each row, [B].
        num_masks: k.
        values: values of drafts.
        num_placements: see ``rows_with_block``.

    Returns:
        [c, m, where].
    """
    B, need = len(accept_probs), block_need[:, None]
    missing_rejected, missing_accepted = np.zeros((B, num_masks)), np.ones((B, num_masks))
    for r, probs in enumerate(accept_probs):
        missing_rejected[r, : len(probs)] = missing_accepted[r, : len(probs)] = probs
    one = np.ones((B, 1))
    path_prob = np.concatenate([one, missing_rejected.cumprod(1)], axis=1)  # first a drafts all accepted, [B, k + 1]
    all_accepted = np.concatenate([one, missing_accepted.cumprod(1)], axis=1)  # those of them that there are
    now = path_prob.cumsum(1).sum(0)[values.sizes]  # of verifying c drafts, [c]
    first_rejected = float((block_need * (1.0 - path_prob[:, 1])).sum())
    blocks = rows_with_block(
        (need * path_prob)[:, values.sizes].sum(0),
        (need * all_accepted)[:, values.sizes].sum(0),
        first_rejected,
        num_placements,
    )  # [c, where]
    return now[:, None, None] + blocks[:, None, :] * values.draft_value[None, :, None]

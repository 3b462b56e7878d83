# SPDX-License-Identifier: Apache-2.0
"""StepsProgressBar: Lightning's rich progress bar for a run that ends after a number of steps. Used by every command."""

from __future__ import annotations

from lightning.pytorch.callbacks import RichProgressBar


class StepsProgressBar(RichProgressBar):
    """Lightning's bar says ``Epoch 0/-2`` where ``trainer.max_steps`` ends the run; this one leaves the ``/-2`` out."""

    def _get_train_description(self, current_epoch: int) -> str:
        description = super()._get_train_description(current_epoch)
        if self.trainer.max_epochs != -1:
            return description
        # As long as the validation's description, so that the bars do not move.
        return description.replace("/-2", "").ljust(len(self.validation_description))

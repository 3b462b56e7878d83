# SPDX-License-Identifier: Apache-2.0
"""What differs from Lightning's trainer: how files are written. No callbacks, no model.

``FullyShardedStrategy`` is in ``training``; configurations find it here.
"""

from mtp_lightning.trainer.checkpoint_io import AtomicCheckpointIO
from mtp_lightning.trainer.metrics_writer import MetricsWriter
from mtp_lightning.training.fully_sharded import FullyShardedStrategy

__all__ = ["AtomicCheckpointIO", "FullyShardedStrategy", "MetricsWriter"]

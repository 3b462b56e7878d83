# SPDX-License-Identifier: Apache-2.0
"""Training with Lightning: the module, its optimizer, sharding, sizing and what processes share."""

from mtp_lightning.training.muon_adamw import MuonAdamW

__all__ = ["MuonAdamW"]

# SPDX-License-Identifier: Apache-2.0
"""Metrics: counts in ``functional``, thin torchmetrics classes around them."""

from mtp_lightning.metrics.acceptance_length import AcceptanceLength
from mtp_lightning.metrics.forced_acceptance import ForcedAcceptance
from mtp_lightning.metrics.term_mean import TermMean

__all__ = ["AcceptanceLength", "ForcedAcceptance", "TermMean"]

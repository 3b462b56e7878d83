# SPDX-License-Identifier: Apache-2.0
"""Lightning callbacks: evaluation by real decoding, and sample texts."""

from mtp_lightning.callbacks.acceptance_evaluation import AcceptanceEvaluation
from mtp_lightning.callbacks.sample_text import SampleText

__all__ = ["AcceptanceEvaluation", "SampleText"]

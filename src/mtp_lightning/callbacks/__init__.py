# SPDX-License-Identifier: Apache-2.0
"""Lightning callbacks: evaluation by real decoding, sample texts, and resuming, guarding and timing long runs."""

from mtp_lightning.callbacks.acceptance_evaluation import AcceptanceEvaluation
from mtp_lightning.callbacks.last_checkpoint import LastCheckpoint
from mtp_lightning.callbacks.resume_exactly import ResumeExactly
from mtp_lightning.callbacks.run_guards import RunGuards
from mtp_lightning.callbacks.sample_text import SampleText
from mtp_lightning.callbacks.save_on_signal import SaveOnSignal
from mtp_lightning.callbacks.throughput import Throughput

__all__ = [
    "AcceptanceEvaluation",
    "LastCheckpoint",
    "ResumeExactly",
    "RunGuards",
    "SampleText",
    "SaveOnSignal",
    "Throughput",
]

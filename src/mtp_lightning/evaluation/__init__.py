# SPDX-License-Identifier: Apache-2.0
"""Acceptance length, losslessness and speed on prompts, and their reports."""

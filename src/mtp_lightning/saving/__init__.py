# SPDX-License-Identifier: Apache-2.0
"""Checkpoints and saved folders: writing, checking and opening them."""

# SPDX-License-Identifier: Apache-2.0
"""The address that the script of every saved folder imports; see ``mtp_lightning.integrations.custom_generate``."""

from mtp_lightning.integrations.custom_generate import generate_from

__all__ = ["generate_from"]

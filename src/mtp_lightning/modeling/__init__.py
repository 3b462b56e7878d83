# SPDX-License-Identifier: Apache-2.0
"""The network and what it is made of: base, gated LoRA, masked input."""

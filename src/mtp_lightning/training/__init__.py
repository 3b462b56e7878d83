# SPDX-License-Identifier: Apache-2.0
"""Training with Lightning: the module, sharding, sizing and what processes share."""

# SPDX-License-Identifier: Apache-2.0
"""How a step runs: eager or as a graph, over prepared weights."""

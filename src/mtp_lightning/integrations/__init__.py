# SPDX-License-Identifier: Apache-2.0
"""Other programs that run an ``MTPModel``: the lm-evaluation-harness, transformers, vLLM."""

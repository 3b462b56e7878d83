# SPDX-License-Identifier: Apache-2.0
"""Self-speculative decoding: plan, run, commit, propose."""

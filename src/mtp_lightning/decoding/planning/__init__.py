# SPDX-License-Identifier: Apache-2.0
"""How much to draft: acceptance statistics, costs of steps, and the plan that gains most."""

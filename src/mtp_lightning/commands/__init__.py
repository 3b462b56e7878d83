# SPDX-License-Identifier: Apache-2.0
"""The commands of ``mtp``, a file each, and the command line they share."""

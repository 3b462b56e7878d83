# SPDX-License-Identifier: Apache-2.0
"""``python -m mtp_lightning``: the same program as ``mtp``."""

import sys

from mtp_lightning.commands.cli import main

if __name__ == "__main__":
    sys.argv[0] = "mtp"  # the program's name in usage lines
    main()

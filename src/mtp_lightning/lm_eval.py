# SPDX-License-Identifier: Apache-2.0
"""``python -m mtp_lightning.lm_eval``: the harness with the model class ``mtp``."""

from mtp_lightning.integrations.lm_eval import MTPLM, main

__all__ = ["MTPLM", "main"]

if __name__ == "__main__":
    main()

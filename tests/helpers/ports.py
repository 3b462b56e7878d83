# SPDX-License-Identifier: Apache-2.0
"""A free port of this machine. Helpers of the tests, no tests."""

from __future__ import annotations

import socket


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])

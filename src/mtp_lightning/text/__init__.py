# SPDX-License-Identifier: Apache-2.0
"""Text in and out: prompts, streams of pieces, chats."""

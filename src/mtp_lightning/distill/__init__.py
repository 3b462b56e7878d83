# SPDX-License-Identifier: Apache-2.0
"""Self-distillation: the base model's own answers to prompts, as training data. Imports no Lightning.

``tasks``: the prompts to answer; ``answer_file``: the JSONL file, intact after a kill; ``base_answers``: answers of the base
model itself; ``endpoint``: answers of a server; ``reply_tokens``: their token ids.
"""

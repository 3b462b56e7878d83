# SPDX-License-Identifier: Apache-2.0
"""Self-distillation: the base model's own answers to prompts, as training data. No Lightning here.

``answer_file`` the JSONL file that survives a kill; ``base_answers`` the base model decodes; ``endpoint`` a server does;
``command`` the command ``mtp distill``.
"""

# SPDX-License-Identifier: Apache-2.0
"""Writes the model card of the demo's base model: what it is, held-out perplexity, and samples.

python scripts/demo_base/card.py --base src/mtp_lightning/demo/base
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

CARD = """# The demo's base model

A Llama of {parameters:,} parameters ({layers} layers of width {width}, vocabulary {vocabulary}, context {context} tokens), trained from scratch on
a CPU for the demo of mtp-lightning: small enough to ship and to train on in minutes, large enough to write text that looks like code,
maths and prose. It is fluent for a clause or two, knows nothing, and its sums are often wrong. Use it for the demo only.

Made by `scripts/demo_base/train.py` from {tokens:,} tokens (about seven epochs of code and prose, which
overfits), then `scripts/demo_base/average.py`: the mean of the weights after 9.3, 17.9 and 29.0 million
tokens, which is better on held-out code and prose than each of them. Sources:

| domain | text | licence |
|---|---|---|
| code | functions of the Python 3.11 standard library, normalised, one file in twenty held out | PSF-2.0 |
| maths | rule-based arithmetic word problems, `scripts/demo_base/maths_problems.py`, one in twenty held out | Apache-2.0, ours |
| prose | 232 fairy tales of Project Gutenberg, collected in FairytaleQA (46 more held out); short stories of TinyStories | Apache-2.0 (the tales: public domain); CDLA-Sharing-1.0 |

Weights (bfloat16), tokenizer and the sampled text (`../train.parquet`, `../validation.parquet`) are licensed
Apache-2.0. `../train.parquet` also holds excerpts of the corpus, at most 150 kB (`source` = `corpus`), and its sampled rows begin with 4
to 12 tokens of it: code PSF-2.0, maths ours, prose from the fairy tales. `../prompts.jsonl`: openings of held-out functions (PSF-2.0)
and tales (public domain), and our problems.

Perplexity per token on held-out documents, each truncated to {context} tokens (printed by `average.py`):

| code | maths | prose |
|---|---|---|
| {code:.2f} | {maths:.2f} | {prose:.2f} |

Samples at temperature 0.7, first draw of seed 0, prompt in bold (printed by `scripts/demo_base/card.py`):

{samples}
"""
PROMPTS = [
    "Once upon a time there was a king who",
    "The old woman looked at",
    "def read_lines(path):",
    "def close(self):\n",
    "Question: Mia has 7 boxes with 6 pears in each.",
    "Question: Leo has 24 marbles. Leo gives 6 marbles to Nina.",
]


@torch.inference_mode()
def main() -> None:
    """Sample and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    model = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32).eval()
    report = json.loads((args.base / "perplexity.json").read_text())
    samples = []
    for prompt in PROMPTS:
        torch.manual_seed(0)
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = model.generate(
            ids, max_new_tokens=120, do_sample=True, temperature=0.7, top_k=0, pad_token_id=tokenizer.eos_token_id
        )
        text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        samples.append(f"**`{prompt.strip()}`**\n\n```\n{prompt}{text}\n```\n")
    card = CARD.format(
        parameters=sum(p.numel() for p in model.parameters()),
        layers=model.config.num_hidden_layers,
        width=model.config.hidden_size,
        vocabulary=model.config.vocab_size,
        context=model.config.max_position_embeddings,
        tokens=report["tokens"],
        samples="\n".join(samples),
        **{name: report[name] for name in ("code", "maths", "prose")},
    )
    (args.base / "README.md").write_text(card, "utf-8")
    print(card)


if __name__ == "__main__":
    main()

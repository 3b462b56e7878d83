#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The whole run: base, prompts, the base's answers, training, export. pretrained/smollm2-135m was trained this way, in the parts that
# its README.md lists. Run again after an interruption: each
# part finds or resumes what is there. Arguments go to prompts.py, which names the files that it reads:
#   bash scripts/smollm2/train.sh --maths train.jsonl --code codegen-instruct.json --chat roleplay.json seed_tasks.jsonl
set -euo pipefail
cd "$(dirname "$0")/../.."
run=runs/smollm2
mkdir -p $run

mtp base smollm2
[ -f $run/prompts.jsonl ] || python scripts/smollm2/prompts.py "$@" --output $run/prompts.jsonl
mtp distill bases/smollm2-135m --prompts $run/prompts.jsonl --output $run/answers.jsonl --temperature 0.7 --max_new_tokens 200 \
  --batch_size 64
mtp fit --config configs/smollm2.yaml --data.train $run/answers.jsonl --ckpt_path auto
mtp export --ckpt_path $run/checkpoints/best.ckpt --dtype bfloat16 --output $run/saved --overwrite

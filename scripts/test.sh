#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs into .venv, then runs every check and the tests. Arguments go to pytest; without any, gpu_check.sh is tried too.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh "[dev]"

ruff check
ruff format --check
lint-imports
mypy
pydoclint src
codespell
NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet
pytest -m "not slow" "$@"
[ $# -gt 0 ] || OUT=$(mktemp -d) bash scripts/gpu_check.sh --tiny

# SPDX-License-Identifier: Apache-2.0
# Sourced by demo.sh and test.sh with the extras to install ("" or "[dev]"): creates the virtual environment, installs this
# checkout and puts it first on PATH. MTP_VENV names the environment (default .venv), PYTHON the interpreter. A second run
# installs nothing and needs no network, unless pyproject.toml or the constraints have changed.

extras=$1
venv=${MTP_VENV:-.venv}
[ -x "$venv/bin/pip" ] || "${PYTHON:-python3}" -m venv "$venv"
venv=$(cd "$venv" && pwd)
export VIRTUAL_ENV=$venv PATH="$venv/bin:$PATH"

wanted=$(pwd; cat pyproject.toml constraints/cpu.txt)
installed="$venv/installed$extras.txt"
if [ "$(cat "$installed" 2>/dev/null)" != "$wanted" ]; then
  python -m pip install --quiet --disable-pip-version-check -c constraints/cpu.txt -e ".$extras"
  if [ "$extras" = "[dev]" ] && [ ! -x "$venv/bin/pydoclint" ]; then
    # In its own environment: it replaces the docstring_parser of jsonargparse by a fork of the same module name.
    python -m venv "$venv/pydoclint"
    "$venv/pydoclint/bin/pip" install --quiet --disable-pip-version-check "pydoclint>=0.12,<0.13"
    ln -s ../pydoclint/bin/pydoclint "$venv/bin/pydoclint"
  fi
  printf '%s\n' "$wanted" >"$installed"
fi

export HF_HUB_OFFLINE=1 # what runs next must not need the network

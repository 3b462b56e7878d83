# SPDX-License-Identifier: Apache-2.0
"""Saved folders: what is written is what is read, PEFT alone gives the base, and what does not fit is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import leave_no_trace, save_base  # noqa: F401 - the first is a fixture
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from saved import PROMPT, files_of, model_on_disk, saved_model
from tiny import greedy_text
from toy_tokenizers import byte_tokenizer, word_tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from mtp_lightning import MTPModel
from mtp_lightning import export as exporting
from mtp_lightning.errors import RunError, UsageError
from mtp_lightning.gated_lora import LoRA, lora_layers
from mtp_lightning.label_counts import LabelCounts
from mtp_lightning.sampler_heads import GRUSamplerHead, MLPSamplerHead, SamplerHead

FILES = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "mtp_config.json",
    "mtp_heads.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "custom_generate/generate.py",
    "custom_generate/requirements.txt",
}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``base`` and ``saved``; not to be changed."""
    folder = tmp_path_factory.mktemp("kept")
    saved_model(folder)
    return folder


@pytest.fixture
def here(kept: Path, tmp_path: Path) -> Path:
    """A copy of the saved folder, to be changed."""
    folder = tmp_path / "saved"
    for name, content in files_of(kept / "saved").items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def trained(model: MTPModel) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.trained_parameters()}


@pytest.mark.parametrize(
    ("architecture", "head", "lora"),
    [
        ("llama", GRUSamplerHead(8, read_hidden=True), LoRA(rank=4, alpha=3.0, dropout=0.1)),
        ("qwen2-window", MLPSamplerHead(), LoRA(rank=2, target_modules=["q_proj", "down_proj"])),
        ("gemma3", None, LoRA(rank=2, target_modules="all-linear")),
        ("qwen3_moe", None, LoRA(rank=2)),
        ("mistral", GRUSamplerHead(), LoRA(rank=2, gated=False)),
    ],
)
def test_what_is_saved_is_what_is_loaded(tmp_path: Path, architecture: str, head: SamplerHead, lora: LoRA) -> None:
    model = model_on_disk(tmp_path, architecture, head, lora)
    counts = LabelCounts(torch.arange(17).flip(0)) if head else None  # folders are written with and without
    model.label_counts = counts
    before = [
        model.generate(PROMPT, max_new_tokens=24, decoding=name, num_masks=model.num_masks)
        for name in ("quadratic", "linear")
    ]
    model.save_pretrained(tmp_path / "saved")
    assert set(files_of(tmp_path / "saved")) == FILES
    loaded = MTPModel.from_pretrained(tmp_path / "saved")
    if architecture.endswith("moe"):
        loaded.base.set_experts_implementation("eager")
    assert loaded.lora == model.lora and loaded.num_masks == model.num_masks and not loaded.training
    old, new = trained(model), trained(loaded)
    assert old.keys() == new.keys() and all(new[name].equal(old[name]) for name in old)
    after = [
        loaded.generate(PROMPT, max_new_tokens=24, decoding=name, num_masks=model.num_masks)
        for name in ("quadratic", "linear")
    ]
    for a, b in zip(after, before, strict=True):
        assert a.sequences.equal(b.sequences) and a.accepted_per_step == b.accepted_per_step
    assert loaded.tokenizer.get_vocab() == model.tokenizer.get_vocab()
    assert loaded.tokenizer.chat_template == model.tokenizer.chat_template
    assert (loaded.label_counts and loaded.label_counts.counts.tolist()) == (counts and counts.counts.tolist())
    few = [m.generate(PROMPT, max_new_tokens=24, num_masks=3, draft_vocabulary=5) for m in (model, loaded)]
    assert few[0].sequences.equal(before[0].sequences) and few[1].sequences.equal(before[0].sequences)
    assert few[0].accepted_per_step == few[1].accepted_per_step
    loaded.save_pretrained(tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(tmp_path / "saved")


def test_dtype_and_device(kept: Path) -> None:
    model = MTPModel.from_pretrained(str(kept / "saved"), dtype="bfloat16", device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in MTPModel.from_pretrained(kept / "saved", dtype=torch.float32).parameters()} == {torch.float32}
    with pytest.raises(UsageError, match="device must be cpu, cuda or another one of this machine, got 'tpu9'"):
        MTPModel.from_pretrained(kept / "saved", device="tpu9")
    with pytest.raises(UsageError, match="give device or device_map, not both"):
        MTPModel.from_pretrained(kept / "saved", device="cpu", device_map="auto")


def test_peft_alone_gives_exactly_the_base(tmp_path: Path, kept: Path) -> None:
    ids = torch.randint(9, 15, (2, 20), generator=torch.Generator().manual_seed(0))
    base = AutoModelForCausalLM.from_pretrained(kept / "base")
    with torch.no_grad():
        expected = base(ids).logits
        said = greedy_text(base, ids[0], 12)
        model = PeftModel.from_pretrained(base, str(kept / "saved"))
        assert len(lora_layers(model)) == 14  # the adapter is there
        assert all(layer.lora_B["default"].weight.abs().sum() > 0 for layer in lora_layers(model))
        assert model(ids).logits.equal(expected)
        out = model.generate(input_ids=ids[:1], max_new_tokens=12, do_sample=False, pad_token_id=0)
        assert out[0, 20:].tolist() == said
        assert AutoPeftModelForCausalLM.from_pretrained(str(kept / "saved"))(ids).logits.equal(expected)
        assert AutoModelForCausalLM.from_pretrained(str(kept / "saved"))(ids).logits.equal(expected)
        # Without the token that does not exist PEFT would apply the adapter everywhere.
        standard = model_on_disk(tmp_path, head=None, lora=LoRA(rank=4, gated=False))
        standard.save_pretrained(tmp_path / "saved")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        expected = base(ids).logits
        changed = PeftModel.from_pretrained(base, str(tmp_path / "saved"))(ids).logits
        assert not torch.allclose(changed, expected)


def test_a_process_without_lightning(kept: Path) -> None:
    code = (
        "import sys, torch\n"
        "sys.modules.update(lightning=None, pytorch_lightning=None)\n"  # importing either would raise
        "from mtp_lightning import MTPModel\n"
        f"model = MTPModel.from_pretrained({str(kept / 'saved')!r})\n"
        f"out = model.generate(torch.tensor({PROMPT.tolist()}), max_new_tokens=24)\n"
        f"model.save_pretrained({str(kept / 'from another process')!r})\n"
        "print(out.sequences.tolist(), sorted(n for n in sys.modules if n.startswith('lightning.')))\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model = MTPModel.from_pretrained(kept / "saved")
    assert done.stdout.split("\n")[-2] == f"{model.generate(PROMPT, max_new_tokens=24).sequences.tolist()} []"
    assert files_of(kept / "from another process") == files_of(kept / "saved")


def cut(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])


def set_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "mtp_config.json").read_text())
    config.update(values)
    (folder / "mtp_config.json").write_text(json.dumps(config))


def retouch(folder: Path) -> None:
    """Change one number of one tensor, nothing else of the file."""
    heads = load_file(folder / "mtp_heads.safetensors")
    heads["mask_embeddings"][0, 0] += 1
    save_file(heads, folder / "mtp_heads.safetensors", metadata={"format": "pt"})


def drop_tensor(folder: Path) -> None:
    """Leave a tensor out, and write the new digest."""
    heads = load_file(folder / "mtp_heads.safetensors")
    del heads["sampler_head.output.bias"]
    save_heads(folder, heads)


def add_counts(folder: Path) -> None:
    """Add counts of a smaller vocabulary, and write the new digest."""
    heads = load_file(folder / "mtp_heads.safetensors")
    save_heads(folder, {**heads, "mtp_label_counts": torch.arange(16)})


def save_heads(folder: Path, heads: dict[str, torch.Tensor]) -> None:
    save_file(heads, folder / "mtp_heads.safetensors", metadata={"format": "pt"})
    files = json.loads((folder / "mtp_config.json").read_text())["files"]
    set_config(folder, files={**files, "mtp_heads.safetensors": exporting.file_digest(folder / "mtp_heads.safetensors")})


def make_foreign(folder: Path) -> None:
    (folder / "mtp_config.json").unlink()


AS_SAVED = "is not as it was saved: cut short, damaged or changed. Save or copy the folder again."
REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated adapter": (lambda f: cut(f, "adapter_model.safetensors"), f"{{f}}: adapter_model.safetensors {AS_SAVED}"),
    "truncated heads": (lambda f: cut(f, "mtp_heads.safetensors"), f"{{f}}: mtp_heads.safetensors {AS_SAVED}"),
    "truncated json": (lambda f: cut(f, "mtp_config.json"), "{f}/mtp_config.json is no JSON: .*"),
    "tampered tensor": (retouch, f"{{f}}: mtp_heads.safetensors {AS_SAVED}"),
    "tampered tokenizer": (
        lambda f: (f / "tokenizer_config.json").write_text("{}"),
        f"{{f}}: tokenizer_config.json {AS_SAVED}",
    ),
    "missing tensor": (
        drop_tensor,
        "{f}: the weights do not fit mtp_config.json: sampler_head.output.bias should be (32,) and is absent."
        " It is damaged.",
    ),
    "counts of another vocabulary": (
        add_counts,
        "{f}: the weights do not fit mtp_config.json: mtp_label_counts should be 17 int64 numbers from 0 on and is (16,)"
        " torch.int64. It is damaged.",
    ),
    "tampered count": (
        lambda f: set_config(f, num_masks=4),
        "{f}: the weights do not fit mtp_config.json: mask_embeddings should be (4, 32) and is (3, 32). It is damaged.",
    ),
    "tampered alpha": (
        lambda f: set_config(f, lora={"rank": 4, "alpha": 5.0}),
        "{f}: mtp_config.json names a LoRA of rank 4 and alpha 5.0, adapter_config.json one of rank 4 and alpha 8."
        " Save or copy the folder again.",
    ),
    "tampered lora": (
        lambda f: set_config(f, lora={"rang": 4}),
        "{f}/mtp_config.json: lora is not as mtp export writes it: .*rang.*",
    ),
    "tampered head": (
        lambda f: set_config(f, sampler_head={"class_path": "mtp_lightning.sampler_heads.GRUSamplerHead"}),
        "{f}/mtp_config.json: sampler_head.init_args is not as mtp export writes it: it is missing."
        " Save or copy the folder again.",
    ),
    "no head": (
        lambda f: set_config(f, sampler_head={"class_path": "mtp_lightning.model.MTPModel", "init_args": {}}),
        "the sampler head mtp_lightning.model.MTPModel is no SamplerHead.",
    ),
    "key of another type": (
        lambda f: set_config(f, num_masks="3"),
        "{f}/mtp_config.json: num_masks is not as mtp export writes it: got '3'. Save or copy the folder again.",
    ),
    "another version": (
        lambda f: set_config(f, version=2),
        "{f}/mtp_config.json has version 2 of the format, this mtp-lightning reads version 1."
        " Update mtp-lightning, or save the model again.",
    ),
    "another program": (
        lambda f: (f / "mtp_config.json").write_text("{}"),
        "{f}/mtp_config.json is of another program: expected format 'mtp-lightning'. Give a folder that mtp export wrote.",
    ),
    "foreign": (
        make_foreign,
        "{f} is no folder that mtp export wrote: it has no mtp_config.json. Give such a folder, a .ckpt file or a hub id.",
    ),
    "renamed": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "weights.safetensors"),
        "{f}: adapter_model.safetensors is missing: it was renamed, deleted or not copied. Save or copy it again.",
    ),
    "missing": (
        lambda f: (f / "mtp_heads.safetensors").unlink(),
        "{f}: mtp_heads.safetensors is missing: it was renamed, deleted or not copied. Save or copy it again.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_folder_that_is_not_as_it_was_saved(here: Path, case: str) -> None:
    change, message = REFUSED[case]
    change(here)
    with pytest.raises(RunError) as error:
        MTPModel.from_pretrained(here)
    found, expected = str(error.value), message.replace("{f}", str(here))
    assert "\n" not in found
    assert found == expected or re.fullmatch(expected, found), found


def test_a_pickle_is_not_opened(here: Path) -> None:
    (here / "adapter_model.safetensors").unlink()
    torch.save({}, here / "adapter_model.bin")
    with pytest.raises(RunError, match=r"adapter_model\.safetensors is missing"):
        MTPModel.from_pretrained(here)


def test_no_folder_file_or_hub_id() -> None:
    for name in ("no/where/at all", "owner/none"):
        with pytest.raises(RunError, match=f"'{name}' is no file or folder here, and no hub id that this machine can reach"):
            MTPModel.from_pretrained(name)


def test_a_folder_that_moved(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base given by a relative path is named by an absolute one, and one that moved can be given."""
    model_on_disk(tmp_path)
    monkeypatch.chdir(tmp_path)
    model = MTPModel.from_pretrained(kept / "saved", base_model=str(kept / "base"))
    model.base_model = "base"
    model.save_pretrained("saved")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert MTPModel.from_pretrained("../saved").base_model == str(tmp_path / "base")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(RunError, match="could not be loaded"):
        MTPModel.from_pretrained("../saved")
    assert MTPModel.from_pretrained("../saved", base_model="../moved").base_model == "../moved"


# Another base


def test_a_base_of_another_shape(kept: Path, tmp_path: Path) -> None:
    for key, value, options in (
        ("hidden_size", 40, {"hidden_size": 40}),
        ("num_hidden_layers", 3, {"num_hidden_layers": 3}),
        ("num_attention_heads", 8, {"num_attention_heads": 8, "num_key_value_heads": 2}),
    ):
        save_base(tmp_path / key, "llama", word_tokenizer(), torch.float32, **options)
        with pytest.raises(RunError, match=rf"the folder belongs to a base with {key} \d+, and '.*{key}' has {value}\."):
            MTPModel.from_pretrained(kept / "saved", base_model=str(tmp_path / key))
    save_base(tmp_path / "qwen", "qwen3", word_tokenizer(), torch.float32)
    with pytest.raises(RunError, match="belongs to a base with model_type llama, and '.*qwen' has qwen3"):
        MTPModel.from_pretrained(kept / "saved", base_model=str(tmp_path / "qwen"))


def test_a_base_of_another_vocabulary(kept: Path, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(["<a>"], "<a>")
    save_base(tmp_path / "larger", "llama", tokenizer, torch.float64)
    with pytest.raises(RunError, match=f"a base with vocab_size 17, and '.*larger' has {len(tokenizer)}"):
        MTPModel.from_pretrained(kept / "saved", base_model=str(tmp_path / "larger"))
    # The same number of tokens, in another order.
    save_base(tmp_path / "other", "llama", word_tokenizer(), torch.float64)
    path = tmp_path / "other" / "tokenizer.json"
    settings = json.loads(path.read_text())
    words = settings["model"]["vocab"]
    words["one"], words["two"] = words["two"], words["one"]
    path.write_text(json.dumps(settings))
    with pytest.raises(RunError, match="a base with another vocabulary than that of '.*other'"):
        MTPModel.from_pretrained(kept / "saved", base_model=str(tmp_path / "other"))


def test_a_base_of_other_weights(kept: Path, tmp_path: Path) -> None:
    save_base(tmp_path / "anew", "llama", word_tokenizer(), torch.float64, seed=3)
    with pytest.raises(RunError, match=r"'.*anew' has the shape of the base .*, but other weights \(\d+ of 128 looked at\)"):
        MTPModel.from_pretrained(kept / "saved", base_model=str(tmp_path / "anew"))
    with pytest.raises(RunError, match="but other weights"):
        MTPModel.from_pretrained(
            kept / "saved", base=AutoModelForCausalLM.from_pretrained(tmp_path / "anew"), base_model="another"
        )


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("saved_in", ["float64", "bfloat16", "float16"])
def test_the_same_base_in_any_dtype(kept: Path, tmp_path: Path, saved_in: str, dtype: str) -> None:
    MTPModel.from_pretrained(kept / "saved", dtype=saved_in).save_pretrained(tmp_path / "saved")
    MTPModel.from_pretrained(tmp_path / "saved", dtype=dtype)


def test_a_base_that_is_loaded_already(kept: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(kept / "base")
    expected = greedy_text(base, PROMPT[0], 20)
    model = MTPModel.from_pretrained(kept / "saved", base=base)
    assert model.base is base and greedy_text(base, PROMPT[0], 20) == expected
    assert model.generate(PROMPT, max_new_tokens=20).sequences[0, 3:].tolist() == expected
    with pytest.raises(UsageError, match="base carries LoRA layers already"):
        MTPModel.from_pretrained(kept / "saved", base=base)
    with pytest.raises(UsageError, match="base is loaded already: leave device and device_map out"):
        MTPModel.from_pretrained(kept / "saved", base=base, device="cpu")


def test_an_offloaded_base(kept: Path, tmp_path: Path) -> None:
    """Layers on disk, fetched by accelerate when they run."""
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    base = AutoModelForCausalLM.from_pretrained(kept / "base", device_map=places, offload_folder=tmp_path / "offloaded")
    assert {p.device.type for p in base.parameters()} == {"cpu", "meta"}
    model = MTPModel.from_pretrained(kept / "saved", base=base)
    whole = MTPModel.from_pretrained(kept / "saved")
    for decoding in ("quadratic", "linear", "autoregressive"):
        options = {"max_new_tokens": 20, "decoding": decoding}
        assert model.generate(PROMPT, **options).sequences.equal(whole.generate(PROMPT, **options).sequences)
        assert model.generate(PROMPT, **options).accepted_per_step == whole.generate(PROMPT, **options).accepted_per_step


def test_device_map_auto(kept: Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = MTPModel.from_pretrained(kept / "saved", device_map="auto")
    out = model.generate(PROMPT.to(model.base.device), max_new_tokens=20)
    assert out.sequences.cpu().equal(MTPModel.from_pretrained(kept / "saved").generate(PROMPT, max_new_tokens=20).sequences)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_quantised_base(tmp_path: Path, bits: str) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    # On a CPU bitsandbytes wants sizes that are multiples of 32.
    saved_model(tmp_path, dtype=torch.float32, hidden_size=64, intermediate_size=128, head_dim=32)
    model = MTPModel.from_pretrained(tmp_path / "saved", quantization=bits)
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    settings = BitsAndBytesConfig(**options) if bits == "4bit" else BitsAndBytesConfig(load_in_8bit=True)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=settings)
    given = MTPModel.from_pretrained(tmp_path / "saved", base=base)
    assert {type(layer.base_layer).__name__ for layer in lora_layers(model.base)} == {
        "Linear4bit" if bits == "4bit" else "Linear8bitLt"
    }
    out, same = (each.generate(PROMPT, max_new_tokens=12) for each in (model, given))
    assert out.sequences.shape == (1, 15) and out.sequences.equal(same.sequences)
    model.save_pretrained(tmp_path / "again")
    assert trained(MTPModel.from_pretrained(tmp_path / "again", quantization=bits)).keys() == trained(model).keys()


# Sampler heads of others

HEAD = (
    "from torch import nn\nfrom mtp_lightning.sampler_heads import SamplerHead\n\n\n"
    "class Added(SamplerHead):\n"
    "    def build(self, width):\n"
    "        self.layer = nn.Linear(width, width)\n"
    "        self.register_buffer('scale', 2 * self.layer.weight.detach()[0, :1])\n\n"
    "    def forward(self, hidden, previous):\n"
    "        return hidden + self.scale * self.layer(previous)\n\n"
    "    def step(self, hidden, previous, state):\n"
    "        return self(hidden, previous), None\n"
)


def test_a_head_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_heads.py").write_text(HEAD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    import my_heads

    model = saved_model(tmp_path, head=my_heads.Added())
    expected = model.generate(PROMPT, max_new_tokens=20)
    # Imported by this process already, as a training script has.
    loaded = MTPModel.from_pretrained("saved")
    assert loaded.sampler_head.scale.equal(model.sampler_head.scale)
    assert loaded.generate(PROMPT, max_new_tokens=20).accepted_per_step == expected.accepted_per_step
    # In the current folder.
    sys.modules.pop("my_heads")
    MTPModel.from_pretrained("saved")
    sys.modules.pop("my_heads")
    # Somewhere else on the path.
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    message = "the folder's sampler head is my_heads.Added, and opening a folder imports no other package"
    with pytest.raises(UsageError, match=message):
        MTPModel.from_pretrained("../saved")
    assert "my_heads" not in sys.modules
    MTPModel.from_pretrained("../saved", trust_remote_code=True)
    sys.modules.pop("my_heads")
    # Brought along by the saved folder.
    (tmp_path / "saved" / "my_heads.py").write_text(HEAD)
    monkeypatch.chdir(tmp_path / "saved")
    monkeypatch.syspath_prepend(tmp_path / "saved")
    with pytest.raises(UsageError, match=message):
        MTPModel.from_pretrained(".")
    assert "my_heads" not in sys.modules


# Writing


def test_a_folder_is_replaced_whole(here: Path, kept: Path) -> None:
    (here / "notes.txt").write_text("mine")
    (here / "old.json").write_text("{}")
    files = json.loads((here / "mtp_config.json").read_text())["files"]
    set_config(here, files={**files, "old.json": exporting.file_digest(here / "old.json")})
    model = MTPModel.from_pretrained(kept / "saved")
    model.save_pretrained(here)
    assert files_of(here) == {**files_of(kept / "saved"), "notes.txt": b"mine"}  # what was ours and is no more is gone
    assert [path.name for path in here.parent.iterdir()] == ["saved"]


def test_a_folder_of_something_else_is_refused(kept: Path, tmp_path: Path) -> None:
    model = MTPModel.from_pretrained(kept / "saved")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match="mine is there and was not written by mtp export: .* Choose another folder."):
        model.save_pretrained(tmp_path / "mine")
    assert files_of(tmp_path / "mine") == {"thesis.txt": b"years of work"}
    with pytest.raises(RunError, match=r"thesis.txt is a file. Choose a folder"):
        model.save_pretrained(tmp_path / "mine" / "thesis.txt")
    (tmp_path / "empty").mkdir()
    model.save_pretrained(tmp_path / "empty")
    assert set(files_of(tmp_path / "empty")) == FILES


@pytest.mark.parametrize("place", ["save_file", "card", "os.replace"])
@pytest.mark.parametrize("new", [True, False])
def test_a_write_that_fails_leaves_what_was_there(
    here: Path, kept: Path, monkeypatch: pytest.MonkeyPatch, place: str, new: bool
) -> None:
    model, before = MTPModel.from_pretrained(kept / "saved"), files_of(here)
    folder = here.parent / "new" if new else here

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    holder = exporting.os if place == "os.replace" else exporting
    monkeypatch.setattr(holder, place.removeprefix("os."), fail)
    with pytest.raises(RunError, match="can't be written: disk full. Choose another folder or make room."):
        model.save_pretrained(folder)
    assert files_of(here) == before and [path.name for path in here.parent.iterdir()] == ["saved"]


def test_a_base_without_a_name(tmp_path: Path) -> None:
    from tiny import tiny_model

    model = tiny_model()
    with pytest.raises(UsageError, match="the base model was not loaded from anywhere: say what it is called"):
        model.save_pretrained(tmp_path / "saved")
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path / "saved", base_model="owner/base", revision="main")
    config = json.loads((tmp_path / "saved" / "mtp_config.json").read_text())
    assert (config["base_model"], config["revision"]) == ("owner/base", "main")
    assert config["base"]["vocabulary"] is None


# The hub


@pytest.fixture
def hub(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache with the base at two commits and the saved folder, as downloads leave it; there is no network."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    for name, commits in (("base", ("a" * 40, "b" * 40)), ("mtp", ("c" * 40,))):
        for commit in commits:
            folder = cache / f"models--owner--{name}" / "snapshots" / commit
            for file, content in files_of(kept / "base").items() if name == "base" else ():
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                (folder / file).write_bytes(content)
        (cache / f"models--owner--{name}" / "refs").mkdir(parents=True)
        (cache / f"models--owner--{name}" / "refs" / "main").write_text(commits[0])
    model = MTPModel.from_pretrained(kept / "saved", base_model="owner/base")
    assert model.revision == "a" * 40
    model.save_pretrained(cache / "models--owner--mtp" / "snapshots" / ("c" * 40))
    return cache


def test_a_hub_id_and_the_revision_of_its_base(hub: Path) -> None:
    config = json.loads((hub / "models--owner--mtp/snapshots" / ("c" * 40) / "mtp_config.json").read_text())
    assert (config["base_model"], config["revision"]) == ("owner/base", "a" * 40)
    for name in ("owner/mtp", "owner/mtp@main", f"owner/mtp@{'c' * 40}"):
        model = MTPModel.from_pretrained(name)
        assert (model.base_model, model.revision) == ("owner/base", "a" * 40)
    (hub / "models--owner--base" / "refs" / "main").write_text("b" * 40)
    assert MTPModel.from_pretrained("owner/mtp").revision == "a" * 40  # the base moved on, the folder's commit is loaded
    message = f"belongs to revision {'a' * 40} of its base, and revision {'b' * 40} of 'owner/base' was given"
    with pytest.raises(RunError, match=message):
        MTPModel.from_pretrained("owner/mtp", revision="b" * 40)
    with pytest.raises(RunError, match=message):
        MTPModel.from_pretrained("owner/mtp", revision="main")
    with pytest.raises(RunError, match="no hub id that this machine can reach"):
        MTPModel.from_pretrained(f"owner/mtp@{'d' * 40}")


def test_push_to_hub(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Api:
        def __init__(self, token: str | None) -> None:
            calls.append(token)

        def create_repo(self, name: str, private: bool | None, exist_ok: bool) -> None:
            calls.append((name, private, exist_ok))

        def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> str:
            calls.append((repo_id, commit_message, files_of(folder_path)))
            return "https://hub/commit"

    monkeypatch.setattr(exporting, "HfApi", Api)
    model = MTPModel.from_pretrained(kept / "saved")
    with pytest.raises(
        UsageError, match="the base model is /.*base, which nobody else has: name its hub id with base_model"
    ):
        model.push_to_hub("owner/mtp")
    assert calls == []
    options = {"base_model": "owner/base", "revision": "a" * 40, "private": True, "token": "t"}
    assert model.push_to_hub("owner/mtp", **options) == "https://hub/commit"
    token, made, (name, message, files) = calls
    assert (token, made, name, message) == ("t", ("owner/mtp", True, True), "owner/mtp", "Upload with mtp-lightning")
    assert set(files) == FILES
    card = files["README.md"].decode()
    assert "\nbase_model: owner/base\n" in card and f"at revision `{'a' * 40}`" in card and str(kept) not in card
    assert "HERE = 'owner/mtp'" in files["custom_generate/generate.py"].decode()

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no such token")

    monkeypatch.setattr(Api, "create_repo", refuse)
    with pytest.raises(RunError, match="owner/mtp can't be uploaded: no such token. Check the name, the token"):
        model.push_to_hub("owner/mtp", **options)

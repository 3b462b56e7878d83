# SPDX-License-Identifier: Apache-2.0
"""``mtp benchmark``: its counts against plain loops, its clock against a fake one, its files, its command line."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bigram import bigram_base, bigram_text, planted_drafts
from command_line import error_of, leave_no_trace, mtp, own_cache  # noqa: F401 - some are fixtures
from prompt_results import result
from tiny import greedy_text, tiny_model, token_row
from tiny_run import LAST
from toy_tokenizers import word_tokenizer

from mtp_lightning.decoding.execution import step as decoding_step
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.evaluation import benchmark
from mtp_lightning.evaluation.benchmark import Setting, acceptance_grid, decode_batch, grid_settings, order
from mtp_lightning.evaluation.benchmark_report import markdown, save_benchmark_plot
from mtp_lightning.evaluation.benchmark_speed import (
    AUTOREGRESSIVE,
    LOOKUP,
    TRANSFORMERS,
    Timed,
    bare,
    batches_by_domain,
    measure_speed,
    speed_systems,
)
from mtp_lightning.model import MTPModel
from mtp_lightning.modeling.gated_lora import LoRA
from mtp_lightning.modeling.peft_private import lora_layers
from mtp_lightning.sampler_heads import GRUSamplerHead
from mtp_lightning.text.prompts import Prompt

VOCAB = 96
PROMPTS = [Prompt("", [1 + i, 5 + 7 * i], domain) for i, domain in enumerate(("code", "code", "maths", "code", "maths"))]
OPTIONS = DecodingOptions(max_new_tokens=20)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> MTPModel:
    """It counts up, token by token, and its drafts have planted mistakes: of J tokens 0, 1, .. or J are kept."""
    monkeypatch.setattr(decoding_step, "draft_block", planted_drafts(VOCAB, VOCAB))
    return MTPModel(bigram_base(VOCAB, VOCAB), 3, LoRA(rank=2)).eval()


@pytest.mark.parametrize("batch_size", [1, 2, 9])
def test_the_grid_against_plain_loops(model: MTPModel, batch_size: int) -> None:
    told: list[tuple[str, int, int]] = []
    settings = grid_settings(model, ["quadratic", "linear"], [True, False], [1, 2, 3])
    assert [tuple(each) for each in settings] == [
        (decoding, False, masks) for decoding in ("quadratic", "linear") for masks in (1, 2, 3)
    ]
    grid = acceptance_grid(model, PROMPTS, settings, OPTIONS, batch_size, lambda *each: told.append(each))
    json.dumps(grid, allow_nan=False)
    assert told[-1] == ("linear, base head, 3 masks", 5, 5) and told[0][0] == "autoregressive"
    assert grid["texts"]["overall"]["acceptance_length"] == 1
    assert max(each["overall"]["acceptance_length"] for each in grid["settings"]) > 1.5
    for setting, figures in zip(settings, grid["settings"], strict=True):
        counts: dict[str, list[tuple[int, int]]] = {}
        for prompt in PROMPTS:
            ids = torch.tensor([prompt.input_ids])
            out = model.generate(ids, max_new_tokens=20, decoding=setting.decoding, num_masks=setting.num_masks)
            assert out.sequences[0, 2:].tolist() == bigram_text(prompt.input_ids[-1], 20, VOCAB, VOCAB)
            counts.setdefault(prompt.domain, []).append((20, int(out.num_steps)))
        # In a batch a row near its end may be given more masks than alone, and planted drafts depend on their number.
        for domain, pairs in counts.items() if batch_size == 1 else ():
            expected = sum(tokens for tokens, _ in pairs) / sum(steps for _, steps in pairs)
            assert figures["domains"][domain]["acceptance_length"] == expected
        assert figures["overall"]["lossless"] == {"equal": 5, "checked": 5, "differences": []}
        assert (figures["decoding"], figures["sampler_head"], figures["num_masks"]) == tuple(setting)


@pytest.mark.parametrize("max_steps", [None, 3])
def test_a_lossy_decoder_is_caught_on_every_prompt(
    model: MTPModel, max_steps: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Every draft is believed.
    monkeypatch.setattr(decoding_step, "num_accepted", lambda draft, *others: torch.full((len(draft),), draft.shape[1]))
    options = DecodingOptions(max_new_tokens=20, max_steps=max_steps)
    grid = acceptance_grid(model, PROMPTS, [Setting("quadratic", False, 3)], options)
    lossless = grid["settings"][0]["overall"]["lossless"]
    assert lossless["checked"] == 5 and lossless["equal"] < 5
    assert len(lossless["differences"]) == 5 - lossless["equal"]


def test_sampling_is_compared_seed_by_seed() -> None:
    model = tiny_model(sampler_head=GRUSamplerHead(8))
    options = DecodingOptions(max_new_tokens=12, temperature=0.9, top_p=0.9, seed=4)
    settings = [Setting("quadratic", True, 2), Setting("linear", False, 3)]
    for batch_size in (1, 3):
        grid = acceptance_grid(model, PROMPTS, settings, options, batch_size)
        assert [each["overall"]["lossless"]["equal"] for each in grid["settings"]] == [5, 5]
    rejecting = DecodingOptions(max_new_tokens=12, temperature=0.9, verification="rejection", seed=4)
    grid = acceptance_grid(model, PROMPTS, settings, rejecting)
    assert [each["overall"]["lossless"]["checked"] for each in grid["settings"]] == [0, 0]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_stop_text_ends_every_text_alike(batch_size: int) -> None:
    model = tiny_model(sampler_head=GRUSamplerHead(8), vocab_size=17, seed=3)
    model.tokenizer = word_tokenizer()
    prompts = [Prompt("", [9 + i, 10], "") for i in range(4)]
    found, ends = 0, []
    for prompt in prompts:
        (whole,) = decode_batch(model, [prompt], OPTIONS).tokens
        words = [model.tokenizer.decode(whole[: i + 1], skip_special_tokens=True).split() for i in range(20)]
        ends.append(next((i + 1 for i in range(20) if "two" in words[i]), 20))
        found += ends[-1] < 20
    assert found and len(set(ends)) > 1
    for setting in grid_settings(model, ["quadratic", "linear"], [True], [1, 3]):
        options = DecodingOptions(setting.decoding, setting.num_masks, max_new_tokens=20)
        out = decode_batch(model, prompts, options, "two")
        assert [len(tokens) for tokens in out.tokens] == ends
        assert [sum(row) + len(row) for row in out.accepted] == ends
    grid = acceptance_grid(model, prompts, [Setting("quadratic", True, 3)], OPTIONS, batch_size, stop="two")
    assert grid["settings"][0]["overall"]["lossless"]["equal"] == 4
    assert grid["texts"]["overall"]["num_tokens"] == sum(ends)
    assert list(speed_systems(model, OPTIONS, [3], 1, "two")) == [AUTOREGRESSIVE, "quadratic, sampler head, 3 masks"]


def test_the_table_names_the_whole_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the paper's protocol has it, unless a number was asked for; then the texts are the same."""
    model, prompts, seen = tiny_model(num_masks=3), [Prompt("", token_row([n]).input_ids.tolist(), "") for n in (3, 8)], []
    original = benchmark.decode_batch
    monkeypatch.setattr(benchmark, "decode_batch", lambda *args: seen.append(args[2]) or original(*args))
    for asked in ("auto", "all", 5):
        grid = acceptance_grid(model, prompts, [Setting("quadratic", True, 3)], replace(OPTIONS, draft_vocabulary=asked))
        assert grid["settings"][0]["overall"]["lossless"]["equal"] == 2
    drafting = [each.draft_vocabulary for each in seen if each.decoding == "quadratic"]
    assert [*dict.fromkeys(drafting)] == ["all", 5]


def test_order() -> None:
    better, worse, same = (2, 2, 2), (0, 0, 0, 0, 0), (1, 1, 1)
    results = {
        Setting("quadratic", True, 1): [result(0, accepted=same), result(1, accepted=same)],
        Setting("quadratic", True, 2): [result(0, accepted=better), result(1, accepted=worse)],
        Setting("linear", True, 1): [result(0, accepted=same), result(1, accepted=better)],
        Setting("linear", True, 2): [result(0, accepted=better), result(1, accepted=better)],
    }
    assert order(results) == {
        "one mask more is lower: quadratic, sampler head": [0.5],
        "one mask more is lower: linear, sampler head": [0.0],
        "quadratic is below linear: sampler head": [0.5, 0.5],
    }


# Speed


def test_rounds_are_interleaved_and_ratios_paired() -> None:
    calls: list[tuple[str, int, int]] = []
    seconds = {
        AUTOREGRESSIVE: [1.0, 2.0, 4.0, 3.0],
        TRANSFORMERS: [0.5, 4.0, 2.0, 3.0],
        "quadratic, base head, 2 masks": [0.4, 1.0, 1.0, 6.0],
    }

    def contender(name: str) -> Any:
        times = iter([9.0, *seconds[name]])  # the warm-up first

        def decode(prompts: Sequence[Prompt], limit: int) -> Timed:
            calls.append((name, len(prompts), limit))
            return Timed([[1] * limit for _ in prompts], 5 if "masks" in name else limit, next(times))

        return decode

    batches = batches_by_domain(PROMPTS, 1, 4)
    assert [batch[0].domain for batch in batches] == ["code", "maths", "code", "maths"]
    found = measure_speed({name: contender(name) for name in seconds}, batches, 20)
    json.dumps(found, allow_nan=False)
    names = list(seconds)
    assert [name for name, _, _ in calls] == [*names, *names, *names[1:], names[0], names[2], *names[:2], *names]
    assert {limit for _, _, limit in calls[:3]} == {16} and {limit for _, _, limit in calls[3:]} == {20}
    fast = found["contenders"]["quadratic, base head, 2 masks"]
    for other in (AUTOREGRESSIVE, TRANSFORMERS):
        ratios = [base / own for base, own in zip(seconds[other], seconds[names[2]], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
        expected = {"median": median, "quartiles": [low, high], "num_pairs": 4}
        # torch's quantile interpolates, which rounds.
        assert fast["speed_up"][other]["num_pairs"] == 4
        assert fast["speed_up"][other]["median"] == pytest.approx(expected["median"], rel=1e-12)
        assert fast["speed_up"][other]["quartiles"] == pytest.approx(expected["quartiles"], rel=1e-12)
    assert fast["domains"]["maths"][AUTOREGRESSIVE]["median"] == pytest.approx((2 + 0.5) / 2)
    assert fast["tokens_per_second"] == 80 / 8.4 and fast["acceptance_length"] == 4.0
    assert fast["equal_texts"] == [4, 4]


def test_groups_are_of_one_domain() -> None:
    assert [[p.domain for p in batch] for batch in batches_by_domain(PROMPTS, 2, 9)] == [
        ["code"] * 2,
        ["maths"] * 2,
        ["code"],
    ]
    assert batches_by_domain(PROMPTS, 2, 0) == []


@pytest.mark.parametrize("batch_size", [1, 2])
def test_contenders_write_the_same_text(batch_size: int) -> None:
    model = tiny_model(sampler_head=GRUSamplerHead(8), eos_token_id=[3, 52])
    prompts = [Prompt("", [9, 10, 11], ""), Prompt("", [5, 6, 7, 8, 9], "")][:batch_size]
    field = speed_systems(model, OPTIONS, [1, 3, "auto"], batch_size)
    ours = [f"quadratic, sampler head, {masks}" for masks in ("1 mask", "3 masks", "auto", "auto without prompt lookup")]
    alone = speed_systems(model, replace(OPTIONS, prompt_lookup=False), [3, "auto"], batch_size)
    assert list(alone)[-2:] == [ours[1], ours[3]]
    assert list(field) == [AUTOREGRESSIVE, TRANSFORMERS, *([LOOKUP] if batch_size == 1 else []), *ours]
    expected = [greedy_text(model.base, torch.tensor(prompt.input_ids), 20) for prompt in prompts]
    assert 1 < len(expected[0]) < 20  # an end token ends it
    for run_one in field.values():
        timed = run_one(prompts, 20)
        assert timed.texts == expected and timed.seconds > 0
        assert timed.num_tokens == sum(map(len, expected))
    assert list(speed_systems(model, DecodingOptions(temperature=1.0), [2], 1)) == [
        AUTOREGRESSIVE,
        "quadratic, sampler head, 2 masks",
    ]


def test_texts_that_are_timed_are_whole_whatever_max_steps_says() -> None:
    model = tiny_model(sampler_head=GRUSamplerHead(8))
    field = speed_systems(model, DecodingOptions(max_new_tokens=20, max_steps=2), [2], 1)
    assert len({str(run_one(PROMPTS[:1], 20).texts) for run_one in field.values()}) == 1


def test_transformers_is_timed_without_our_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    names = list(model.state_dict())
    layers = lora_layers(model.base)
    assert layers
    with pytest.raises(KeyError), bare(model):
        assert not lora_layers(model.base)
        raise KeyError
    assert lora_layers(model.base) == layers and list(model.state_dict()) == names
    seen: list[int] = []
    generate = model.base.generate
    monkeypatch.setattr(
        model.base, "generate", lambda *a, **b: seen.append(len(lora_layers(model.base))) or generate(*a, **b)
    )
    speed_systems(model, OPTIONS, [], 1)[TRANSFORMERS]([PROMPTS[0]], 4)
    assert seen == [0]


# Files


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    model = tiny_model(sampler_head=GRUSamplerHead(8))
    prompts = [Prompt("", [9 + i, 10], domain) for i, domain in enumerate(["code", "maths", "code"])]
    settings = grid_settings(model, ["quadratic", "linear"], [True, False], [1, 2, 3])
    options = DecodingOptions(max_new_tokens=9)
    made: dict[str, Any] = {
        "model": "a model",
        "base_model": "a base",
        "prompts": "prompts.jsonl",
        "options": {"max_new_tokens": 20, "max_steps": None, "temperature": 0.0, "batch_size": 1},
        "dtype": "float64",
        "device": "a device",
        "torch": "0",
        "threads": 1,
        **acceptance_grid(model, prompts, settings, options),
        "speed": measure_speed(speed_systems(model, options, [1], 1), batches_by_domain(prompts, 1, 2), 6),
    }
    json.dumps(made, allow_nan=False)
    return made


def tables(text: str) -> list[list[list[str]]]:
    """The cells of each Markdown table."""
    blocks = [block for block in text.split("\n\n") if block.startswith("|")]
    return [[[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()] for block in blocks]


def test_markdown(report: dict[str, Any]) -> None:
    text = markdown(report)
    found = tables(text)
    assert len(found) == 4 + 1 + 2
    for table, (decoding, head) in zip(
        found, [(d, h) for d in ("quadratic", "linear") for h in (True, False)], strict=False
    ):
        rows = [each for each in report["settings"] if (each["decoding"], each["sampler_head"]) == (decoding, head)]
        assert table[0] == ["domain", "1", "2", "3"]
        assert [row[0] for row in table[2:]] == ["code", "maths", "mean of domains", "all prompts", "not repeating (texts)"]
        for row in table[2:4]:
            assert row[1:] == [f"{each['domains'][row[0]]['acceptance_length']:.2f}" for each in rows]
        means = [(e["domains"]["code"]["acceptance_length"] + e["domains"]["maths"]["acceptance_length"]) / 2 for e in rows]
        assert table[4][1:] == [f"{mean:.2f}" for mean in means]
        assert table[5][1:] == [f"{each['overall']['acceptance_length']:.2f}" for each in rows]
    assert "Equal to autoregressive decoding: 36 of 36 texts." in text
    assert [row[0] for row in found[5][2:]] == [AUTOREGRESSIVE, TRANSFORMERS, LOOKUP, "quadratic, sampler head, 1 mask"]
    assert found[6][0] == ["contender", "code", "maths"]


@pytest.mark.parametrize("domains", [[], ["a", "b", "c", "d", "e"]])
def test_any_number_of_domains(report: dict[str, Any], domains: list[str], tmp_path: Path) -> None:
    changed = json.loads(json.dumps(report))
    for each in (changed["texts"], *changed["settings"]):
        each["domains"] = {name: each["overall"] for name in domains}
    for each in changed["settings"]:
        each["num_masks"] = "auto" if each["num_masks"] == 3 else each["num_masks"]
    if not domains:
        changed["speed"] = None
    save_benchmark_plot(changed, tmp_path / "new" / "benchmark.png")
    assert (tmp_path / "new" / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    first = tables(markdown(changed))[0]
    assert first[0] == ["domain", "1", "2", "auto"]
    assert [row[0] for row in first[2:]] == [
        *domains,
        *(["mean of domains"] if domains else []),
        "all prompts",
        first[-1][0],
    ]


# The command


def test_the_command(run: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["benchmark", LAST, "--prompts", "prompts.jsonl", "--max_new_tokens", 8, "--dtype", "float64"]
    assert mtp(*words, "--speed_rounds", 2) == 0
    out, err = capsys.readouterr()
    report = json.loads(Path("benchmark/benchmark.json").read_text())
    assert {path.name for path in Path("benchmark").iterdir()} == {"benchmark.json", "benchmark.md", "benchmark.png"}
    assert out == Path("benchmark/benchmark.md").read_text() == markdown(report)
    assert "quadratic, sampler head, 2 masks: 2 of 2 prompts" in err and "speed: 2 of 2 rounds" in err
    assert [(e["decoding"], e["sampler_head"], e["num_masks"]) for e in report["settings"]] == [
        (decoding, head, masks) for decoding in ("quadratic", "linear") for head in (True, False) for masks in (1, 2, 3)
    ]
    assert all(each["overall"]["lossless"] == {"equal": 2, "checked": 2, "differences": []} for each in report["settings"])
    assert list(report["speed"]["contenders"]) == [
        AUTOREGRESSIVE,
        TRANSFORMERS,
        LOOKUP,
        *(
            f"quadratic, sampler head, {masks}"
            for masks in ("1 mask", "2 masks", "3 masks", "auto", "auto without prompt lookup")
        ),
    ]
    assert all(each["equal_texts"] == [2, 2] for each in report["speed"]["contenders"].values())
    # Named options restrict it.
    options = ["--decoding", "linear", "--sampler_head", "false", "--num_masks", 2, "--batch_size", 2, "--output", "other"]
    assert mtp(*words, *options, "--speed_rounds", 1, "--json", "--num_prompts", 2) == 0
    small = json.loads(capsys.readouterr().out)
    assert [(e["decoding"], e["sampler_head"], e["num_masks"]) for e in small["settings"]] == [("linear", False, 2)]
    assert list(small["speed"]["contenders"]) == [AUTOREGRESSIVE, TRANSFORMERS, "linear, base head, 2 masks"]
    match = next(e for e in report["settings"] if (e["decoding"], e["sampler_head"], e["num_masks"]) == ("linear", False, 2))
    assert small["settings"][0]["overall"]["num_steps"] == match["overall"]["num_steps"]
    assert mtp(*words, "--num_masks", "auto", "--speed_rounds", 0, "--decoding", "quadratic") == 0
    assert json.loads(Path("benchmark/benchmark.json").read_text())["speed"] is None


@pytest.mark.parametrize(
    ("options", "code", "expected"),
    [
        ("", 2, "the following arguments are required: prompts"),
        ("--prompts no.jsonl", 1, "no.jsonl: expected a file of prompts, nothing is there"),
        ("--prompts prompts.jsonl --batch_size 0", 2, "batch_size must be 1 or more, got 0. Change --batch_size."),
        ("--prompts prompts.jsonl --speed_rounds -1", 2, "speed_rounds must be 0 or more, got -1. Change --speed_rounds."),
        ("--prompts prompts.jsonl --num_prompts 0", 2, "num_prompts must be 1 or more, got 0. Change --num_prompts."),
        ("--prompts prompts.jsonl --num_masks 4", 2, "num_masks must be auto or from 1 to 3, the number this model was"),
        ("--prompts prompts.jsonl --decoding autoregressive", 2, "autoregressive decoding is what all others are compared"),
        ("--prompts prompts.jsonl --decoding cubic", 2, "decoding: expected"),
        (
            "--prompts prompts.jsonl --max_new_tokenz 3",
            2,
            "unrecognized arguments: --max_new_tokenz 3; did you mean max_new_tokens?",
        ),
        ("--prompts long.txt", 1, "long.txt, line 2: the prompt has 100 tokens and the model's context is 96: shorten it"),
        (
            "--prompts prompts.jsonl --output config.yaml",
            1,
            "config.yaml can't be written: 'config.yaml' is a file, not a folder. Give --output another folder.",
        ),
        ("--prompts prompts.jsonl --output config.yaml/a/b", 1, "config.yaml/a/b can't be written: 'config.yaml' is a file"),
        (
            "--prompts prompts.jsonl --num_masks x",
            2,
            "num_masks: expected int; expected 'auto'; expected null, got x",
        ),
    ],
)
def test_wrong_command_lines(run: Path, here: Path, capsys, options: str, code: int, expected: str) -> None:
    Path("long.txt").write_text("one\n" + "one " * 99 + "\n")
    found = error_of(capsys, code, "benchmark", LAST, *options.split())
    assert found.startswith(expected), found
    assert not Path("benchmark").exists()

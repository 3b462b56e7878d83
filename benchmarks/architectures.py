# SPDX-License-Identifier: Apache-2.0
"""Which of transformers' architectures can be a base: a tiny random model of each is trained and decoded.

``python benchmarks/architectures.py`` prints a Markdown table; ``--model_types granite phi`` tries others. In float64, on
models of four layers:

* masks: the states of the masks of a training batch are those of each prompt alone with the masks behind it, as
  transformers computes them without a cache, and the states of the tokens are the base's;
* text: trained on its own greedy text for 60 steps, so that drafts are accepted, it decodes the text of transformers'
  ``generate``.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from mtp_lightning.errors import one_line
from mtp_lightning.model import MTPModel
from mtp_lightning.modeling.gated_lora import LoRA
from mtp_lightning.modeling.masking import build_masked_input
from mtp_lightning.modeling.peft_private import lora_layers
from mtp_lightning.sampler_heads import GRUSamplerHead

sys.path.append(str(Path(__file__).parents[1] / "tests" / "helpers"))
from tiny import learn, naive_states, token_row  # noqa: E402

MODEL_TYPES = (
    "llama mistral ministral qwen2 qwen3 qwen2_moe qwen3_moe mixtral gemma gemma2 gemma3_text phi phi3 phimoe olmo "
    "olmo2 olmo3 olmoe smollm3 granite granitemoe cohere cohere2 stablelm starcoder2 glm glm4 exaone4 ernie4_5 "
    "seed_oss hunyuan_v1_dense nemotron helium arcee apertus bitnet gpt_oss deepseek_v3 gpt_neox gpt_bigcode gpt2 "
    "opt llama4_text lfm2 qwen3_next mamba"
).split()
MORE = {
    "olmoe": {"num_experts": 4},
    "gpt_oss": {"num_local_experts": 4},
    "deepseek_v3": {
        **{"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "q_lora_rank": 16, "kv_lora_rank": 16},
        **{"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4},
    },
    "lfm2": {"full_attn_idxs": [2]},
}
"""Settings that a tiny model of a type needs besides ``SIZES``."""
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "moe_intermediate_size": 24,
    "num_experts_per_tok": 2,
    "initializer_range": 0.3,  # at the usual 0.02 the greedy text is one token repeated
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
MASKS, TOKENS, WINDOW = 2, 16, 5


def tiny(model_type: str) -> PreTrainedModel:
    """A random model of a type, in float64, with a short window where it knows any."""
    torch.manual_seed(0)
    window = {"sliding_window": WINDOW} if hasattr(type(AutoConfig.for_model(model_type)), "sliding_window") else {}
    settings = SIZES | window | MORE.get(model_type, {})
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    if hasattr(base, "set_experts_implementation"):
        base.set_experts_implementation("eager")  # the default has no float64
    return base.double().eval()


def masks_are_right(model: MTPModel) -> bool:
    """True if a training batch has the states that each prompt has alone."""
    row = token_row([9])
    batch = build_masked_input([row], MASKS)
    with torch.no_grad():
        states = model.hidden_states(batch)
        for block, start in enumerate(batch.starts[0].tolist()):
            tokens, masks = naive_states(model, row.input_ids[: start + 1], MASKS)
            pairs = ((states.ntp[0, : start + 1], tokens), (states.mtp[0, block], masks))
            # Rounding of 1e-16 through four layers; kernels that take a softmax in float32 differ by 1e-7.
            if start >= 0 and not all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in pairs):
                return False
    return True


def decode(model: MTPModel, base_text: torch.Tensor, prompt: torch.Tensor) -> str:
    """What came of the text: equal or not, with the acceptance length."""
    learn(model, [base_text], 60).eval()
    out = model.generate(prompt[None], num_masks=MASKS, max_new_tokens=TOKENS)
    is_equal = out.sequences[0].tolist() == base_text.tolist()
    return f"{'equal' if is_equal else 'DIFFERENT'}, {TOKENS / int(out.num_steps[0]):.1f} tokens a step"


def trial(model_type: str) -> tuple[str, str]:
    """Cells of the table: masks, text."""
    try:
        base = tiny(model_type)
        prompt = token_row([7]).input_ids
        text = base.generate(prompt[None], do_sample=False, max_new_tokens=TOKENS, min_new_tokens=TOKENS)[0]
    except Exception as error:  # a tiny one can't be made, or this transformers has none
        return f"not tried: {one_line(error, 80)}", "-"
    try:
        torch.manual_seed(1)
        model = MTPModel(base, MASKS, LoRA(rank=4), GRUSamplerHead(16)).eval()
        for layer in lora_layers(base):  # begins at zero, where a gate at the wrong place would not be seen
            layer.lora_B["default"].weight.data.normal_(std=0.1)
        return "right" if masks_are_right(model) else "WRONG", decode(model, text, prompt)
    except Exception as error:
        return f"{type(error).__name__}: {one_line(error, 120)}", "-"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_types", nargs="+", default=MODEL_TYPES)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    print("| model type | masks | text |\n|---|---|---|")
    for model_type in options.model_types:
        masks, text = trial(model_type)
        print(f"| {model_type} | {masks} | {text} |", flush=True)


if __name__ == "__main__":
    main()

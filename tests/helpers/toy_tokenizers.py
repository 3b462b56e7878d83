# SPDX-License-Identifier: Apache-2.0
"""Tokenizers made on the spot, small enough to write token ids by hand, and rows of their words."""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>"]
WORDS = ["\n", "system", "user", "assistant", "one", "two", "three", "four", "five", "six", "<think>", "</think>"]
"""``\\n`` is 5, ``one`` is 9, ``six`` is 14."""

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def word_tokenizer(bos: bool = True, eos: bool = True) -> PreTrainedTokenizerFast:
    """Words are tokens: ids can be written down by hand. Spaces vanish, newlines are tokens."""
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(" +"), "removed"), pre_tokenizers.Split("\n", "isolated")]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<bos>" if bos else None,
        eos_token="<eos>" if eos else None,
        chat_template=CHATML,
    )


def texts(number: int, words: int = 4) -> list[dict[str, str]]:
    """Rows of a few words of ``word_tokenizer``, of three lengths in turn."""
    known = WORDS[4:10]
    return [
        {"text": " ".join(known[(row + place) % 6] for place in range(words + row % 3)), "domain": "d"}
        for row in range(number)
    ]


def byte_tokenizer(special: list[str], eos: str) -> PreTrainedTokenizerFast:
    """Bytes are tokens, with one merge, ``ab``; the special tokens come first."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE({token: number for number, token in enumerate([*special, *alphabet, "ab"])}, [("a", "b")])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos)


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """Pieces and bytes as Llama 2 has them: a space is put before each text, and the decoder drops the first one.

    ``</s>`` is 2, ``▁Paris`` 3, ``▁the`` 4, ``x`` 5, the bytes 6 to 261, ``▁`` 262, ``5`` 263, ``=`` 264, ``==`` 265.
    """
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        "▁Paris",
        "▁the",
        "x",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "5",
        "=",
        "==",
    ]
    model = models.BPE(
        {piece: number for number, piece in enumerate(pieces)}, [("=", "=")], unk_token="<unk>", byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in pieces[:3]])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")

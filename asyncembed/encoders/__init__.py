"""Models behind one protocol: rows of token ids in, vectors out."""

from asyncembed.encoders.base import Encoder, FloatMatrix, IdTokenizer, Tokenized, Tokenizer, default_chunk_size
from asyncembed.encoders.failures import FailureKind, classify
from asyncembed.encoders.loading import check_dim, load_encoder, tell_chunk_size
from asyncembed.encoders.prompts import (
    KINDS,
    Instruction,
    Kind,
    input_of,
    instruction_of,
    kind_prompt_of,
    kind_task_of,
    prompt_of,
    task_of,
)

__all__ = [
    "KINDS",
    "Encoder",
    "FailureKind",
    "FloatMatrix",
    "IdTokenizer",
    "Instruction",
    "Kind",
    "Tokenized",
    "Tokenizer",
    "check_dim",
    "classify",
    "default_chunk_size",
    "input_of",
    "instruction_of",
    "kind_prompt_of",
    "kind_task_of",
    "load_encoder",
    "prompt_of",
    "task_of",
    "tell_chunk_size",
]

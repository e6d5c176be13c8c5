"""Models behind one protocol: rows of token ids in, vectors out."""

from asyncembed.encoders.base import Encoder, FloatMatrix, Tokenized, Tokenizer
from asyncembed.encoders.failures import FailureKind, classify
from asyncembed.encoders.loading import load_encoder

__all__ = ["Encoder", "FailureKind", "FloatMatrix", "Tokenized", "Tokenizer", "classify", "load_encoder"]

"""The options of a job: validated once, and the only place for their defaults."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from asyncembed.errors import OptionsError

DEFAULT_MODEL = "all-MiniLM-L6-v2"
DEFAULT_SAVE_PATH = "data"

FILE_OPTIONS = ("input_format", "column", "header", "delimiter", "encoding", "escape", "on_bad_row")
"""Options that only concern the reading of a file."""

MODEL_OPTIONS = ("device", "backend", "dtype", "batch_size", "token_limit", "trust_remote_code", "allow_pickle")
"""Options that are decided with the model: a job on an embedder's model cannot choose them anew."""

REQUEST_OPTIONS = (
    "chunk_size",
    "chunk_overlap",
    "long_texts",
    "prompt",
    "prompt_name",
    "task",
    "normalize_embeddings",
    "truncate_dim",
)
"""Options about texts and vectors: a job on an embedder's model takes over what it does not name."""

Backend = Literal["auto", "torch", "openvino"]
DType = Literal["auto", "float32", "float16", "bfloat16", "int8"]
LongTexts = Literal["average", "truncate", "error"]
Blanks = Literal["error", "encode"]
OnError = Literal["continue", "raise"]
OnBadRow = Literal["stop", "skip"]
Durability = Literal["process", "power"]
InputFormat = Literal["auto", "txt", "csv", "json"]

_UNITS = {
    "": 1,
    "b": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", re.IGNORECASE)


def parse_bytes(value: int | str) -> int:
    """Bytes from a number or from text such as `"2GB"`, `"512 MiB"`, `"1.5g"`.

    Raises:
        OptionsError: It is neither, or not positive.
    """
    if isinstance(value, str):
        match = _SIZE.fullmatch(value)
        if match is None or match[2].lower() not in _UNITS:
            raise OptionsError(f"{value!r} is no amount of memory; write bytes, or for example '2GB' or '512MiB'")
        amount, unit = match[1], _UNITS[match[2].lower()]
        value = int(amount) * unit if amount.isdecimal() else round(float(amount) * unit)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise OptionsError(f"an amount of memory is a positive number of bytes, not {value!r}")
    return value


def check_prompt(name: str, prompt: str | None) -> None:
    """Refuse what no tokenizer takes.

    Raises:
        OptionsError: There is half a surrogate pair in it.
    """
    if prompt is not None and any("\ud800" <= character <= "\udfff" for character in prompt):
        raise OptionsError(f"{name}={prompt!r} holds half a surrogate pair, which is no character")


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbedOptions:
    """Everything a user may choose about a job, and need not.

    Attributes:
        model: A name, a path, a live `SentenceTransformer`, or an `Encoder`.
        device: `auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:1`, `mps`, …
        backend: What runs the model; `auto` is OpenVINO on a CPU where it is installed and agrees with torch, else
            torch.
        dtype: Precision of the model; `auto` is float32 on a CPU, and on resume what the folder was made with. `int8`
            needs OpenVINO.
        save_path: Folder of the results; None writes nothing.
        batch_size: Most rows in a batch; None leaves it to the token limit.
        max_memory_usage: Bytes that texts in flight may take, or text such as `"2GB"`; None decides from what is free.
        token_limit: First limit of a batch in padded tokens; None lets the estimator choose.
        chunk_size: Most tokens of a chunk, without special tokens and prompt; None takes what the model takes.
        chunk_overlap: Tokens that neighbouring chunks of a long text share.
        long_texts: What becomes of a text longer than a chunk: `average` of its chunks, `truncate`, or `error`.
        prompt: Put before every chunk; wins over `prompt_name`.
        prompt_name: Name of one of the model's own prompts.
        task: Which of its routes or adapters a model that has several takes, as `encode(task=…)` does.
        normalize_embeddings: Scale every vector to length 1.
        truncate_dim: Keep only the first dimensions of each vector.
        ordered: Yield results in the order of the input.
        on_error: What a failed text does: `continue` (it is a result), or `raise`.
        on_bad_row: What a row of a file that cannot be a text does: `stop` the run, or `skip` it.
        overwrite: Empty the folder's earlier results first.
        durability: What a saved text outlives: a killed `process`, or a cut of the `power` (slower).
        trust_remote_code: Let a model run code that it brings along.
        allow_pickle: Let a model's weights be read from a pickle where there are no safetensors.
        input_format: Format of an input file; `auto` goes by its extension.
        column: Name of the CSV column of the texts; implies `header`.
        header: The first row of a CSV file holds names.
        delimiter: What stands between the cells of a CSV file, one character or `tab`; None is a comma.
        encoding: What an input file is written in; None is UTF-8.
        escape: What makes the next character of a CSV file an ordinary one, such as a backslash.
    """

    model: Any = DEFAULT_MODEL
    device: str = "auto"
    backend: Backend = "auto"
    dtype: DType = "auto"
    save_path: str | os.PathLike[str] | None = DEFAULT_SAVE_PATH
    batch_size: int | None = None
    max_memory_usage: int | str | None = None
    token_limit: int | None = None
    chunk_size: int | None = None
    chunk_overlap: int = 0
    long_texts: LongTexts = "average"
    prompt: str | None = None
    prompt_name: str | None = None
    task: str | None = None
    normalize_embeddings: bool = False
    truncate_dim: int | None = None
    ordered: bool = False
    on_error: OnError = "continue"
    on_bad_row: OnBadRow = "stop"
    overwrite: bool = False
    durability: Durability = "process"
    trust_remote_code: bool = False
    allow_pickle: bool = False
    input_format: InputFormat = "auto"
    column: str | None = None
    header: bool = False
    delimiter: str | None = None
    encoding: str | None = None
    escape: str | None = None

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise OptionsError(f"{name}={getattr(self, name)!r} is not one of {', '.join(map(repr, allowed))}")
        for name in ("batch_size", "token_limit", "chunk_size", "truncate_dim"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise OptionsError(f"{name}={value!r} must be a whole number of at least 1, or None")
        for name in ("normalize_embeddings", "ordered", "overwrite", "header", "trust_remote_code", "allow_pickle"):
            if not isinstance(getattr(self, name), bool):
                raise OptionsError(f"{name}={getattr(self, name)!r} must be True or False")
        overlap = self.chunk_overlap
        if isinstance(overlap, bool) or not isinstance(overlap, int) or overlap < 0:
            raise OptionsError(f"chunk_overlap={overlap!r} must be a whole number of at least 0")
        if self.chunk_size is not None and overlap >= self.chunk_size:
            raise OptionsError(f"chunk_overlap={overlap} must be smaller than chunk_size={self.chunk_size}")
        if not isinstance(self.device, str) or not self.device:
            raise OptionsError(f"device={self.device!r} must be a name such as 'auto', 'cpu' or 'cuda:0'")
        if self.save_path is not None and not isinstance(self.save_path, (str, os.PathLike)):
            raise OptionsError(f"save_path={self.save_path!r} must be a folder, or None to write nothing")
        if self.save_path is not None and not os.fspath(self.save_path):
            raise OptionsError("save_path is empty; name a folder, or None to write nothing")
        for name in ("prompt", "prompt_name", "task", "column", "delimiter", "encoding", "escape"):
            if not isinstance(getattr(self, name), (str, type(None))):
                raise OptionsError(f"{name}={getattr(self, name)!r} must be text, or None")
        check_prompt("prompt", self.prompt)
        if self.model is None or isinstance(self.model, (bool, int, float)):
            raise OptionsError(f"model={self.model!r} must be a name, a folder, a SentenceTransformer, or an Encoder")
        self.max_memory_bytes  # noqa: B018  # refuses what is no amount of memory now, not mid-run

    @property
    def max_memory_bytes(self) -> int | None:
        """`max_memory_usage` in bytes; None if the machine decides."""
        return None if self.max_memory_usage is None else parse_bytes(self.max_memory_usage)

    @property
    def folder(self) -> Path | None:
        """`save_path` as a path; None if nothing is written."""
        return None if self.save_path is None else Path(self.save_path)

    @classmethod
    def from_kwargs(cls, **options: Any) -> EmbedOptions:
        """Options from keyword arguments, an unknown one refused by name.

        Raises:
            OptionsError: A name is unknown or a value cannot be.
        """
        known = [field.name for field in fields(cls)]
        unknown = [name for name in options if name not in known]
        if unknown:
            raise OptionsError(f"unknown option {unknown[0]!r}; there are {', '.join(known)}")
        return cls(**options)


_CHOICES: dict[str, tuple[Any, ...]] = {
    "backend": get_args(Backend),
    "dtype": get_args(DType),
    "long_texts": get_args(LongTexts),
    "on_error": get_args(OnError),
    "on_bad_row": get_args(OnBadRow),
    "durability": get_args(Durability),
    "input_format": get_args(InputFormat),
}

"""What the user asked the server to be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from asyncembed.options import DEFAULT_MODEL

DEFAULT_BODY_BYTES = 16 * 2**20
DEFAULT_INPUTS = 2048
"""What OpenAI's own service takes in a request."""
DEFAULT_DRAIN_S = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerSettings:
    """A command line, parsed.

    Attributes:
        model: A name or a folder.
        options: Further keyword arguments of `AsyncEmbedder`.
        aliases: Names that clients may use for the model, besides its own.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        api_key: What clients must send as bearer token; None lets everyone in.
        cors_origins: Origins whose pages may ask from a browser; `*` is any.
        root_path: Prefix under which a proxy serves this, such as `/embed`.
        max_body_bytes: Most bytes of a request's body, also after unpacking.
        max_inputs: Most texts of a request.
        accept_token_ids: Whether texts may be given as token ids: nothing tells ids of another vocabulary.
        drain_s: How long requests under way may take after SIGTERM.
    """

    model: str = DEFAULT_MODEL
    options: Mapping[str, Any] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    cors_origins: tuple[str, ...] = ()
    root_path: str = ""
    max_body_bytes: int = DEFAULT_BODY_BYTES
    max_inputs: int = DEFAULT_INPUTS
    accept_token_ids: bool = False
    drain_s: float = DEFAULT_DRAIN_S

    @property
    def names(self) -> tuple[str, ...]:
        """What clients may call the model, its own name first; of a folder that is its last part."""
        own = PurePath(self.model).name or self.model
        known = [own, self.model, *self.aliases]
        if self.model == DEFAULT_MODEL:
            known.append(f"sentence-transformers/{DEFAULT_MODEL}")
        return tuple(dict.fromkeys(known))

"""The help page at `/`: one file of HTML that needs nothing else."""

from __future__ import annotations

from html import escape

from asyncembed.server.settings import ServerSettings

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 48rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
pre { background: #f4f4f4; padding: .8rem; overflow-x: auto; border-radius: 4px }
code { font-size: .9em } td, th { text-align: left; padding: .2rem 1rem .2rem 0; vertical-align: top }
@media (prefers-color-scheme: dark) { body { background: #181818; color: #ddd } pre { background: #262626 } }
"""

ENDPOINTS = (
    ("POST /v1/embeddings", "vectors of a text, or of a list of texts"),
    ("GET /v1/models", "the names of the model; /v1/models/NAME for one"),
    ("GET /health", "200 when the model is ready, 503 before and after; never needs a key"),
    ("GET /metrics", "figures for Prometheus"),
    ("GET /", "this page"),
)

_CURL = """curl {url}/v1/embeddings -H 'Content-Type: application/json'{key} \\
  -d '{{"model": "{model}", "input": ["a heron on the river", "a boat at the mooring"]}}'"""

_PYTHON = """from openai import OpenAI

client = OpenAI(base_url="{url}/v1", api_key="{key}")
answer = client.embeddings.create(model="{model}", input=["a heron on the river", "a boat at the mooring"])
print(len(answer.data), "vectors of", len(answer.data[0].embedding), "dimensions")"""


def help_page(settings: ServerSettings, url: str, state: str, facts: str) -> str:
    """The page."""
    model = settings.names[0]
    has_key = settings.api_key is not None
    header = ' -H "Authorization: Bearer $ASYNCEMBED_API_KEY"' if has_key else ""
    curl = _CURL.format(url=url, model=model, key=header)
    python = _PYTHON.format(url=url, model=model, key="…" if has_key else "none needed")
    rows = "".join(f"<tr><td><code>{escape(path)}</code></td><td>{escape(what)}</td></tr>" for path, what in ENDPOINTS)
    names = ", ".join(f"<code>{escape(name)}</code>" for name in settings.names)
    limits = (
        f"A request takes up to {settings.max_inputs:,} texts and {settings.max_body_bytes:,} bytes. When too much is "
        "under way the answer is 429 with <code>Retry-After</code>. Texts longer than the model takes are embedded in "
        "chunks and averaged, unless the server was told otherwise. <code>dimensions</code> keeps the first of each "
        "vector and scales it to length 1; <code>encoding_format</code> is <code>float</code> or <code>base64</code>. "
        "<code>input_type</code> (<code>query</code>, <code>document</code>), <code>prompt_name</code> and "
        "<code>task</code> choose one of the model's own prompts and routes."
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>asyncembed: {escape(model)}</title><style>{_STYLE}</style></head><body>
<h1>asyncembed</h1>
<p>Embeddings of <b>{escape(model)}</b>, the way OpenAI serves them. The model is {escape(state)}{escape(facts)}.
It answers to {names}.</p>
<h2>Try it</h2><pre>{escape(curl)}</pre><pre>{escape(python)}</pre>
<h2>Endpoints</h2><table>{rows}</table>
<h2>Limits</h2><p>{limits}</p>
</body></html>
"""

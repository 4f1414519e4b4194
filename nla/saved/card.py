"""The model card of a saved model: README.md, with the front matter that model hubs read."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

TEXT = """```python
import nla  # registers the format with transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
```

`nla.load_compressed(FOLDER)` does the same and verifies the digests of all files first."""

IMAGES = """```python
import nla
from timm.data import create_transform, resolve_model_data_config

model = nla.load_compressed(FOLDER)  # a timm model; the digests of all files are verified
transform = create_transform(**resolve_model_data_config(model), is_training=False)
```"""


@dataclass(frozen=True)
class About:
    """What a model card says about a model beyond its own numbers.

    Attributes:
        base: name of the model that was compressed.
        licence: licence of that model.
        rows: further rows (what, value) of the card's table.
        figures: text in Markdown on how good the model is.
    """

    base: str = "unknown"
    licence: str = "unknown"
    rows: Sequence[tuple[str, str]] = ()
    figures: str = "None were measured."


def card(about: About, counts: Sequence[tuple[str, str]], loading: str) -> str:
    """The text of README.md. `counts` are rows (what, value) on the size of the model, `loading` says how to load it."""
    identifier = about.licence.lower() if re.fullmatch(r"[A-Za-z0-9.-]+", about.licence) else "other"
    rows = [("base model", about.base), ("licence of the base model", about.licence), *about.rows, *counts]
    table = "\n".join(f"| {what} | {value} |" for what, value in rows)
    return f"""---
base_model: {about.base}
license: {identifier}
library_name: nla
tags: [compressed, low-rank, nla]
---

# {about.base}, compressed

The linear layers of this model are sums of low-rank or nonlinear terms instead of dense matrices.

| | |
|---|---|
{table}

## Figures

{about.figures}

## Loading

{loading}

Without `import nla`, transformers refuses to load this folder. `python -m nla.export FOLDER --to dense OUT` writes an ordinary
model with the same matrices, in the dense model's size, that any tool loads.
"""

"""Published figures of analysis/paper.yaml as data frames, and their joins with measured figures."""

from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

PAPER = Path(__file__).with_name("paper.yaml")


@cache
def contents() -> dict[str, Any]:
    """The content of paper.yaml."""
    return yaml.safe_load(PAPER.read_text())


def paper(table: str) -> pd.DataFrame:
    """One table of published figures, with the full source in the last column."""
    content = contents()
    return pd.DataFrame(content[table]).assign(source=lambda rows: rows["source"].map(content["sources"]))


def sources() -> pd.DataFrame:
    """The full sources by the names that columns use."""
    return pd.Series(contents()["sources"], name="source").to_frame()


def published_by(table: str, keys: dict[str, str]) -> pd.DataFrame:
    """One table of published figures, indexed by some of its columns under new names. The others begin with `published`."""
    rows = paper(table).rename(columns=keys).set_index(list(keys.values()))
    return rows.rename(columns={name: f"published {name}" for name in rows if name != "source"})


def perplexity_by_source(data: str, retrained: bool) -> pd.DataFrame:
    """Published perplexities of LLaMA-7B on a text by (removed, method): one column per source."""
    rows = pd.DataFrame(contents()["perplexity"]).rename(columns={"ratio": "removed"})
    rows = rows[(rows["retrained"] == retrained) & rows[data].notna()]
    return rows.pivot(index=["removed", "method"], columns="source", values=data).add_prefix("published by ")


def beside(published: pd.DataFrame, measured: pd.Series, twin: pd.Series, minus: pd.Series | None) -> pd.DataFrame:
    """Published figures, `measured`, `difference` (measured minus published, if `minus` is given) and the twin's figures.

    The rows are those that are published and those of `measured`.
    """
    names = published.index.names
    measured, twin = measured.rename_axis(names), twin.rename_axis(names)
    table = published.reindex(published.index.union(measured.index)).assign(measured=measured)
    if minus is not None:
        table["difference"] = measured - minus
    return table.assign(**{str(twin.name): twin})

"""Settings of conf/ composed by Hydra, as a command line with the same overrides has them."""

from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir

from nla.harness.settings import check_settings

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"


@cache
def composed(*overrides: str) -> dict[str, Any]:
    """The checked and resolved settings of `python run.py OVERRIDES`. Callers must not change them: they are kept."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return check_settings(compose("config", overrides=list(overrides)))


@cache
def sweep(experiment: str) -> dict[str, list[str]]:
    """{setting: its values} of the sweep of an experiment. It is empty for an experiment of one row."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        hydra = compose("config", overrides=[f"experiment={experiment}"], return_hydra_config=True).hydra
    return {key: str(values).split(",") for key, values in dict(hydra.sweeper.params or {}).items()}


def leaves(settings: dict[str, Any], ignored: set[str], prefix: str = "") -> dict[str, Any]:
    """{dotted key: value} of nested settings, without keys whose last part is in `ignored`."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            found |= leaves(value, ignored, f"{prefix}{key}.")
        elif key not in ignored:
            found[prefix + key] = value
    return found

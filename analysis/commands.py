"""The runs that the commands in a text make."""

import re
import shlex
from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser

from analysis.composed import composed, sweep
from analysis.experiments import as_recorded, compared, equal, same_kind
from nla.harness.record import RunRecord

COMMAND = re.compile(r"python run\.py((?:\\\n|[^\n`#])*)")
PLAIN = ("ratio", "bits", "seed")  # no other setting depends on these, so that runs of all their values are composed once


def commanded(text: str) -> list[dict[str, Any]]:
    """The settings of every run of every `python run.py` in a text."""
    words = [shlex.split(match[1].replace("\\\n", " ")) for match in COMMAND.finditer(text)]
    return [settings for overrides in words for settings in made_by(*(word for word in overrides if word != "-m"))]


@cache
def made_by(*overrides: str) -> list[dict[str, Any]]:
    """The settings of every run of a command, which may be a sweep."""
    asked = swept(overrides)
    plain = {key: asked.pop(key) for key in PLAIN if key in asked}
    found = []
    for row in product(*asked.values()):
        settings = composed(*(f"{key}={value}" for key, value in zip(asked, row, strict=True)))
        if "bits" in plain:  # which take the place of the ratio
            settings = settings | {"ratio": None}
        for own in product(*plain.values()):
            numbers = (None if value == "null" else float(value) for value in own)
            found.append(settings | dict(zip(plain, numbers, strict=True)))
    return found


def swept(overrides: tuple[str, ...]) -> dict[str, list[str]]:
    """{setting: its values} of a command, with the sweep of its experiment."""
    asked = dict(pairs(overrides))
    return sweep(asked["experiment"][0]) | asked if "experiment" in asked else asked


def pairs(overrides: tuple[str, ...]) -> Iterator[tuple[str, list[str]]]:
    """(setting, its values) of overrides such as `ratio=0.5,0.7`."""
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        values = override.sweep_string_iterator() if override.is_sweep_override() else [override.get_value_element_as_str()]
        yield override.key_or_group, list(values)


def makes(settings: dict[str, Any], record: RunRecord) -> bool:
    """Whether a run with these settings gives this record."""
    config, wanted = record.config, compared(as_recorded(settings, record.config))
    if not any(fit.steps for fit in record.fits):  # a number of steps that none of them took has no effect
        wanted.pop("method.solver.steps", None)
    numbers = all(settings.get(key) == config.get(key) for key in PLAIN)
    return numbers and same_kind(settings, config) and equal(wanted, compared(config))

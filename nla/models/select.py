"""Selects the linear layers to compress, by their qualified names, so that no model family is a special case."""

import re
from collections import Counter
from dataclasses import dataclass

from torch import nn

from nla.machine.errors import UserError


@dataclass(frozen=True)
class LinearSpec:
    """A linear layer: its qualified name and the shape of its weight."""

    name: str
    out_features: int
    in_features: int
    tied: bool = False  # another module uses the same weight

    @property
    def n_params(self) -> int:
        return self.out_features * self.in_features


def linear_specs(model: nn.Module) -> list[LinearSpec]:
    """All nn.Linear layers of the model, in the order of its modules. The model may be on the meta device."""
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    return [
        LinearSpec(name, module.out_features, module.in_features, owners[id(module.weight)] > 1)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]


def part_of(holder: nn.Module, parameter: str) -> str | None:
    """The part of `retrain.train` that a module's parameter belongs to, if it is not of a compressed term.

    Args:
        parameter: its name in the module.
    """
    if "norm" in type(holder).__name__.lower():
        return "norms"
    return "biases" if parameter == "bias" else None


def select_linears(specs: list[LinearSpec], include: str, exclude: str | None) -> list[LinearSpec]:
    """The layers whose names match `include` and not `exclude` (regular expressions that are searched in the names).

    Raises:
        UserError: an expression is invalid; no layer matches `include`; `exclude` matches all of them; or a selected layer
            shares its weight with another module.
    """
    wanted = [s for s in specs if pattern("select.include", include).search(s.name)]
    if not wanted:
        names = ", ".join(s.name for s in specs[:3])
        raise UserError(
            f"select.include={include} is found in none of the {len(specs)} linear layers; their names are like {names}"
        )
    kept = [s for s in wanted if exclude is None or not pattern("select.exclude", exclude).search(s.name)]
    if not kept:
        raise UserError(f"select.exclude={exclude} excludes all {len(wanted)} layers that select.include={include} finds")
    tied = [s.name for s in kept if s.tied]
    if tied:
        raise UserError(
            f"{tied[0]} shares its weight with another layer, so compressing it would only add parameters; "
            f"use select.exclude='{re.escape(tied[0])}'"
        )
    return kept


def pattern(setting: str, expression: str) -> re.Pattern:
    """The compiled regular expression. Raises UserError, which names the setting, if it is invalid."""
    try:
        return re.compile(expression)
    except re.error as error:
        raise UserError(f"{setting}={expression} is not a regular expression: {error}") from error

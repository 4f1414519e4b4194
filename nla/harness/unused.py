"""Finds settings of the command line that a request does not use, and says so."""

import logging
import re
from collections.abc import Sequence

from nla.harness.record import module_name
from nla.harness.request import PreparedRun

log = logging.getLogger(__name__)
NO_STEPS = "retrain.steps=0"


def tell_unused(arguments: Sequence[str], prepared: PreparedRun) -> None:
    """Log one line for each argument that the request does not use, such as `kernel=phase is not used by method=svd`.

    Args:
        arguments: settings as typed, `group=option` or `group.key=value`.
    """
    reasons = unused_groups(prepared)
    for argument in arguments:
        group = re.sub(r"\W.*", "", argument.lstrip("+~"))
        if group in reasons and argument != NO_STEPS:
            log.info("%s is not used by %s", argument, reasons[group])


def unused_groups(prepared: PreparedRun) -> dict[str, str]:
    """{group: the settings that do not use it}. The configuration in the record has none of these groups."""
    values = prepared.values
    method, budget = (f"{group}={module_name(values[group])}" for group in ("method", "budget"))
    samples, retrained = "statistics" in values, "retrain" in values
    trained = values["model"].get("training") == prepared.settings["calibration"]  # a model that the harness trains itself
    used = {
        "kernel": ("kernel" in values["method"], method),
        "storage": ("storage" in values["method"], method),
        "solver": ("solver" in values["method"], method),
        "schedule": ("schedule" in values["budget"], budget),
        "statistics": (samples, f"{method} and {budget}"),
        "calibration": (samples or retrained or trained, f"{method}, {budget} and {NO_STEPS}"),
        "retrain": (retrained, NO_STEPS),
        "prompt": ("prompt" in values, "a model that reads images"),
    }
    return {group: by for group, (is_used, by) in used.items() if not is_used}

"""Seeds of random generators."""

from typing import Any

from nla.machine.cache import digest


def seed_of(*parts: Any) -> int:
    """A seed that depends on these JSON values alone, such as a run's seed and the number of a step."""
    return int(digest(list(parts))[:15], 16)

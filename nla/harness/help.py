"""The options of every configuration group, as `--help` lists them."""

import textwrap

from nla.harness.unknown_settings import CONF


def listed_options() -> str:
    """For each group a paragraph of at most 80 columns: its name, and its options in alphabetical order."""
    said = []
    for group in sorted(path for path in CONF.iterdir() if path.is_dir()):
        names = ", ".join(sorted(path.stem for path in group.glob("*.yaml")))
        said.append(textwrap.fill(f"{group.name}: {names}", 80, subsequent_indent="  ", break_on_hyphens=False))
    return "\n".join(said)

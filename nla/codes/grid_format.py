"""The format of a grid, its size in bits, and the formats that fit into a budget."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from nla.codes.levels import Levels, levels_of
from nla.codes.packed import packed_width

WIDTHS = (1, 2, 3, 4, 8)
GROUPS = (32, 64, 128)  # and whole rows
SCALE_BITS = 16  # a scale is a bfloat16 number


@dataclass(frozen=True)
class GridFormat:
    """How the numbers of a matrix (out, in) are stored.

    Attributes:
        width: bits of a code.
        group: consecutive inputs of a row that share a scale and a zero point. The last group of a row may be shorter.
        kind: the levels, `uniform` or `nf4`.
    """

    width: int
    group: int
    kind: str = "uniform"

    @cached_property
    def levels(self) -> Levels:
        return levels_of(self.kind, self.width)

    def groups(self, in_features: int) -> int:
        """Groups of a row."""
        return -(-in_features // self.group)

    def zero_bytes(self, out_features: int, in_features: int) -> int:
        """Bytes of all zero points. They are packed as one row."""
        return packed_width(out_features * self.groups(in_features), self.width) if self.levels.has_zeros else 0

    def bits(self, out_features: int, in_features: int) -> int:
        """Bits of a matrix: packed codes with the filling of their last bytes, zero points and scales."""
        codes = out_features * packed_width(in_features, self.width) + self.zero_bytes(out_features, in_features)
        return 8 * codes + SCALE_BITS * out_features * self.groups(in_features)

    def describe(self) -> str:
        """Text for tables, such as `int2 group=64`."""
        return f"{f'int{self.width}' if self.kind == 'uniform' else self.kind} group={self.group}"


def formats(in_features: int) -> list[GridFormat]:
    """All uniform formats for rows of this length. A group is at most a row."""
    groups = sorted({min(group, in_features) for group in (*GROUPS, in_features)})
    return [GridFormat(width, group) for width in WIDTHS for group in groups]


def largest(found: Iterable[GridFormat], out_features: int, in_features: int, bits: int) -> GridFormat | None:
    """The format that takes most of `bits` bits; of equals, that with the wider codes. None if all take more."""
    sizes = [(f.bits(out_features, in_features), f.width, f.group, f) for f in found]
    return max((row for row in sizes if row[0] <= bits), key=lambda row: row[:3], default=(None,))[-1]


def least_grid_bits(out_features: int, in_features: int) -> int:
    """Bits of the smallest grid: codes of 1 bit, one group a row."""
    return GridFormat(1, in_features).bits(out_features, in_features)

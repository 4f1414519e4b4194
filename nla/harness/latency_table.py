"""The table of a run's latencies beside those of the dense model."""

from tabulate import tabulate

from nla.harness.record import RunRecord

HEADERS = ["model", "scenario", "ms", "of dense (quartiles)", "peak MB", "MB per item"]


def latency_table(record: RunRecord) -> str:
    """A row per stage and scenario of `task=latency` that was measured in turns with the dense model; "" without any.

    ms is the median time of a prompt, a step or a batch. `of dense` is its ratio to dense, with the quartiles over the rounds.
    peak MB is beside the weights. MB per item are the weights that are read for one token or image.
    """
    rows = []
    for stage, tasks in record.metrics.items():
        for scenario, found in tasks.get("latency", {}).items():
            if "to_dense" in found:
                low, middle, high = (found[f"to_dense{end}"] for end in ("_q25", "", "_q75"))
                read = next(value for name, value in found.items() if name.startswith("parameter_bytes_per_"))
                row = [stage, scenario, f"{1e3 * found['seconds']:.4g}", f"{middle:.2f} ({low:.2f} to {high:.2f})"]
                rows.append([*row, f"{found['peak_bytes'] / 1e6:.4g}", f"{read / 1e6:.4g}"])
    table = tabulate(rows, HEADERS, disable_numparse=True)
    return f"beside dense, in turns (MB per item: weights read for a token or image):\n{table}" if rows else ""

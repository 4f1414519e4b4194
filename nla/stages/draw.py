"""Draw the figures of a run."""

from pathlib import Path

from nla.harness.record import RunRecord


def draw(record: RunRecord, folder: Path) -> None:
    """Draw the figures of a run into its folder, as PNG files."""
    from analysis import plots
    from analysis.frames import fits_frame

    plots.loss_by_layer(fits_frame([record])).savefig(folder / "loss_by_layer.png", dpi=120)
    if record.retraining:
        plots.retraining(record.history).savefig(folder / "retraining.png", dpi=120)
        plots.kept_by_matrix(record.fits).savefig(folder / "kept.png", dpi=120)

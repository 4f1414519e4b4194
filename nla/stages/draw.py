"""Draw the figures of a run and of a sweep."""

import logging
from pathlib import Path

from nla.harness.record import RunRecord, read_record

log = logging.getLogger(__name__)


def draw(record: RunRecord, folder: Path) -> None:
    """Draw the figures of a run into its folder, as PNG files."""
    from analysis import plots
    from analysis.frames import fits_frame

    plots.loss_by_layer(fits_frame([record])).savefig(folder / "loss_by_layer.png", dpi=120)
    if record.retraining:
        plots.retraining(record.history).savefig(folder / "retraining.png", dpi=120)
        plots.kept_by_matrix(record.fits).savefig(folder / "kept.png", dpi=120)


def draw_sweep(runs: list[Path], folder: Path) -> None:
    """Draw the error of every matrix for all these runs into `folder`, if they are of one model at one size.

    The error is that of the layers' outputs if all runs have it, else that of the weights.
    """
    from analysis import plots
    from analysis.frames import fits_frame

    records = [read_record(run) for run in runs]
    fits = fits_frame(records)
    if len(records) < 2 or len(fits.drop_duplicates(["model", "ratio"])) > 1:
        return
    weighted = bool(fits["weighted_error"].notna().all())
    figure = plots.weighted_loss_by_layer(fits) if weighted else plots.loss_by_layer(fits)
    figure.savefig(folder / "loss_by_layer.png", dpi=120)
    log.info("error of every matrix: %s", folder / "loss_by_layer.png")

"""Draw the figures of a run and of a sweep."""

import logging
from pathlib import Path

from nla.harness.record import RunRecord, read_record
from nla.machine.files import naming

log = logging.getLogger(__name__)


def draw(record: RunRecord, folder: Path) -> None:
    """Draw the figures of a run into its folder, as PNG files."""
    from analysis import plots
    from analysis.frames import fits_frame

    figures = {"loss_by_layer": plots.loss_by_layer(fits_frame([record]))}
    if record.retraining:
        figures |= {"retraining": plots.retraining(record.history), "kept": plots.kept_by_matrix(record.fits)}
    for name, figure in figures.items():
        path = folder / f"{name}.png"
        with naming(path):
            figure.savefig(path, dpi=120)


def draw_sweep(runs: list[Path], folder: Path) -> None:
    """Draw the error of every matrix for all these runs into `folder`, if they are of one model at one size.

    The error is that of the layers' outputs if all runs have it, else that of the weights.
    """
    from analysis import plots
    from analysis.frames import fits_frame

    different = list(dict.fromkeys(runs))  # two jobs of one request are one run
    if len(different) < 2:
        return
    fits = fits_frame([read_record(run) for run in different])
    if len(fits.drop_duplicates(["model", "ratio", "asked_bits"])) > 1:
        return
    weighted = bool(fits["weighted_error"].notna().all())
    figure = plots.weighted_loss_by_layer(fits) if weighted else plots.loss_by_layer(fits)
    path = folder / "loss_by_layer.png"
    with naming(path):
        figure.savefig(path, dpi=120)
    log.info("error of every matrix: %s", path)

"""Draw the figures of a run."""

from pathlib import Path

from nla.harness.record import RunRecord
from nla.machine.files import naming


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

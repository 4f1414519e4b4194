"""The operations of a forward pass that a record tells, compared with those that the terms count."""

import math

import pytest

from analysis.operations import operations_to_dense
from nla import load_compressed
from nla.compressed.contents import matrix_terms
from nla.harness.fits_table import FitRecord


@pytest.mark.parametrize(
    "settings",
    [
        ["ratio=0.6", "kernel=linear"],
        ["ratio=0.6", "kernel=piecewise"],
        ["ratio=0.6", "kernel=phase"],
        ["ratio=0.6", "method=hybrid"],
        ["bits=6", "method=nla_angles"],
        ["bits=6", "method=svd_llm_int4"],
        ["bits=4.5", "method=gptq"],
        ["bits=2.5", "method=quip"],
        ["bits=6", "method=caldera"],
    ],
)
def test_the_operations_that_a_record_tells_are_those_of_the_terms_for_one_more_token(settings, run_here, tmp_path):
    """A term counts the same and for scales, sums and rotations some more, which is much beside matrices as small as these."""
    usual = ["model=tiny_llama", "track=none", "task.window=64", "task.max_windows=1", "statistics.windows=8", "solver.steps=1"]
    record = run_here(*usual, *settings, "statistics.length=32", "select.include='layers.0.*(q_proj|down_proj)'", "save=true")
    model = load_compressed(next((tmp_path / "runs").iterdir()) / "model")
    counted = sum(term.forward_flops(2) - term.forward_flops(1) for term in matrix_terms(model).values()) / 2
    told = operations_to_dense(record.fits) * sum(math.prod(fit.shape) for fit in record.fits)
    assert told <= counted <= 2 * told


def test_tiled_kernels_have_no_count_of_operations():
    assert operations_to_dense([FitRecord.model_construct(shape=(8, 6), terms="linear h=2 r=1 + gaussian h=2 r=3")]) is None

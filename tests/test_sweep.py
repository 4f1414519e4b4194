"""Tests of sweeps and their table."""

import pytest

from nla.stages.draw import draw_sweep
from tests.conftest import TINY, records

SWEEP = ["-m", *TINY, "solver.steps=5"]


@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_a_sweep_survives_a_failing_job_shares_the_dense_baseline_and_ends_with_one_table(cli, tmp_path, launcher):
    arguments = [*SWEEP, f"hydra/launcher={launcher}", "ratio=0.5,0.999", "kernel=linear,phase"]
    result = cli(*arguments, check=False, fresh=launcher == "joblib")
    assert result.returncode != 0
    table = result.stdout[result.stdout.rindex("sweep ") :]
    assert table.count("failed: ratio=0.999") == 2 and "use ratio=0.936" in table
    for kernel in ("linear", "phase"):
        (row,) = [line for line in table.splitlines() if line.startswith(f"ratio=0.5 kernel={kernel}")]
        assert len(row.split()) == 6
    done = records(tmp_path)
    assert len(done) == 2 and {r["status"] for r in done} == {"done"}
    dense = [r["metrics"]["dense"] for r in done]
    commands = [r["command"] for r in done]
    assert all(c.startswith("python run.py model=tiny_llama") and c.count("kernel=") == 1 for c in commands)
    assert dense[0] == dense[1]  # to the last digit of tokens per second: measured once
    assert len(list((tmp_path / "cache" / "windows").glob("*.jsonl"))) == 3


@pytest.mark.parametrize(("bits", "drawn"), [((3, 3.001), False), ((3, 3), True)])
def test_a_sweep_of_one_size_ends_with_the_errors_of_its_matrices_and_one_of_several_does_not(run_here, tmp_path, bits, drawn):
    made = [
        run_here(*TINY, "method=rtn", f"bits={asked}", f"seed={seed}", "select.include='layers.0'")
        for seed, asked in enumerate(bits)
    ]
    draw_sweep([tmp_path / "runs" / record.name for record in made], tmp_path)
    assert (tmp_path / "loss_by_layer.png").exists() == drawn

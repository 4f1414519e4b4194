"""Tests of the line that says that a setting of the command line is not used."""

import pytest

from nla.harness.settings import check_settings
from nla.pipeline import run
from tests.conftest import TINY, configuration, only_record, records

UNUSED = {
    "kernel=phase": "method=svd",
    "kernel.r=2": "method=svd",
    "solver.steps=5": "method=svd",
    "schedule.b0=1.2": "budget=uniform",
    "statistics.windows=4": "method=svd and budget=uniform",
    "calibration=sotu": "method=svd, budget=uniform and retrain.steps=0",
    "retrain=lora": "retrain.steps=0",
    "retrain.length=64": "retrain.steps=0",
}


def test_a_setting_that_is_not_used_is_said_in_one_line_before_the_work(cli, tmp_path):
    result = cli(*TINY, "method=svd", "select=layers", "retrain.steps=0", *UNUSED)
    before, _, _ = result.stdout.partition("removing")
    assert before.splitlines() == [f"{setting} is not used by {by}" for setting, by in UNUSED.items()]
    config = only_record(tmp_path)["config"]
    assert not {setting.partition("=")[0].partition(".")[0] for setting in UNUSED} & set(config)


def test_each_job_of_a_sweep_names_its_own_unused_settings(cli, tmp_path):
    result = cli("-m", *TINY, "method=svd,asvd", "kernel=phase", "statistics.windows=4")
    lines = [line for line in result.stdout.splitlines() if "is not used" in line]
    assert lines == [
        "kernel=phase is not used by method=svd",
        "statistics.windows=4 is not used by method=svd and budget=uniform",
        "kernel=phase is not used by method=asvd",
    ]
    assert [("statistics" in r["config"]) for r in records(tmp_path)] == [True, False]  # asvd, svd


RETRAINED = ["retrain=lora", "retrain.steps=2", "retrain.length=64", "retrain.linear_term=1", "calibration=sotu"]
USED = [
    [*TINY, "kernel=phase", "solver.steps=5", *RETRAINED],
    [*TINY, "budget=adaptive", "schedule.interval=1", "retrain.steps=2", "retrain.length=64"],
    [*TINY, "method=asvd", "statistics.windows=4", "calibration=sotu"],
    ["model=swin_micro", "method=svd", "calibration=digits"],  # the harness trains this model on these images
]


@pytest.mark.parametrize("arguments", USED, ids=" ".join)
def test_a_setting_that_is_used_is_not_mentioned(tmp_path, caplog, arguments):
    caplog.set_level("INFO")
    run(check_settings(configuration(*arguments, "dry_run=true", f"outputs_dir={tmp_path}")), arguments=arguments)
    assert "not used" not in caplog.text and "Nothing was fitted" in caplog.text

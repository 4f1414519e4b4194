"""Models of which only a folder or a file is given: `model=causal_lm` and `model=timm`."""

import json

import pytest
from hydra.utils import instantiate

from analysis.settings import model_name
from nla.harness.settings import check_settings
from nla.machine.cache import Cache
from nla.machine.errors import UserError
from nla.pipeline import run
from tests.conftest import configuration, only_folder, only_record, save_as_folder

TEXT = ["task.window=64", "task.max_windows=3"]
IMAGES = ["data=digits", "task.max_images=32"]
FEW = ["method=svd", "ratio=0.5", "track=none"]


def source(*overrides: str):
    return instantiate(configuration(*overrides).model, _convert_="all")


@pytest.mark.parametrize(
    "model, option, task",
    [("tiny_llama", "causal_lm", TEXT), ("tiny_opt", "causal_lm", TEXT), ("tiny_swin", "timm", IMAGES)],
    ids=["llama", "opt", "swin"],
)
def test_a_folder_is_compressed_and_measured_as_the_model_that_was_saved_in_it(run_here, tmp_path, model, option, task):
    folder = save_as_folder(model, tmp_path / f"my-{model}-v1.5")
    saved = run_here(f"model={model}", *task, *FEW)
    own = tmp_path / "own"  # with a cache of its own, so that all is computed again
    run(check_settings(configuration(f"model={option}", f"model.path={folder}", *task, *FEW, f"outputs_dir={own}")))
    record = only_record(own)
    assert only_folder(own).name == f"my_{model}_v1.5-svd-0.5-{record['signature'][:8]}"
    assert record["config"]["model"]["name"] == model_name(record["config"]["model"]) == f"my-{model}-v1.5"
    assert record["config"]["dtype"] == "float32" and record["parameters"] == saved.parameters.model_dump()
    for stage, tasks in saved.metrics.items():
        for name, sets in tasks.items():
            for data, figures in sets.items():
                loss = "nll" if name == "language_modelling" else "loss"
                assert record["metrics"][stage][name][data][loss] == figures[loss]


def test_a_name_that_is_given_stands_for_the_folders(run_here, tmp_path):
    folder = save_as_folder("tiny_llama", tmp_path / "model")
    run_here("model=causal_lm", f"model.path={folder}", "model.name=mine", *TEXT, *FEW)
    assert only_folder(tmp_path).name.startswith("mine-svd-0.5-")


def test_a_file_of_weights_needs_the_config_beside_it_or_timms_name_of_the_model(tmp_path):
    file, cache = save_as_folder("tiny_swin", tmp_path / "swin") / "model.safetensors", Cache(tmp_path / "cache")
    beside = source("model=timm", f"model.path={file}")
    beside.inspect(cache)
    config = json.loads(file.with_name("config.json").read_text())
    alone = file.rename(tmp_path / "alone.safetensors")
    with pytest.raises(UserError, match=r"config\.json does not exist; give model\.architecture\.model=.*num_classes="):
        source("model=timm", f"model.path={alone}").inventory(cache)
    name = [f"model.architecture.model={config['architecture']}", "model.architecture.num_classes=10"]
    with pytest.raises(UserError, match=r"alone\.safetensors do not fit the model"):  # not the usual Swin of this name
        source("model=timm", f"model.path={alone}", *name).inspect(cache)
    sizes = [f"++model.architecture.{key}={value}" for key, value in config["model_args"].items()]
    named = source("model=timm", f"model.path={alone}", *name, *sizes)
    named.inspect(cache)
    alone.rename(file)
    assert named.inventory(cache) == beside.inventory(cache)


def test_without_a_path_or_with_a_wrong_one_the_error_says_what_to_give(tmp_path):
    with pytest.raises(UserError, match=r"model\.path is missing; give model\.path=<folder .*config\.json.*file with weights"):
        source("model=timm").inventory(Cache(tmp_path))
    with pytest.raises(UserError, match=r"model\.path=/no/such is not a file or folder"):
        source("model=timm", "model.path=/no/such").inventory(Cache(tmp_path))


def test_a_config_that_timm_did_not_write_is_refused_and_another_preparation_of_images_is_another_model(tmp_path):
    folder, cache = save_as_folder("tiny_swin", tmp_path / "swin"), Cache(tmp_path / "cache")
    model, config = source("model=timm", f"model.path={folder}"), json.loads((folder / "config.json").read_text())
    before = model.identity(cache)
    config["pretrained_cfg"]["mean"] = [0.25]
    (folder / "config.json").write_text(json.dumps(config))
    assert model.identity(cache) != before
    for content in ('{"model_type": "llama"}', "[1]", "{"):
        (folder / "config.json").write_text(content)
        with pytest.raises(UserError, match=r"config\.json is not as timm's save_for_hf writes it"):
            model.inventory(cache)

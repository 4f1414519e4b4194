"""Tests of the tables of benchmarks: commands write them, and figures in a text are those of their rows."""

import sys

import pytest

from analysis.benchmarks import forward, retrain_step
from analysis.benchmarks.command import main
from analysis.benchmarks.table import Table, read_table, read_tables
from analysis.claims import Claim, Claims, report, without_command
from analysis.recorded import Records, formatted
from nla.machine.errors import UserError

SMALL = ["m=16", "n=8", "tokens=2"]


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Runs a command line of the benchmark of the forward pass in a folder of its own, and gives what was measured."""
    measured = []

    def measure(**asked):
        measured.append(asked)
        return forward.forward(**asked)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["analysis/benchmarks/forward.py", *arguments])
        main(measure, forward.chosen, {})
        return measured

    monkeypatch.chdir(tmp_path)
    return run


def test_a_command_writes_its_table_with_what_made_it_over_an_older_one(command, tmp_path, capsys):
    file = tmp_path / "tables" / "small.csv"
    for tokens in ("tokens=4", "tokens=2"):
        assert command(*SMALL[:2], tokens, "table=tables/small.csv")[-1] == {"m": 16, "n": 8, "tokens": int(tokens[-1])}
    table = read_tables(file.parent)["small.csv"]
    assert table.made["command"] == "python -m analysis.benchmarks.forward m=16 n=8 tokens=2"
    assert set(table.made) == {"command", "commit", "dirty", "device", "threads", "torch"} and all(table.made.values())
    assert [row["form"] for row in table.rows] == ["apply", "reconstruct", "dense"] * 2
    for row in table.rows:
        assert float(row["inference_seconds"]) == float(f"{float(row['inference_seconds']):.4g}") > 0
    assert f"# command: {table.made['command']}\n" in capsys.readouterr().out


def test_nothing_is_written_unless_asked(command, tmp_path):
    command(*SMALL)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("table=small.txt", r"table=small\.txt is not allowed; give ratio=, m=, n=, tokens=, table=FILE\.csv$"),
        ("rounds=2", "rounds=2 is not allowed; give ratio="),
        ("m=0", "must be whole numbers from 1"),
    ],
)
def test_a_wrong_argument_ends_the_command_in_words_before_the_measuring(command, monkeypatch, argument, said):
    monkeypatch.setattr(forward, "forward", lambda **asked: pytest.fail("measured"))
    with pytest.raises(SystemExit, match=said) as refused:
        command(*SMALL, argument)
    assert isinstance(refused.value.code, str)  # which Python prints, and makes exit code 1


def test_a_file_that_no_command_wrote_is_refused(tmp_path):
    (tmp_path / "x.csv").write_text("kernel,seconds\nphase,1\n")
    with pytest.raises(UserError, match=r"x\.csv does not say which command made it"):
        read_table(tmp_path / "x.csv")


def test_the_tables_in_git_are_of_committed_code():
    tables = read_tables()
    assert tables
    for table in tables.values():
        assert table.made["commit"] and table.made["dirty"] == "False"


TABLE = Table(
    {"command": "python -m analysis.benchmarks.forward m=64 n=64"},
    [
        {"kernel": "phase", "form": "apply", "h": "9", "inference_seconds": "0.0283"},
        {"kernel": "phase", "form": "dense", "h": "9", "inference_seconds": "0.0155"},
    ],
)
RECORDS = Records([], {"forward.csv": TABLE})
TEXT = """## 1. Time
A layer takes 28 ms, a dense one 15.5 ms.

```
python -m analysis.benchmarks.forward n=64 m=64 table=forward.csv  # any file
```

## 2. Another
"""


def told(text: str, **other: str) -> str:
    """The problems of a text with a claim about a table, of which the first figure has other settings than it should."""
    usual = {"table": "forward.csv", "row": "kernel=phase", "figure": "inference_seconds", "format": ".0f ms"}
    values = {"a": {"row": "form=apply"} | other, "b": {"row": "form=dense", "format": ".1f ms"}}
    claim = Claim(text="takes {a}, a dense one {b}.", usual=usual, values=values)
    claims, texts = Claims(claims={"a.md": [claim]}, unclaimed=[]), {"a.md": text}
    return "\n".join(report(claims, texts, RECORDS).problems() or without_command(claims, texts, RECORDS))


def test_a_figure_is_that_of_a_row_of_a_table_that_a_command_beside_it_makes():
    assert told(TEXT) == ""
    claim = Claim(text="{a}", usual={"table": "forward.csv", "figure": "h"}, values={"a": "form=apply"})
    assert formatted(claim.figures()["a"], RECORDS) == "9"


@pytest.mark.parametrize(
    ("text", "other", "said"),
    [
        (TEXT.replace("28 ms", "29 ms"), {}, "differs: {a}: the text has 29 ms, the records 28 ms"),
        (TEXT, {"row": "form=none"}, "no row of forward.csv with kernel=phase form=none; the nearest has form=apply"),
        (TEXT, {"row": "tokens=1"}, "the nearest has tokens=no such column"),
        (TEXT, {"row": "h=9"}, "2 rows of forward.csv with kernel=phase h=9; the first two differ in form, inference_seconds"),
        (TEXT, {"table": "layers.csv"}, "no table layers.csv; there are forward.csv"),
        (TEXT, {"figure": "seconds"}, "forward.csv has no number in column seconds"),
        (TEXT, {"figure": "form"}, "forward.csv has no number in column form"),
        (TEXT.replace(" m=64", " m=32"), {}, "makes forward.csv (python -m analysis.benchmarks.forward m=64 n=64)"),
        (TEXT.replace(" m=64", ""), {}, "no command beside it makes forward.csv"),
        (TEXT.replace("m=64", "m=64 ratio=0.5"), {}, "no command beside it makes forward.csv"),
        (TEXT.replace(".forward", ".layer_latency"), {}, "no command beside it makes forward.csv"),
        (TEXT.replace("```\npython", "## 3. Apart\n```\npython"), {}, "no command beside it makes forward.csv"),
    ],
)
def test_what_is_wrong_with_a_figure_of_a_table_is_said(text, other, said):
    assert said in told(text, **other)


def test_the_benchmark_of_the_retraining_step_has_a_row_per_kernel_and_budget(monkeypatch):
    small = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    monkeypatch.setattr(retrain_step, "ARCHITECTURE", retrain_step.ARCHITECTURE | small | {"num_key_value_heads": 1})
    monkeypatch.setattr(retrain_step, "LENGTH", 16)
    table = retrain_step.retrain_step(**retrain_step.chosen(["steps=3"]))
    assert list(zip(table["kernel"], table["adaptive"], strict=True)) == [(k.name, a) for k, a in retrain_step.CASES]
    assert (table["q25"] <= table["ratio"]).all() and (table["ratio"] <= table["q75"]).all() and (table["q25"] > 0).all()
    with pytest.raises(UserError, match="steps=2 must be at least 3"):
        retrain_step.chosen(["steps=2"])

"""Accuracies against a plain loop over transformers' log-likelihoods, and where questions come from."""

import json
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from torch import nn

import tasks.commonsense
from nla.machine.cache import Cache
from nla.machine.errors import UserError
from nla.models.base import LanguageModel
from tasks.commonsense import Commonsense, average
from tasks.data.published import SHIPPED, Published, own_settings
from tasks.data.questions import Everyday
from tests.conftest import configuration

EVERYDAY = Everyday("everyday")
KINDS = ["physical", "social", "temporal", "causal", "spatial", "categories", "quantities"]
Pairs = list[tuple[str, str]]  # a choice: what is read, what is scored

ARC = [
    {
        "question": "What do bees make?",
        "choices": {"text": ["honey", "wool", "glass"], "label": ["A", "B", "C"]},
        "answerKey": "A",
    },
    {
        "question": "What is ice?",
        "choices": {"text": ["fire", "frozen water", "sand"], "label": ["1", "2", "3"]},
        "answerKey": "2",
    },
    {
        "question": "What barks?",
        "choices": {"text": ["a fish", "a tree", "a cat", "a dog"], "label": list("ABCD")},
        "answerKey": "D",
    },
    {"question": "What is hot?", "choices": {"text": ["the sun", "the snow"], "label": list("AB")}, "answerKey": "A"},
]
WINOGRANDE = [
    {
        "sentence": "The cup did not fit in the bag because the _ was too big.",
        "option1": "cup",
        "option2": "bag",
        "answer": "1",
    },
    {"sentence": "Ann thanked Eve because _ had helped her.", "option1": "Ann", "option2": "Eve", "answer": "2"},
    {"sentence": "The wall hid the tree since the _ was higher.", "option1": "wall", "option2": "tree", "answer": "1"},
]
HELLASWAG = [
    {"activity_label": "Cooking", "ctx_a": "A man peels an apple.", "ctx_b": "he", "label": "2"}
    | {"endings": ["flies away.", "is a  fork.", "cuts it [title] and eats it.", "sinks."]},
    {"activity_label": "Rowing", "ctx_a": "Two women sit in a boat.", "ctx_b": "they", "label": "0"}
    | {"endings": ["take the oars.", "climb a stair.", "close the oven.", "paint [step] a wall."]},
]
MATHQA = [
    {"Problem": "two plus two is", "options": "a ) 3 , b ) 4 , c ) 5 , d ) 6 , e ) 7", "correct": "b"},
    {"Problem": "half of ten is", "options": "a ) 1 , b ) 2 , c ) 20 , d ) 5 , e ) none", "correct": "d"},
]


def evaluate(task: Commonsense, model: LanguageModel, folder: Path) -> dict[str, dict[str, float]]:
    return task.evaluate(model, Cache(folder), "state", "test")


def published(path: Path | None, *tasks: str) -> Published:
    return Published("commonsense", list(tasks), None if path is None else str(path))


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def everyday(kind: str, count: int) -> tuple[list[Pairs], list[int]]:
    rows = EVERYDAY.rows()[kind][:count]
    return [[(row["stem"], f" {ending}") for ending in row["endings"]] for row in rows], [row["answer"] for row in rows]


@torch.no_grad()
def log_likelihood(model: LanguageModel, context: str, continuation: str) -> float:
    """Of the continuation's bytes, each given all before it (the tokens of tiny_llama are bytes)."""
    tokens = model.encode(context + continuation)
    scores = model.logits(tokens[None])[0].log_softmax(-1)
    begin = len(context.encode())
    return sum(float(scores[i - 1, tokens[i]]) for i in range(begin, len(tokens)))


def accuracies(
    model: LanguageModel, questions: list[Pairs], answers: list[int], lengths: list[list[int]] | None = None
) -> tuple[float, float]:
    """acc and acc_norm, where a choice has `lengths` characters (as scored, without the space before it)."""
    right, right_norm = 0, 0
    for i, (choices, answer) in enumerate(zip(questions, answers, strict=True)):
        scores = [log_likelihood(model, *choice) for choice in choices]
        sizes = lengths[i] if lengths else [len(continuation) - 1 for _, continuation in choices]
        right += scores.index(max(scores)) == answer
        normed = [score / size for score, size in zip(scores, sizes, strict=True)]
        right_norm += normed.index(max(normed)) == answer
    return right / len(questions), right_norm / len(questions)


class LowRank(nn.Module):
    """In place of a linear layer, with no weight of that name."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        U, S, V = torch.linalg.svd(linear.weight.detach())
        self.left, self.right = nn.Parameter(U[:, :4] * S[:4]), nn.Parameter(V[:4])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.right.T @ self.left.T


class Broken(nn.Module):
    """A language model's head that gives NaN wherever a text has the byte ~."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.config, self.device = model, model.config, model.device

    def tie_weights(self) -> None:
        pass

    def forward(self, tokens: torch.Tensor, use_cache: bool) -> Any:
        output = self.model(tokens, use_cache=use_cache)
        output.logits[(tokens == ord("~")).any(1)] = float("nan")
        return output


@pytest.fixture
def tiny(tmp_path) -> LanguageModel:
    source = instantiate(configuration("model=tiny_llama").model, _convert_="all")
    model = source.load("cpu", "float32", Cache(tmp_path))
    with torch.no_grad():  # the weights at random hardly tell one choice from another
        for parameter in model.module.parameters():
            parameter *= 4
    return model


@pytest.mark.parametrize("replaced", [False, True], ids=["dense", "compressed"])
def test_accuracies_are_those_of_a_plain_loop_over_summed_log_likelihoods(tiny, tmp_path, replaced):
    if replaced:
        for layer in tiny.module.model.layers:
            layer.mlp.up_proj, layer.self_attn.q_proj = LowRank(layer.mlp.up_proj), LowRank(layer.self_attn.q_proj)
    assert tiny.module.lm_head.weight is tiny.module.model.embed_tokens.weight
    figures = evaluate(Commonsense(EVERYDAY, limit=5, batch=3), tiny, tmp_path)
    for kind in KINDS:
        found = figures[f"not_paper.{kind}"]
        assert (found["acc"], found["acc_norm"]) == pytest.approx(accuracies(tiny, *everyday(kind, 5)))
        assert found["chance"] == 0.25 and found["questions"] == 5 and found["questions_available"] >= 40
        for metric in ("acc", "acc_norm"):
            assert found[f"{metric}_stderr"] == pytest.approx(math.sqrt(found[metric] * (1 - found[metric]) / 4))
    assert tiny.module.lm_head.weight is tiny.module.model.embed_tokens.weight


def test_neither_batch_nor_threads_nor_shards_change_a_figure(tiny, tmp_path, monkeypatch):
    def figures(name: str, batch: int) -> dict[str, dict[str, float]]:
        found = evaluate(Commonsense(EVERYDAY, limit=4, batch=batch), tiny, tmp_path / name)
        return {task: {k: v for k, v in f.items() if k not in ("seconds", "peak_bytes")} for task, f in found.items()}

    expected = figures("one", 4)
    assert figures("batch", 7) == expected
    monkeypatch.setattr(tasks.commonsense, "SHARD", 3)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert figures("threads", 4) == expected
    finally:
        torch.set_num_threads(threads)


def test_a_second_evaluation_answers_from_the_cache_and_a_killed_one_goes_on(tiny, tmp_path, monkeypatch):
    score, done = tasks.commonsense.score_shard, []

    def killed_at_the_third(harness, shard):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(shard.name)
        return score(harness, shard)

    monkeypatch.setattr(tasks.commonsense, "score_shard", killed_at_the_third)
    task = Commonsense(EVERYDAY, limit=2, batch=8)
    with pytest.raises(KeyboardInterrupt):
        evaluate(task, tiny, tmp_path)
    monkeypatch.setattr(
        tasks.commonsense, "score_shard", lambda harness, shard: done.append(shard.name) or score(harness, shard)
    )
    first = evaluate(task, tiny, tmp_path)
    assert done == KINDS
    assert evaluate(task, tiny, tmp_path) == first and done == KINDS
    evaluate(Commonsense(EVERYDAY, limit=3, batch=8), tiny, tmp_path)
    task.evaluate(tiny, Cache(tmp_path), "another state", "test")
    assert done == KINDS * 3


def test_evaluating_leaves_random_numbers_tokeniser_and_terminal_as_they_were(tiny, tmp_path, capfd):
    write(tmp_path, "hellaswag", HELLASWAG)
    tiny.tokenizer.pad_token = None
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    evaluate(Commonsense(EVERYDAY, limit=2, batch=8), tiny, tmp_path)
    evaluate(Commonsense(published(tmp_path, "hellaswag"), limit=None, batch=8), tiny, tmp_path)
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert tiny.tokenizer.pad_token is None
    output = capfd.readouterr()
    lines = (output.out + output.err).replace("\r", "\n").split("\n")
    assert all(line.startswith("test:") for line in lines if line.strip())


def test_a_question_without_a_finite_likelihood_is_wrong_and_counted(tiny, tmp_path):
    rows = [row | {"question": row["question"] + mark} for mark in ("", " ~") for row in ARC]
    write(tmp_path, "arc_easy", rows)
    broken = LanguageModel(Broken(tiny.module), tiny.tokenizer)
    task = Commonsense(published(tmp_path, "arc_easy"), limit=None, batch=2)
    found = evaluate(task, broken, tmp_path / "cache")["arc_easy"]
    pairs = [[(f"Question: {r['question']}\nAnswer:", f" {c}") for c in r["choices"]["text"]] for r in ARC]
    acc, _ = accuracies(tiny, pairs, [0, 1, 3, 0])
    assert found["infinite_questions"] == 4 and found["acc"] == acc / 2
    assert found["chance"] == pytest.approx((1 / 3 + 1 / 3 + 1 / 4 + 1 / 2) / 4)


def test_the_papers_tasks_run_from_local_files_through_lm_evals_own_templates(tiny, tmp_path):
    for name, rows in {"arc_easy": ARC, "winogrande": WINOGRANDE, "hellaswag": HELLASWAG, "mathqa": MATHQA}.items():
        write(tmp_path, name, rows)
    data = published(tmp_path, "arc_easy", "winogrande", "hellaswag", "mathqa")
    data.check()
    figures = evaluate(Commonsense(data, limit=None, batch=4), tiny, tmp_path / "cache")
    assert list(figures) == ["arc_easy", "winogrande", "hellaswag", "mathqa", "average_of_4"]

    def check(name: str, questions: list[Pairs], answers: list[int], lengths: list[list[int]] | None = None) -> None:
        acc, acc_norm = accuracies(tiny, questions, answers, lengths)
        assert figures[name]["acc"] == acc and figures[name].get("acc_norm", acc_norm) == acc_norm
        assert figures[name]["version"] == 1.0 and figures[name]["questions"] == len(questions)

    check(
        "arc_easy",
        [[(f"Question: {r['question']}\nAnswer:", f" {c}") for c in r["choices"]["text"]] for r in ARC],
        [0, 1, 3, 0],
    )
    texts = ["Cooking: A man peels an apple. He", "Rowing: Two women sit in a boat. They"]
    endings = [
        ["flies away.", "is a fork.", "cuts it. and eats it.", "sinks."],
        [*HELLASWAG[1]["endings"][:3], "paint a wall."],
    ]
    check("hellaswag", [[(t, f" {e}") for e in es] for t, es in zip(texts, endings, strict=True)], [2, 0])
    numbers = [["3", "4", "5", "6", "7"], ["1", "2", "20", "5", "none"]]
    problems = [f"Question: {row['Problem']}\nAnswer:" for row in MATHQA]
    check("mathqa", [[(p, f" {n}") for n in ns] for p, ns in zip(problems, numbers, strict=True)], [1, 3])
    blanks = [row["sentence"].split("_") for row in WINOGRANDE]
    pairs = [
        [(begin + row[option], f" {end.strip()}") for option in ("option1", "option2")]
        for (begin, end), row in zip(blanks, WINOGRANDE, strict=True)
    ]
    check("winogrande", pairs, [0, 1, 0])
    assert figures["winogrande"]["chance"] == 0.5 and "acc_norm" not in figures["winogrande"]


def test_the_average_is_that_of_tasks_whatever_their_size_and_named_so_only_for_all_seven():
    common = {"questions_available": 9, "infinite_questions": 0, "unanswerable_questions": 0, "seconds": 1.0, "peak_bytes": 5}
    small = {"acc": 0.5, "acc_stderr": 0.3, "acc_norm": 0.7, "acc_norm_stderr": 0.1, "chance": 0.25, "questions": 2} | common
    large = {"acc": 0.1, "acc_stderr": 0.4, "chance": 0.5, "questions": 9} | common
    found = average([small, large])
    assert (found["acc"], found["acc_norm"], found["chance"]) == pytest.approx((0.3, 0.4, 0.375))
    assert found["acc_stderr"] == pytest.approx(0.25) and found["acc_norm_stderr"] == pytest.approx(math.hypot(0.1, 0.4) / 2)
    assert found["questions"] == 11 and found["tasks"] == 2 and found["seconds"] == 2
    assert published(None, *SHIPPED).average == "average" and published(None, "piqa", "mathqa").average == "average_of_2"


def test_every_name_of_the_projects_own_set_says_that_it_is_not_the_papers(tiny, tmp_path):
    figures = evaluate(Commonsense(EVERYDAY, limit=1, batch=8), tiny, tmp_path)
    assert list(figures) == [f"not_paper.{kind}" for kind in [*KINDS, "average"]]
    assert not any(name.endswith("stderr") for f in figures.values() for name in f)  # of one question nothing is known


def test_the_everyday_questions_keep_their_rules():
    kinds = EVERYDAY.rows()
    rows = [row for part in kinds.values() for row in part]
    assert list(kinds) == KINDS and len(rows) >= 300
    assert len({row["stem"] for row in rows}) == len(rows)
    for row in rows:
        assert set(row) == {"kind", "stem", "endings", "answer"} and len(set(row["endings"])) == 4, row
        assert row["answer"] in range(4) and all(text and text == text.strip() for text in [row["stem"], *row["endings"]]), row
    for kind, part in kinds.items():
        positions = Counter(row["answer"] for row in part)
        assert max(positions.values()) - min(positions[i] for i in range(4)) <= 1, kind


def test_without_a_hub_the_tasks_are_refused_in_one_sentence_that_says_what_to_do(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(UserError, match=r"needs the dataset allenai/ai2_arc, and the hub.*data\.path=.*data=everyday"):
        published(None, "arc_easy").check()


def test_wrong_names_files_and_fields_are_named(tmp_path, tiny):
    with pytest.raises(UserError, match=r"boolq is not known; allowed: openbookqa, arc_easy"):
        published(None, "boolq")
    with pytest.raises(UserError, match="each once"):
        published(None, "piqa", "piqa")
    write(tmp_path, "piqa", [{"goal": "g", "sol1": "a"}])
    with pytest.raises(UserError, match=r"piqa\.jsonl: a question has no field 'sol2'; the fields of piqa are goal, sol1"):
        published(tmp_path, "piqa").check()
    with pytest.raises(UserError, match=r"has no mathqa\.jsonl.*set data\.tasks=\[piqa\]"):
        published(tmp_path, "piqa", "mathqa").file("mathqa")
    (tmp_path / "piqa.jsonl").write_text("not json")
    with pytest.raises(UserError, match=r"piqa\.jsonl cannot be read as questions"):
        published(tmp_path, "piqa").check()
    write(tmp_path, "piqa", [{"goal": "g", "sol1": "a", "sol2": "b", "label": -1}])
    with pytest.raises(UserError, match="no question of piqa has a right answer"):
        evaluate(Commonsense(published(tmp_path, "piqa"), limit=None, batch=1), tiny, tmp_path)
    write(tmp_path, "piqa", [{"goal": "g" * 2100, "sol1": "a", "sol2": "b", "label": 1}])
    with pytest.raises(UserError, match=r"'Question: gg.*more than the 2048 that the model can read"):
        evaluate(Commonsense(published(tmp_path, "piqa"), limit=None, batch=1), tiny, tmp_path)


OWN = "task: own\ndoc_to_text: '{{q}} ='\ndoc_to_choice: a\ndoc_to_target: right\n"


def test_a_task_of_ones_own_is_a_yaml_beside_its_questions(tiny, tmp_path):
    rows = [{"q": "1 + 1", "a": ["one", "two", "four"], "right": 1}, {"q": "2 + 2", "a": ["one", "two", "four"], "right": 2}]
    write(tmp_path, "own", rows)
    (tmp_path / "own.yaml").write_text(OWN + "metadata: {version: 3}\n")
    data = published(tmp_path, "own")
    data.check()
    before = data.identity(Cache(tmp_path))
    found = evaluate(Commonsense(data, limit=None, batch=4), tiny, tmp_path)["own"]
    pairs = [[(f"{row['q']} =", f" {a}") for a in row["a"]] for row in rows]
    assert (found["acc"], found["acc_norm"]) == accuracies(tiny, pairs, [1, 2])
    assert found["version"] == 3 and found["chance"] == pytest.approx(1 / 3)
    write(tmp_path, "own", rows[:1])
    assert data.identity(Cache(tmp_path)) != before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("process_docs: !function evil.run\n", r"the tag !function would run Python code.*lm-eval's own files only"),
        ("metadata: !!python/object/apply:os.system ['touch ran']\n", "would run Python code"),
        ("include: other.yaml\n", r"include cannot be set; allowed: task, doc_to_text"),
        ("metadata: {version: new}\n", "a number as version"),
        ("doc_to_text: [\n", "cannot be read as a task of your own"),
    ],
)
def test_a_users_yaml_cannot_run_python(tmp_path, change, message):
    write(tmp_path, "own", [{"q": "?", "a": ["b", "c"], "right": 0}])
    (tmp_path / "evil.py").write_text(
        "from pathlib import Path\nPath(__file__).with_name('ran').touch()\ndef run(x): return x\n"
    )
    (tmp_path / "own.yaml").write_text(OWN + change)
    with pytest.raises(UserError, match=message):
        published(tmp_path, "own").check()
    with pytest.raises(UserError, match=message):
        published(tmp_path, "own").tasks()
    assert not (tmp_path / "ran").exists()


def test_neither_can_its_templates(tiny, tmp_path):
    write(tmp_path, "own", [{"q": "?", "a": ["b", "c"], "right": 0}])
    (tmp_path / "own.yaml").write_text(OWN.replace("{{q}} =", "{{ q.__class__.__mro__ }}"))
    assert own_settings(tmp_path / "own.yaml")["task"] == "own"
    with pytest.raises(UserError, match="unsafe"):
        evaluate(Commonsense(published(tmp_path, "own"), limit=None, batch=1), tiny, tmp_path)


def test_the_task_composes_alone_and_beside_others_and_other_questions_can_be_chosen():
    alone = configuration("task=commonsense")
    assert isinstance(instantiate(alone.task.commonsense, _convert_="all").data, Everyday)
    both = configuration("task=[language_modelling,commonsense]", "task.window=64", "task.limit=5")
    assert both.task.language_modelling.window == 64 and both.task.commonsense.limit == 5 and both.data.text.name == "sotu"
    other = configuration("task=commonsense", "data=commonsense", "data.tasks=[arc_easy]")
    assert instantiate(other.task.commonsense, _convert_="all").data.names == ["arc_easy"]
    mixed = configuration("task=[language_modelling,commonsense]", "data=[wikitext2,commonsense]", "data.questions.path=folder")
    assert mixed.data.text.path is None and mixed.task.commonsense.data.path == "folder"

"""Multiple-choice questions as task objects of lm-eval, and the project's own questions."""

import importlib.util
import json
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nla.machine.cache import Cache, digest
from nla.machine.errors import UserError
from tasks.data.base import Data

METRICS = [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")]


class Questions(Data):
    """Named sets of multiple-choice questions. Each set is one lm-eval task.

    `prefix` is put before the name of every figure. It marks sets that are not the paper's.
    """

    kind = "questions"
    splits = ("test",)
    prefix = ""

    def check(self) -> None:
        if importlib.util.find_spec("lm_eval") is None:
            raise UserError(f"data={self.name} needs the package lm_eval: pip install lm_eval")

    @abstractmethod
    def tasks(self) -> dict[str, Any]:
        """{name: lm-eval task with its questions loaded}, in the order of tables.

        Raises:
            UserError: the questions cannot be found or read.
        """

    @property
    def average(self) -> str:
        """Name of the mean over all tasks."""
        return f"{self.prefix}average"


class Everyday(Questions):
    """The project's own questions in tasks/data/everyday.jsonl, one task for each kind.

    A line is {"kind", "stem", "endings", "answer"}. An ending completes the stem. `answer` is the index of the right ending.
    """

    prefix = "not_paper."
    file = Path(__file__).with_name("everyday.jsonl")

    def __init__(self, name: str) -> None:
        self.name = name

    def check(self) -> None:
        super().check()
        if not self.file.is_file():
            raise UserError(f"{self.file} is missing; get the project's file again, or use data=commonsense")

    def identity(self, cache: Cache) -> str:
        return digest({self.file.name: cache.file_digest(self.file)})

    def rows(self) -> dict[str, list[dict[str, Any]]]:
        """{kind: questions}"""
        kinds: dict[str, list[dict[str, Any]]] = {}
        for line in self.file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            kinds.setdefault(row["kind"], []).append(row)
        return kinds

    def tasks(self) -> dict[str, Any]:
        from lm_eval.tasks import TaskManager

        settings = {
            "output_type": "multiple_choice",
            "doc_to_text": "stem",
            "doc_to_choice": "endings",
            "doc_to_target": "answer",
            "metric_list": METRICS,
            "metadata": {"version": 1.0},
        }
        configs = [{"task": kind, **settings, **own_questions(rows)} for kind, rows in self.rows().items()]
        return TaskManager(include_defaults=False).load(configs)["tasks"]


def own_questions(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Settings that make these rows the questions of a lm-eval task, in place of its dataset."""

    def dataset(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        return {"test": Dataset.from_list(rows)}

    load: Callable[..., dict[str, Any]] = dataset
    unset = dict.fromkeys(["dataset_path", "dataset_name", "dataset_kwargs", "training_split", "validation_split"])
    return unset | {"custom_dataset": load, "test_split": "test", "fewshot_split": None, "num_fewshot": 0}

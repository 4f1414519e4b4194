"""The paper's commonsense tasks as lm-eval defines them, with questions from the hub or local files; and users' own tasks."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nla.machine.cache import Cache, digest
from nla.machine.errors import UserError
from tasks.data.hub import refusal
from tasks.data.questions import METRICS, Questions, own_questions


@dataclass(frozen=True)
class Shipped:
    """A task of lm-eval: its folder in lm-eval, its dataset on the hub, and the fields of a question."""

    folder: str
    dataset: str
    fields: tuple[str, ...]


ARC = Shipped("arc", "allenai/ai2_arc", ("question", "choices", "answerKey"))  # choices: {"text": [...], "label": [...]}
SHIPPED = {
    "openbookqa": Shipped("openbookqa", "allenai/openbookqa", ("question_stem", "choices", "answerKey")),
    "arc_easy": ARC,
    "winogrande": Shipped("winogrande", "allenai/winogrande", ("sentence", "option1", "option2", "answer")),
    "hellaswag": Shipped("hellaswag", "Rowan/hellaswag", ("activity_label", "ctx_a", "ctx_b", "endings", "label")),
    "piqa": Shipped("piqa", "baber/piqa", ("goal", "sol1", "sol2", "label")),
    "mathqa": Shipped("mathqa", "regisss/math_qa", ("Problem", "options", "correct")),  # options: "a ) 38 , b ) 27 , ..."
    "arc_challenge": ARC,
}
FORMATS = (".jsonl", ".json", ".parquet")
OWN_SETTINGS = ("task", "doc_to_text", "doc_to_choice", "doc_to_target", "target_delimiter", "description", "metadata")


class Published(Questions):
    """The paper's seven tasks, or some of them. With `path`, also tasks that the user defines.

    Args:
        tasks: names of the paper's tasks, or of the user's (<path>/<name>.yaml).
        path: a folder with <task>.jsonl, .json (a list) or .parquet, instead of the hub.

    Raises:
        UserError: `tasks` is empty, or has a repeated or unknown name.
    """

    def __init__(self, name: str, tasks: list[str], path: str | None) -> None:
        self.name, self.names = name, tasks
        self.path = None if path is None else Path(path).expanduser()
        if not tasks or len(set(tasks)) < len(tasks):
            raise UserError(f"data.tasks={tasks} must name tasks, each once; for example data.tasks=[arc_easy,piqa]")
        unknown = [task for task in tasks if task not in SHIPPED]
        if unknown and self.path is None:
            known = ", ".join(SHIPPED)
            raise UserError(f"data.tasks: {unknown[0]} is not known; allowed: {known}, or with data.path= one of your own")

    @property
    def average(self) -> str:
        """Name of the mean over all tasks: `average`, as in the paper, for all seven; otherwise `average_of_<number>`."""
        return "average" if set(self.names) == set(SHIPPED) else f"average_of_{len(self.names)}"

    def check(self) -> None:
        super().check()
        if self.path is not None:
            for name in self.names:
                self.rows(name)
                self.settings(name)
            return
        for dataset in dict.fromkeys(SHIPPED[name].dataset for name in self.names):
            lack = refusal(dataset)
            if lack:
                raise UserError(
                    f"data={self.name} needs the dataset {dataset}, and {lack}; "
                    "give data.path=<folder with <task>.jsonl>, or use data=everyday"
                )

    def identity(self, cache: Cache) -> str:
        if self.path is None:
            return ""
        files = [f for name in self.names for f in (self.file(name), self.path / f"{name}.yaml") if f.is_file()]
        return digest({file.name: cache.file_digest(file) for file in files})

    def tasks(self) -> dict[str, Any]:
        import lm_eval.tasks
        from datasets.exceptions import DatasetsError
        from jinja2 import TemplateError
        from lm_eval.tasks import TaskManager

        package = Path(lm_eval.tasks.__file__).parent
        folders = list({package / SHIPPED[name].folder: None for name in self.names if name in SHIPPED})
        manager = TaskManager(include_path=folders, include_defaults=False)
        try:
            # in a group, because lm-eval changes settings of its own tasks only for members of groups
            group = {"group": self.name, "task": [self.settings(name) for name in self.names if name in SHIPPED]}
            own = [self.settings(name) for name in self.names if name not in SHIPPED]
            loaded = manager.load([group, *own])["tasks"]
        except (OSError, ValueError, LookupError, TypeError, RuntimeError, DatasetsError, TemplateError) as error:
            reason = (str(error).splitlines() or [repr(error)])[0]
            raise UserError(f"the questions of data={self.name} cannot be loaded: {reason}") from error
        return {name: loaded[name] for name in self.names}

    def settings(self, name: str) -> dict[str, Any]:
        """Additions to lm-eval's configuration of a task, or the whole configuration of a user's task."""
        if self.path is None:
            return {"task": name}
        if name in SHIPPED:
            return {"task": name} | own_questions(self.rows(name))
        own = own_settings(self.path / f"{name}.yaml")
        return own | {"output_type": "multiple_choice", "metric_list": METRICS} | own_questions(self.rows(name))

    def file(self, name: str) -> Path:
        """The local file with a task's questions. Raises UserError if it is missing."""
        assert self.path is not None
        for end in FORMATS:
            if (self.path / f"{name}{end}").is_file():
                return self.path / f"{name}{end}"
        present = {file.stem for file in self.path.glob("*") if file.suffix in FORMATS}
        known = [task for task in present if task in SHIPPED or (self.path / f"{task}.yaml").is_file()]
        advice = f"set data.tasks=[{','.join(sorted(known))}]" if known else "use data=everyday"
        raise UserError(f"data.path={self.path} has no {name}.jsonl, .json or .parquet; add it, or {advice}")

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The questions in a task's local file, with the fields that the task reads. A user's task may read all fields.

        Raises:
            UserError: the file cannot be read, or a question lacks a field.
        """
        file = self.file(name)
        try:
            rows = read_rows(file)
            fields = SHIPPED[name].fields if name in SHIPPED else tuple(rows[0])
            return [{field: row[field] for field in fields} for row in rows]
        except KeyError as error:
            raise UserError(f"{file}: a question has no field {error}; the fields of {name} are {', '.join(fields)}") from error
        except (OSError, ValueError, TypeError, IndexError) as error:
            raise UserError(f"{file} cannot be read as questions, one JSON object a line or table row: {error}") from error


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl, .json (one list) or .parquet file."""
    if file.suffix == ".parquet":
        from pyarrow.parquet import read_table

        return read_table(file).to_pylist()
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".json":
        return list(json.loads(text))
    return [json.loads(line) for line in text.splitlines() if line.strip()]


class DataLoader(yaml.SafeLoader):
    """Reads YAML as data. Tags are errors, because lm-eval runs Python code for a tag such as !function."""


def refuse(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> None:
    """Raise UserError, which names the file and the tag."""
    raise UserError(
        f"{loader.name}: the tag {node.tag} would run Python code, which is allowed in lm-eval's own files only; "
        "write the templates as text, as in doc_to_text: '{{question}}'"
    )


DataLoader.add_multi_constructor("!", refuse)
DataLoader.add_multi_constructor("tag:yaml.org,2002:python/", refuse)


def own_settings(file: Path) -> dict[str, Any]:
    """The configuration of a user's task, with OWN_SETTINGS only, so that it cannot load other data or run code.

    Raises:
        UserError: the file is missing, names another task, or has a tag such as `!function` or a setting that is not allowed.
    """
    try:
        with file.open("rb") as stream:
            found = yaml.load(stream, Loader=DataLoader)
        settings = dict(found)
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        reason, known = " ".join(str(error).split()), ", ".join(SHIPPED)
        raise UserError(f"{file} cannot be read as a task of your own: {reason}; known without it: {known}") from error
    excess = [setting for setting in settings if setting not in OWN_SETTINGS]
    if excess:
        raise UserError(
            f"{file}: {excess[0]} cannot be set; allowed: {', '.join(OWN_SETTINGS)} "
            f"(questions come from {file.stem}.jsonl, and the metrics are acc and acc_norm)"
        )
    if settings.get("task") != file.stem:
        raise UserError(f"{file}: task must be {file.stem}, as the file is called, not {settings.get('task')}")
    metadata = settings.get("metadata") or {}
    version = metadata.get("version", 0) if isinstance(metadata, dict) else None
    if not isinstance(version, int | float):
        raise UserError(f"{file}: metadata must be a mapping with a number as version, not {metadata}")
    return settings | {"metadata": {"version": version}}

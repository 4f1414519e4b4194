"""Accuracy of a causal language model on multiple-choice questions, measured by lm-eval."""

import copy
import importlib.metadata
import logging
import math
import random
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from nla.machine.cache import Cache, digest
from nla.machine.errors import UserError, require_integer
from nla.machine.peak_memory import PeakMemory
from nla.machine.threads import ordered_map
from nla.models.base import LanguageModel
from tasks.base import STDERR, Figures, Task, accuracy
from tasks.data.questions import Questions

SHARD = 128  # questions scored at once; a killed run loses at most so many for each worker


class Shard(NamedTuple):
    """Some questions of one of lm-eval's tasks, and the key of their results in the cache."""

    name: str
    task: Any
    questions: list[int]
    key: str


class Commonsense(Task):
    """Accuracy on multiple-choice questions. The model's answer is the choice with the largest log-likelihood after the
    question, summed over its tokens (acc) or divided by its characters (acc_norm). Templates, scoring and tokenisation are
    lm-eval's. The number of threads does not change the figures.

    Args:
        limit: measure only the first so many questions of each task; null for all.
        batch: choices in one forward pass.
    """

    name = "commonsense"
    reads = "text"
    data: Questions

    def __init__(self, data: Questions, limit: int | None, batch: int) -> None:
        require_integer("task.limit", 1 if limit is None else limit, 1)
        require_integer("task.batch", batch, 1)
        self.data, self.limit, self.batch = data, limit, batch

    def evaluate(self, model: LanguageModel, cache: Cache, state: str, label: str) -> dict[str, Figures]:  # type: ignore[override]
        """Figures of each task as in `summary`, and their `average`. Each shard is stored as soon as it is scored."""
        prefix, figures = self.data.prefix, {}
        state = digest([state, model.tokenizer_identity()])
        with quiet():
            tasks = self.data.tasks()
            shards = [shard for name, task in tasks.items() for shard in self.shards(name, task, state)]
            with cache.lock("commonsense", digest([shard.key for shard in shards])):
                results = self.score(model, cache, shards, label)
            for name, task in tasks.items():
                parts = [results[shard.key] for shard in shards if shard.name == name]
                figures[f"{prefix}{name}"] = summary(parts, len(task.eval_docs), float(task.VERSION))
        return figures | {self.data.average: average(list(figures.values()))}

    def shards(self, name: str, task: Any, state: str) -> list[Shard]:
        """All questions of a task, in shards. The key of a shard is a digest of all texts to score and of the right answers.

        Raises:
            UserError: the questions do not fit the task, or none has a right answer among its choices.
        """
        try:
            task.build_all_requests(limit=self.limit, rank=0, world_size=1)
            texts: dict[int, list[Any]] = {}
            for request in task.instances:
                about = [answer(task, request.doc), task.doc_to_choice(request.doc)]
                texts.setdefault(request.doc_id, about).append(request.args)
        except Exception as error:  # the task's templates and functions fail in many ways on data without their fields
            raise UserError(f"the questions of {name} are not as the task expects: {error!r}") from error
        if all(right is None for right, *_ in texts.values()):
            raise UserError(f"no question of {name} has a right answer among its choices; use a split with answers")
        made_from = [state, importlib.metadata.version("lm_eval"), name, task.VERSION, sorted(task.aggregation()), self.batch]
        parts = [list(texts)[i : i + SHARD] for i in range(0, len(texts), SHARD)]
        return [Shard(name, task, part, digest([made_from, [texts[i] for i in part]])) for part in parts]

    def score(self, model: LanguageModel, cache: Cache, shards: list[Shard], label: str) -> dict[str, Any]:
        """{key of a shard: results as in `score_shard`}, from the cache or by scoring."""
        known = {shard.key: cache.load_json("commonsense", shard.key) for shard in shards}
        missing = [shard for shard in shards if known[shard.key] is None]
        total, left = (sum(len(shard.questions) for shard in group) for group in (shards, missing))
        harness = harness_model(model, self.batch) if missing else None

        def score(shard: Shard) -> dict[str, Any]:
            result = score_shard(harness, shard)
            cache.store_json("commonsense", shard.key, result)
            return result

        device = next(model.module.parameters()).device
        bar = tqdm(desc=label, total=total, initial=total - left, unit="question", dynamic_ncols=True)
        with bar, closing(ordered_map(score, missing, device)) as scored:
            for shard, result in zip(missing, scored, strict=True):
                known[shard.key] = result
                bar.update(len(shard.questions))
        return known


def answer(task: Any, doc: dict[str, Any]) -> Any:
    """The right choice of a question, as its number or text; None if it is not among the choices."""
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    choices = task.doc_to_choice(doc)
    right = gold if isinstance(gold, list) else [gold]
    return gold if right and all(r in choices if isinstance(r, str) else r in range(len(choices)) for r in right) else None


def harness_model(model: LanguageModel, batch: int) -> Any:
    """The model as an lm-eval model: unchanged, on its device, with its tokeniser and the tokens that begin its texts."""
    from lm_eval.models.huggingface import HFLM

    class Loaded(HFLM):
        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            begin, end = super()._encode_pair(context, continuation)
            if len(begin) + len(end) > self.max_length + 1:  # lm-eval would cut off the beginning of the question
                raise UserError(
                    f"the question '{context[:40]}...' has {len(begin) + len(end)} tokens, "
                    f"more than the {self.max_length} that the model can read"
                )
            return begin, end

        def _model_call(self, inps: Tensor, attn_mask: Any = None, labels: Any = None) -> Tensor:
            return self.model(inps, use_cache=False).logits

    # a copy, because lm-eval may give a tokeniser a padding token
    tokenizer = copy.deepcopy(model.tokenizer)
    return Loaded(model.module, backend="causal", tokenizer=tokenizer, batch_size=batch, softmax_dtype="float32")


@torch.inference_mode()
def score_shard(harness: Any, shard: Shard) -> dict[str, Any]:
    """Counts over the questions, seconds and peak bytes. An answer whose log-likelihood is not finite counts as wrong."""
    import lm_eval

    begun = time.perf_counter()
    task = copy.copy(shard.task)  # lm-eval stores requests in the task
    with PeakMemory(harness.device) as memory:
        asked = {"tasks": {shard.name: task}}
        results = lm_eval.evaluate(harness, asked, samples={shard.name: shard.questions}, log_samples=True)
    samples = results["samples"][shard.name]
    finite = [all(math.isfinite(score) for score, _ in sample["filtered_resps"]) for sample in samples]
    metrics = [metric for metric in ("acc", "acc_norm") if metric in samples[0]]
    return {
        "questions": len(samples),
        "right": {metric: sum(s[metric] for s, fine in zip(samples, finite, strict=True) if fine) for metric in metrics},
        "chance": sum(1 / len(sample["filtered_resps"]) for sample in samples),
        "infinite": finite.count(False),
        "unanswerable": sum(answer(task, sample["doc"]) is None for sample in samples),
        "seconds": time.perf_counter() - begun,
        "peak_bytes": memory.peak_bytes,
    }


def summary(parts: list[dict[str, Any]], available: int, version: float) -> Figures:
    """acc and, if the task defines it, acc_norm (fractions) with standard errors; chance (the accuracy of guessing); questions,
    questions_available; infinite_questions (not finite) and unanswerable_questions (the right answer is not among the choices),
    both counted as wrong; the task's version; seconds of one worker; peak_bytes of one shard."""
    questions = sum(part["questions"] for part in parts)
    figures: Figures = {}
    for metric in parts[0]["right"]:
        figures |= accuracy(metric, sum(part["right"][metric] for part in parts), questions)
    return figures | {
        "chance": sum(part["chance"] for part in parts) / questions,
        "questions": questions,
        "questions_available": available,
        "infinite_questions": sum(part["infinite"] for part in parts),
        "unanswerable_questions": sum(part["unanswerable"] for part in parts),
        "version": version,
        "seconds": sum(part["seconds"] for part in parts),
        "peak_bytes": max(part["peak_bytes"] for part in parts),
    }


def average(tasks: list[Figures]) -> Figures:
    """Unweighted means over tasks, with standard errors if all tasks have one. A task without acc_norm counts with its acc.

    Numbers of questions and seconds are sums. peak_bytes is the maximum.
    """
    figures: Figures = {}
    for metric in ("acc", "acc_norm"):
        used = [metric if metric in task else "acc" for task in tasks]
        figures[metric] = sum(task[m] for task, m in zip(tasks, used, strict=True)) / len(tasks)
        errors = [task[m + STDERR] for task, m in zip(tasks, used, strict=True) if m + STDERR in task]
        if len(errors) == len(tasks):
            figures[metric + STDERR] = math.hypot(*errors) / len(tasks)
    sums = ["questions", "questions_available", "infinite_questions", "unanswerable_questions", "seconds"]
    return figures | {
        "chance": sum(task["chance"] for task in tasks) / len(tasks),
        "tasks": len(tasks),
        **{name: sum(task[name] for task in tasks) for name in sums},
        "peak_bytes": max(task["peak_bytes"] for task in tasks),
    }


@contextmanager
def quiet() -> Iterator[None]:
    """Context in which lm-eval shows no bars and messages, and renders templates in a sandbox that cannot run Python code. The
    state of Python's `random`, from which lm-eval draws names, is restored at the end."""
    import datasets
    import lm_eval.api.task
    import lm_eval.utils
    from jinja2.sandbox import SandboxedEnvironment

    log, shown, templates = logging.getLogger("lm_eval"), lm_eval.api.task.tqdm, lm_eval.utils.env
    level, state, bars = log.level, random.getstate(), datasets.utils.is_progress_bar_enabled()
    sandbox = SandboxedEnvironment(undefined=templates.undefined, keep_trailing_newline=True)
    sandbox.filters.update(templates.filters)
    try:
        log.setLevel(logging.CRITICAL)
        datasets.disable_progress_bars()
        lm_eval.api.task.tqdm, lm_eval.utils.env = partial(tqdm, disable=True), sandbox
        yield
    finally:
        log.setLevel(level)
        random.setstate(state)
        lm_eval.api.task.tqdm, lm_eval.utils.env = shown, templates
        if bars:
            datasets.enable_progress_bars()

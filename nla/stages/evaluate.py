"""Evaluate the current model on the tasks of a run."""

from nla.compressed.contents import matrix_terms
from nla.compressed.layer import CompressedLinear
from nla.harness.record import RunRecord
from nla.harness.request import PreparedRun
from nla.machine.cache import digest, tensor_digest
from nla.machine.provenance import code_digest, computing_packages
from nla.models.base import Model


def state_of(prepared: PreparedRun, model: Model) -> str:
    """Digest of all that the current model's outputs depend on: weights, terms, form of the forward pass, architecture, device,
    code, packages."""
    terms = matrix_terms(model.module)
    kernels = {type(k).__module__ for term in terms.values() for m in term.modules() if (k := getattr(m, "kernel", None))}
    parts = {type(m).__module__ for term in terms.values() for m in term.modules() if type(m).__module__.startswith("nla.")}
    modules = {"nla.compressed.layer", type(prepared.model).__module__, *kernels, *parts}
    return digest(
        {
            "tensors": {name: tensor_digest(p) for name, p in model.module.state_dict().items()},
            "terms": {name: term.config() for name, term in terms.items()},
            "forms": sorted({type(m).__name__ for m in model.module.modules() if isinstance(m, CompressedLinear)}),
            "architecture": prepared.model.configuration(prepared.cache),
            "device": prepared.device.partition(":")[0],
            "code": code_digest(*sorted(modules)),
            "packages": computing_packages(),
        }
    )


def evaluate(prepared: PreparedRun, record: RunRecord, model: Model, stage: str, state: str) -> None:
    """Add the metrics of the current model to the record. Metrics of a model in the same state come from the cache.

    Args:
        stage: `dense`, `compressed` or `retrained`.
        state: digest of the model, see state_of().
    """
    metrics = record.metrics.setdefault(stage, {})
    for task in prepared.tasks:
        code = code_digest(type(task).__module__, type(task.data).__module__)
        metrics[task.name] = task.evaluate(model, prepared.cache, digest([state, code]), stage)
        for figures in metrics[task.name].values():
            peaks = [int(value) for name, value in figures.items() if name.endswith("peak_bytes") and "dense" not in name]
            record.peak_bytes[stage] = max([record.peak_bytes.get(stage, 0), *peaks])
        prepared.tracker.measured(record)

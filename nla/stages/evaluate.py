"""Measure the model as it is now."""

from nla.compressed.contents import matrix_terms
from nla.harness.record import RunRecord
from nla.harness.request import PreparedRun
from nla.machine.cache import digest, tensor_digest
from nla.machine.provenance import code_digest, computing_packages
from nla.models.base import Model


def state_of(prepared: PreparedRun, model: Model) -> str:
    """Digest of everything that the outputs of the model as it is now depend on."""
    terms = matrix_terms(model.module)
    kernels = {type(k).__module__ for term in terms.values() for m in term.modules() if (k := getattr(m, "kernel", None))}
    parts = {type(m).__module__ for term in terms.values() for m in term.modules() if type(m).__module__.startswith("nla.")}
    modules = {"nla.compressed.layer", type(prepared.model).__module__, *kernels, *parts}
    return digest(
        {
            "tensors": {name: tensor_digest(p) for name, p in model.module.state_dict().items()},
            "terms": {name: term.config() for name, term in terms.items()},
            "architecture": prepared.model.configuration(prepared.cache),
            "device": prepared.device.partition(":")[0],
            "code": code_digest(*sorted(modules)),
            "packages": computing_packages(),
        }
    )


def evaluate(prepared: PreparedRun, record: RunRecord, model: Model, stage: str, state: str) -> None:
    """Measure the model as it is now; what was measured before in this state is read from the cache."""
    metrics = record.metrics.setdefault(stage, {})
    for task in prepared.tasks:
        code = code_digest(type(task).__module__, type(task.data).__module__)
        metrics[task.name] = task.evaluate(model, prepared.cache, digest([state, code]), stage)
        for data, figures in metrics[task.name].items():
            peak = int(figures.get("peak_bytes", 0))
            record.peak_bytes[stage] = max(record.peak_bytes.get(stage, 0), peak)
            prepared.tracker.metrics(f"{stage}/{task.name}/{data}", figures)

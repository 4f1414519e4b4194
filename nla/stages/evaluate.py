"""Measure the model as it is now."""

from nla.compressed.terms import terms_of
from nla.harness.record import RunRecord
from nla.harness.request import PreparedRun
from nla.machine.cache import digest, tensor_digest
from nla.machine.provenance import code_digest, computing_packages
from nla.models.base import Model


def state_of(prepared: PreparedRun, model: Model) -> str:
    """Digest of everything a measurement of the model as it is now depends on, but for the data."""
    terms = {name: [m.kernel.name, vars(m.kernel)] for name, m in terms_of(model.module).items()}
    kernels = {type(m.kernel).__module__ for m in terms_of(model.module).values()}
    code = code_digest(*sorted({"nla.compressed.layer", type(prepared.model).__module__, *kernels}))
    return digest(
        {
            "tensors": {name: tensor_digest(p) for name, p in model.module.state_dict().items()},
            "terms": terms,
            "architecture": prepared.model.configuration(prepared.cache),
            "device": prepared.device.partition(":")[0],
            "code": code,
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

"""Distribute the budget over the matrices, if it depends on measurements of the model."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import torch
from tqdm import tqdm

from nla.budget.measured import MeasuredBudget
from nla.budget.plan import PlannedGroup, PlannedMatrix, make_plan, target_without_linear_term
from nla.compressed.surgery import get_linear, swap
from nla.harness.request import PreparedRun
from nla.machine.cache import digest
from nla.machine.errors import NonFiniteError
from nla.machine.provenance import code_digest, target_modules
from nla.matrix.objective import Norms
from nla.methods.fit import Fit
from nla.models.base import DTYPES, Model
from nla.stages.calibrate import Calibration, dense_statistics
from nla.stages.fit_groups import fit_groups
from nla.terms.base import Term
from nla.training.mean_loss import mean_loss


def allocated(prepared: PreparedRun, model: Model, calibration: Calibration) -> PreparedRun:
    """The run with its final plan. The plan changes only if the budget measures the model."""
    if not isinstance(prepared.budget, MeasuredBudget):
        return prepared
    specs = [matrix.spec for matrix in prepared.plan.matrices]
    target = target_without_linear_term(prepared.target, specs, prepared.retraining.linear_term)  # of what is fitted
    with tqdm(desc="budget", unit="matrix", dynamic_ncols=True) as bar:
        view = View(prepared, model, calibration, bar)
        with prepared.cache.lock("sensitivities", view.key):  # jobs of other sizes measure the same
            shares = prepared.budget.look(specs, target, view)
    return replace(prepared, plan=make_plan(specs, target, shares, prepared.method, DTYPES[prepared.values["dtype"]]))


class View:
    """The measurements that a budget may request (see `nla.budget.base.ModelView`). Each loss is stored on disk at once."""

    def __init__(self, prepared: PreparedRun, model: Model, calibration: Calibration, bar: tqdm) -> None:
        self.prepared, self.model, self.bar = prepared, model, bar
        self.store = dense_statistics(prepared, calibration)
        self.samples = calibration.samples[: prepared.budget.samples]
        self.specs = {matrix.spec.name: matrix.spec for matrix in prepared.plan.matrices}
        values = prepared.values
        code = code_digest("nla.stages.allocate", *target_modules([values["method"], values["model"]]))
        made_from = [calibration.made_from, values["method"], values["seed"], len(self.samples), code]
        self.key = digest(made_from)
        self.journal = prepared.cache.journal("sensitivities", self.key)

    @cached_property
    def parts(self) -> dict[int, dict]:
        """The stored parts of the journal."""
        return self.journal.read()

    @cached_property
    def known(self) -> dict[tuple[str, int], float]:
        """Stored losses by matrix and bits."""
        return {(part["matrix"], part["bits"]): part["loss"] for part in self.parts.values()}

    def norms(self, name: str) -> Norms:
        self.bar.update()
        weight = get_linear(self.model.module, name).weight.detach()
        return Norms(weight.float(), self.store.load(self.prepared.budget.needs, name, weight.device))

    def planned(self, name: str, bits: int) -> Term:
        spec, dtype = self.specs[name], DTYPES[self.prepared.values["dtype"]]
        (term,) = self.prepared.method.plan([(spec.out_features, spec.in_features)], bits, dtype)
        return term

    def size(self, name: str, bits: int) -> int:
        term = self.planned(name, bits)
        while term.count() and term.bits() < bits:  # a run that gives the matrix these bits makes the same fit
            bits = term.bits()
            term = self.planned(name, bits)
        return bits if term.count() else 0

    def fits(self, name: str, sizes: Sequence[int]) -> list[Fit]:
        method, values = self.prepared.method, self.prepared.values
        planned = [PlannedMatrix(self.specs[name], self.planned(name, bits), bits) for bits in sizes]
        groups = [PlannedGroup((matrix,)) for matrix in planned]
        with tqdm(disable=True) as silent:
            found = fit_groups(
                self.model.module, groups, method, values["method"], values["seed"], method.needs, self.store, silent
            )
            return [fits[name] for fits in found]

    def losses(self, name: str, sizes: Sequence[int]) -> list[float]:
        self.bar.update()
        missing = [bits for bits in sizes if (name, bits) not in self.known]
        possible = [bits for bits in missing if self.planned(name, bits).count()]
        fits = dict(zip(possible, self.fits(name, possible), strict=True))
        for bits in missing:
            loss = self.loss_with(name, fits[bits]) if bits in fits else float("inf")
            number = max(self.parts, default=-1) + 1  # not how many there are: a damaged line is none of them
            self.parts[number] = {"matrix": name, "bits": bits, "loss": loss}
            self.journal.append(number, self.parts[number])
            self.known[name, bits] = loss
        return [self.known[name, bits] for bits in sizes]

    def loss_with(self, name: str, fit: Fit) -> float:
        """Mean loss of the model over the samples (nats) with only this matrix compressed."""
        module, dense = self.model.module, get_linear(self.model.module, name)
        swap(module, {name: fit.term})
        try:
            loss = mean_loss(self.model.loss, self.samples, torch.device(self.prepared.device))
        finally:
            module.set_submodule(name, dense)
        if math.isnan(loss):
            raise NonFiniteError(f"with only {name} compressed, the loss is NaN; use dtype=bfloat16 or float32")
        return loss

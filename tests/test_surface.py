"""Retraining of the piecewise kernel keeps the fitted self-terms; the projected gradients are compared with autograd.

Self-terms are the sums sum_l mu_l |A_il|^2 and sum_l mu_l |B_jl|^2 of a matrix. The surface is the set of triplets with the
fitted self-terms.
"""

import pytest
import torch

from nla.budget.adaptive import Adaptive, Tightening
from nla.budget.schedule import Constant
from nla.compressed.contents import kernel_terms
from nla.compressed.layer import CompressedLinear
from nla.kernels.base import TRAINING_RATE
from nla.kernels.linear import Linear
from nla.kernels.piecewise import Piecewise
from nla.kernels.self_term_surface import self_term
from nla.machine.cache import Cache
from nla.matrix.objective import Objective
from nla.matrix.triplets import Triplets, alternating_signs
from nla.models.base import Sample
from nla.retrain.constraints import Constraints
from nla.retrain.history import History
from nla.retrain.trainable import chosen_parts
from nla.terms.kernel_term import KernelTerm
from nla.training.loop import Recipe, train
from nla.training.parameters import TrainedParameter

PARTS = ("A", "B", "mu")


def on_surface(kernel=None, h: int = 6):
    """A term with h triplets, its constraint surface, and its fitted self-terms (out,) and (in,)."""
    kernel = kernel or Piecewise(r=2)
    term = KernelTerm(kernel, kernel.random_start(13, 9, h, 2, torch.Generator().manual_seed(0)))
    own = {f"t.{part}": TrainedParameter(f"t.{part}", getattr(term, part)) for part in PARTS}
    return term, Constraints({"t": term}, own), (self_term(term.A, term.mu).detach(), self_term(term.B, term.mu).detach())


def gradients(term: KernelTerm, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    found = torch.autograd.grad(loss, [term.A, term.B, term.mu])
    return {f"t.{part}": g.clone() for part, g in zip(PARTS, found, strict=True)}


def test_a_loss_of_self_terms_alone_has_no_gradient_on_the_surface():
    term, surface, _ = on_surface()
    found = gradients(term, self_term(term.A, term.mu).cos().sum() + self_term(term.B, term.mu).square().sum())
    surface.project(found)
    assert all(float(g.abs().max()) < 1e-4 for g in found.values())


def test_the_projected_gradient_is_that_of_a_step_drawn_back_to_the_surface():
    """Compared with autograd of mu -> loss(A drawn back, mu), through the Newton step by which A compensates mu."""
    term, surface, (fitted, _) = on_surface()
    weights = torch.randn(13, 6, 2, generator=torch.Generator().manual_seed(1))
    found = gradients(term, (term.A * weights).sum() + (term.mu**3).sum() + 0 * term.B.sum())
    surface.project(found)
    mu = term.mu.detach().requires_grad_()
    normal = term.A.detach() * mu[:, None]
    excess = (self_term(term.A.detach(), mu) - fitted) / (2 * normal.square().sum((1, 2)))
    drawn_back = term.A.detach() - excess[:, None, None] * normal
    (expected,) = torch.autograd.grad((drawn_back * weights).sum() + (mu**3).sum(), mu)
    torch.testing.assert_close(found["t.mu"], expected, rtol=1e-4, atol=1e-4)
    normal = term.A.detach() * term.mu.detach()[:, None]
    assert float((found["t.A"] * normal).sum((1, 2)).abs().max()) < 1e-4


def test_a_step_is_drawn_back_to_the_surface_even_with_masked_triplets():
    term, surface, fitted = on_surface(h=40)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for part in PARTS:
            getattr(term, part).mul_(1 + 0.02 * torch.randn(getattr(term, part).shape, generator=generator))
        term.mu[1] = 0
        before = (self_term(term.A, term.mu) - fitted[0]).abs().mean()
        for _ in range(3):
            surface.retract()
        after = (self_term(term.A, term.mu) - fitted[0]).abs().mean()
        term.mu.zero_()
        surface.retract()
    assert after < 0.05 * before and bool(torch.isfinite(term.A).all())


@pytest.mark.parametrize("left", [[0], [0, 2, 4], [1, 3]])
def test_rows_whose_self_terms_are_out_of_reach_stay_unchanged(left):
    term, surface, _ = on_surface(h=24)
    with torch.no_grad():
        term.mu.copy_(alternating_signs(24, term.mu))
        surface = Constraints({"t": term}, {f"t.{part}": TrainedParameter(f"t.{part}", getattr(term, part)) for part in PARTS})
        term.mu[[i for i in range(24) if i not in left]] = 0
        before = term.A.square().sum((1, 2)), term.B.square().sum((1, 2))
    for _ in range(40):
        surface.retract()
    ((constraint, _),) = surface.held.values()
    for (factor, fitted), size in zip(constraint.held.values(), before, strict=True):
        self_terms = self_term(factor, term.mu)
        out_of_reach = self_terms.sign() != fitted.sign()
        assert bool(out_of_reach.any()) and torch.equal(factor.square().sum((1, 2))[out_of_reach], size[out_of_reach])


def test_other_kernels_are_trained_without_a_constraint():
    term, surface, _ = on_surface(Linear(r=2))
    found = gradients(term, term.dense().square().sum())
    before = {name: g.clone() for name, g in found.items()}
    surface.project(found)
    surface.retract()
    assert not surface.held and all(torch.equal(found[name], g) for name, g in before.items())


@pytest.mark.parametrize("held", [True, False])
def test_the_papers_kernel_is_retrained_at_the_rate_of_the_others_and_leaps_without_the_surface(tmp_path, held):
    """A fit of one matrix is trained to the outputs of another matrix, for inputs with a mean."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(48, 64, generator=generator) / 8, torch.randn(256, 64, generator=generator) + 0.5
    y = x @ (weight + 0.3 * torch.randn(48, 64, generator=generator) / 8).T
    kernel = Piecewise(r=1)
    start = kernel.balanced(kernel.warm_start(Objective(weight), 10, 1, generator)[0])
    layer = CompressedLinear(KernelTerm(kernel, start), None)
    trained, terms = chosen_parts(layer, ["triplets"]), kernel_terms(layer)
    surface = Constraints(terms if held else {}, {t.name: t for t in trained})
    recipe, rows = Recipe(steps=30, lr=TRAINING_RATE, warmup=0, weight_decay=0.0, clip=1e9), []
    history = History(surface, dict.fromkeys(terms, ""), None, 1, 1, 0, None, recipe, rows.append)
    loss = lambda s: (layer(s.inputs) - s.targets).square().mean()  # noqa: E731
    train(trained, loss, lambda step: [Sample(x, y)], recipe, Cache(tmp_path), "key", "test", history)
    losses = [row["loss"] for row in rows]
    if held:
        assert max(losses) == losses[0] and losses[-1] < 0.95 * losses[0]
    else:
        assert max(losses) > 1.5 * losses[0]


@pytest.mark.parametrize("gradient", ["loss", "constrained"])
def test_importance_is_that_of_the_losss_gradient_unless_the_constrained_one_is_asked_for(gradient):
    """Compared with |w dL/dw| by autograd. In both cases, the gradient that the optimiser gets is the constrained one."""
    term, surface, _ = on_surface()
    found = gradients(term, term.A.square().sum() + term.B.sum() + term.mu.exp().sum())
    on_the_surface = {name: g.clone() for name, g in found.items()}
    surface.project(on_the_surface)
    scored = {"loss": {name: g.clone() for name, g in found.items()}, "constrained": on_the_surface}[gradient]
    budget = Adaptive(Constant(2.0, 0.0, 0.5, 1), 0.0, 0.0, "score", gradient)
    masks = Tightening(budget, [Triplets(term.A.detach(), term.B.detach(), term.mu.detach())], 10, 4)
    recipe = Recipe(steps=4, lr=0.1, warmup=0, weight_decay=0.0, clip=1.0)
    history = History(surface, {"t": "t"}, masks, 10, 10, 0, None, recipe, lambda row: None)
    history.after_gradient(0, found)
    for part, sensitivity in zip(PARTS, masks.importance.smoothed[0].tensors, strict=True):
        torch.testing.assert_close(sensitivity, (getattr(term, part).detach() * scored[f"t.{part}"]).abs())
        assert torch.equal(found[f"t.{part}"], on_the_surface[f"t.{part}"])

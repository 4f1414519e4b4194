"""Importance, schedules and masks, compared with plain loops and with peft's AdaLoRA; and their edge cases."""

import pytest
import torch
from hydra.utils import instantiate
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft import AdaLoraConfig
from peft.tuners.adalora.layer import RankAllocator
from torch import nn

from nla.budget.adaptive import Adaptive, Tightening
from nla.budget.base import Target
from nla.budget.importance import Importance, best
from nla.budget.schedule import Constant, Cubic, Linear
from nla.machine.errors import UserError
from nla.machine.peak_memory import PeakMemory
from nla.matrix.triplets import Triplets, triplet_size
from nla.models.select import LinearSpec
from tests.conftest import configuration, options

SIZES = st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 5), st.integers(1, 3))  # out, in, h, r
FRACTIONS = st.floats(0, 0.45)


def random_triplets(out: int, inp: int, h: int, r: int, seed: int) -> Triplets:
    g = torch.Generator().manual_seed(seed)
    return Triplets(torch.randn(out, h, r, generator=g), torch.randn(inp, h, r, generator=g), torch.randn(h, generator=g))


@settings(max_examples=20, deadline=None)
@given(SIZES, st.floats(0, 0.99), st.floats(0, 0.99))
def test_importance_equals_a_loop_over_every_parameter(size, beta1, beta2):
    t, importance = random_triplets(*size, seed=0), None
    importance = Importance([t], beta1, beta2)
    smoothed = [[0.0] * p.numel() for p in t.tensors]
    uncertainty = [[0.0] * p.numel() for p in t.tensors]
    for step in range(3):
        g = random_triplets(*size, seed=step + 1)
        importance.update([t], [g])
        for part, (w, d) in enumerate(zip(t.tensors, g.tensors, strict=True)):
            for i, (x, y) in enumerate(zip(w.flatten().tolist(), d.flatten().tolist(), strict=True)):
                sensitivity = abs(x * y)
                smoothed[part][i] = beta1 * smoothed[part][i] + (1 - beta1) * sensitivity
                uncertainty[part][i] = beta2 * uncertainty[part][i] + (1 - beta2) * abs(sensitivity - smoothed[part][i])
    product = [torch.tensor([a * b for a, b in zip(s, u, strict=True)]) for s, u in zip(smoothed, uncertainty, strict=True)]
    a, b, mu = (p.view(q.shape) for p, q in zip(product, t.tensors, strict=True))
    expected = mu + a.mean(dim=(0, 2)) + b.mean(dim=(0, 2))
    torch.testing.assert_close(importance.scores()[0], expected, rtol=1e-4, atol=1e-6)  # fp32, numbers of size 1


class AdaLora(nn.Module):
    """One matrix with the parameter names that peft expects: A (r, in), E (r, 1), B (out, r)."""

    def __init__(self, t: Triplets) -> None:
        super().__init__()
        self.lora_A = nn.ParameterDict({"default": t.B[:, :, 0].T.clone()})
        self.lora_E = nn.ParameterDict({"default": t.mu[:, None].clone()})
        self.lora_B = nn.ParameterDict({"default": t.A[:, :, 0].clone()})

    def receive(self, g: Triplets) -> None:
        self.lora_A["default"].grad = g.B[:, :, 0].T.clone()
        self.lora_E["default"].grad = g.mu[:, None].clone()
        self.lora_B["default"].grad = g.A[:, :, 0].clone()


def test_importance_masks_and_budget_equal_those_of_pefts_adalora():
    sizes = [(6, 4, 5, 1), (6, 4, 5, 1), (6, 4, 5, 1)]
    triplets = [random_triplets(*size, seed=i) for i, size in enumerate(sizes)]
    model = nn.ModuleList(AdaLora(t) for t in triplets)
    config = AdaLoraConfig(init_r=5, target_r=2, tinit=2, tfinal=3, total_step=10, deltaT=1, beta1=0.85, beta2=0.85)
    theirs, ours = RankAllocator(model, config, "default"), Importance(triplets, 0.85, 0.85)
    for step in range(4):
        gradients = [random_triplets(*size, seed=10 * step + i) for i, size in enumerate(sizes)]
        for matrix, g in zip(model, gradients, strict=True):
            matrix.receive(g)
        theirs.update_ipt(model)
        ours.update(triplets, gradients)
    for i in range(len(triplets)):
        of_mu = ours.smoothed[i].mu * ours.uncertainty[i].mu
        torch.testing.assert_close(of_mu[:, None], theirs._element_score(f"{i}.lora_E.default"))
        kept = theirs._element_score(f"{i}.lora_A.default").T, theirs._element_score(f"{i}.lora_B.default")
        torch.testing.assert_close(ours.smoothed[i].B[:, :, 0] * ours.uncertainty[i].B[:, :, 0], kept[0])
        torch.testing.assert_close(ours.smoothed[i].A[:, :, 0] * ours.uncertainty[i].A[:, :, 0], kept[1])
    pattern = theirs.mask_to_budget(model, 6)
    costs = torch.full((15,), triplet_size(6, 4, 1))
    mask = best(torch.cat(ours.scores()), costs, 6 * triplet_size(6, 4, 1))
    assert mask.tolist() == [kept for i in range(3) for kept in pattern[f"{i}.lora_E.default"]] and int(mask.sum()) == 6
    cubic = Cubic(b0=2.5, t_i=0.2, t_f=0.3, interval=1)
    assert [cubic.budget(step, 10, 15, 6) for step in range(11)] == [theirs.budget_schedule(step)[0] for step in range(11)]


def test_importance_copies_no_parameters():
    t, g = random_triplets(64, 48, 16, 2, seed=0), random_triplets(64, 48, 16, 2, seed=1)
    importance = Importance([t, t], 0.85, 0.85)
    with PeakMemory(torch.device("cpu")) as memory:
        importance.update([t, t], [g, g])
    assert memory.peak_bytes <= 1.1 * t.A.nbytes
    with PeakMemory(torch.device("cpu")) as memory:
        importance.scores()
    assert memory.peak_bytes <= 1.1 * t.A.nbytes


SCHEDULES = {name: type(instantiate(configuration(f"schedule={name}").schedule)) for name in options("schedule")}


@pytest.mark.parametrize("schedule", SCHEDULES)
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_every_schedule_falls_from_b0_to_the_final_budget_and_chooses_at_its_end(schedule, data):
    s = SCHEDULES[schedule](1.5, data.draw(FRACTIONS), data.draw(FRACTIONS), data.draw(st.integers(1, 200)))
    steps = data.draw(st.integers(1, 100))
    assume(round(s.t_i * steps) + round(s.t_f * steps) < steps)
    begin, end = s.phases(steps)
    budgets = [s.budget(done, steps, 900, 600) for done in range(steps + 1)]
    assert budgets == sorted(budgets, reverse=True)
    assert all(b == 900 for b in budgets[: begin + 1]) and all(b == 600 for b in budgets[end:])
    chosen = [done for done in range(steps + 1) if s.chooses(done, steps)]
    assert chosen[-1] == end and all(begin < done <= end for done in chosen)
    in_force = [s.in_force(done, steps, 900, 600) for done in range(steps + 1)]
    for done in range(steps + 1):
        last = max((c for c in chosen if c <= done), default=None)
        assert in_force[done] == (900 if last is None else budgets[last])


def test_schedules_by_hand():
    known = {Constant: [100, 40, 40, 40, 40], Linear: [100, 80, 60, 40, 40], Cubic: [100, 57, 42, 40, 40]}
    for kind, budgets in known.items():
        schedule = kind(b0=2.5, t_i=0.2, t_f=0.2, interval=1)
        assert [schedule.budget(done, 5, 100, 40) for done in range(1, 6)] == budgets
    assert Cubic(1.5, 0.0, 0.0, 999).budget(1, 1, 9, 6) == 6


BAD = [
    ({"b0": 0.5}, "schedule.b0=0.5"),
    ({"t_i": 1.0}, "schedule.t_i=1.0"),
    ({"t_f": -0.1}, "schedule.t_f=-0.1"),
    ({"interval": 0}, "schedule.interval=0"),
]


@pytest.mark.parametrize(("change", "told"), BAD)
def test_an_invalid_schedule_is_an_error_that_names_the_value(change, told):
    with pytest.raises(UserError, match=told):
        Cubic(**({"b0": 1.5, "t_i": 0.1, "t_f": 0.1, "interval": 1} | change))


def test_a_warm_up_and_a_cool_down_without_a_step_between_are_refused():
    with pytest.raises(UserError, match=r"schedule.t_i=0.56 and schedule.t_f=0.4 are 6 and 4 of retrain.steps=10"):
        Cubic(1.5, 0.56, 0.4, 1).phases(10)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), min_size=1, max_size=12), st.integers(0, 60))
def test_the_best_fill_the_budget_in_order_and_ties_go_to_the_earlier(triplets, budget):
    scores, costs = torch.tensor([float(s) for s, _ in triplets]), torch.tensor([c for _, c in triplets])
    keep = best(scores, costs, budget)
    order = sorted(range(len(triplets)), key=lambda i: (-triplets[i][0], i))
    count = int(keep.sum())
    assert set(torch.nonzero(keep).flatten().tolist()) == set(order[:count])
    spent = int(costs[keep].sum())
    assert spent <= budget and (count == len(order) or budget - spent < triplets[order[count]][1])


def adaptive(**changes) -> Adaptive:
    settings = {"schedule": Linear(2.0, 0.0, 0.2, 1), "beta1": 0.5, "beta2": 0.5, "rank": "score", "gradient": "loss"}
    return Adaptive(**(settings | changes))


def run(tightening: Tightening, steps: range, important) -> list[list[torch.Tensor]]:
    """Run steps without an optimiser: random gradients times `important(step)` of each matrix. Returns all masks."""
    seen = []
    for step in steps:
        gradients = []
        for i, t in enumerate(tightening.triplets):
            g = random_triplets(t.out_features, t.in_features, t.h, t.r, seed=100 * step + i)
            gradients.append(Triplets(*(p * important(step)[i] for p in g.tensors)))
        tightening.after_gradient(step, gradients)
        tightening.after_step(step + 1)
        assert sum(tightening.kept()) <= tightening.budget(step + 1)
        assert tightening.budget(step + 1) - sum(tightening.kept()) < int(tightening.costs.max())
        assert all(bool((t.mu[~mask] == 0).all()) for t, mask in zip(tightening.triplets, tightening.masks, strict=True))
        seen.append([mask.clone() for mask in tightening.masks])
    return seen


def count(t: Triplets) -> int:
    """Number of parameters that are not masked."""
    return int((t.mu != 0).sum()) * triplet_size(t.out_features, t.in_features, t.r)


def two_matrices() -> list[Triplets]:
    return [random_triplets(8, 6, 10, 1, seed=0), random_triplets(5, 9, 10, 2, seed=1)]


def test_the_budget_holds_at_every_step_and_a_large_budget_masks_no_triplet():
    triplets = two_matrices()
    total = sum(count(t) for t in triplets)
    run(Tightening(adaptive(), triplets, total // 2, 20), range(20), lambda step: (1.0, 1.0))
    assert sum(count(t) for t in triplets) <= total // 2
    whole = two_matrices()
    masks = run(Tightening(adaptive(), whole, total, 5), range(5), lambda step: (1.0, 1.0))
    assert all(bool(mask.all()) for masks_of_step in masks for mask in masks_of_step)


def test_all_triplets_of_one_matrix_may_be_masked():
    triplets = two_matrices()
    run(Tightening(adaptive(), triplets, count(triplets[0]), 10), range(10), lambda step: (1.0, 0.0))
    assert count(triplets[1]) == 0 and bool((triplets[0].mu != 0).all())


def test_a_masked_triplet_comes_back_with_its_mu_before_the_cool_down_and_never_after():
    triplets = two_matrices()
    mus = [t.mu.clone() for t in triplets]
    tightening = Tightening(adaptive(schedule=Constant(2.0, 0.0, 0.4, 1)), triplets, count(triplets[0]), 20)
    masks = run(tightening, range(6), lambda step: (1.0, 0.0))
    assert not masks[-1][1].any()
    masks = run(tightening, range(6, 12), lambda step: (0.0, 100.0))
    back = masks[-1][1]
    assert back.any() and torch.equal(triplets[1].mu[back], mus[1][back])
    masks = run(tightening, range(12, 20), lambda step: (100.0, 0.0))
    assert torch.equal(masks[-1][1], back)


def test_a_restored_tightening_continues_with_the_same_masks():
    whole, halves = two_matrices(), two_matrices()
    final = count(whole[0])
    quiet = run(Tightening(adaptive(), whole, final, 12), range(12), lambda step: (1.0, 2.0))
    first = Tightening(adaptive(), halves, final, 12)
    run(first, range(5), lambda step: (1.0, 2.0))
    second = Tightening(adaptive(), halves, final, 12)
    second.restore({name: t.clone() for name, t in first.tensors().items()})
    later = run(second, range(5, 12), lambda step: (1.0, 2.0))
    assert all(torch.equal(a, b) for x, y in zip(quiet[5:], later, strict=True) for a, b in zip(x, y, strict=True))
    assert all(torch.equal(a.mu, b.mu) for a, b in zip(whole, halves, strict=True))


def test_a_triplet_that_costs_more_competes_by_score_or_by_score_per_parameter():
    triplets = [random_triplets(4, 4, 1, 1, seed=0), random_triplets(40, 40, 1, 1, seed=1)]
    by_rank = {}
    for rank in ("score", "score_per_parameter"):
        tightening = Tightening(adaptive(rank=rank), triplets, 90, 4)
        tightening.importance.scores = lambda: [torch.tensor([1.0]), torch.tensor([2.0])]
        by_rank[rank] = tightening.ranking().argmax().item()
    assert by_rank == {"score": 1, "score_per_parameter": 0}


def test_matrices_begin_with_b0_times_their_share_but_at_most_their_dense_size():
    specs = [LinearSpec("a", 10, 20, False), LinearSpec("b", 30, 20, False)]
    assert adaptive().allocate(specs, Target(0.375 * 32, 32, "")) == {"a": 32 * 150, "b": 32 * 450}
    assert adaptive().allocate(specs, Target(0.8 * 16, 16, "")) == {"a": 16 * 200 - 1, "b": 16 * 600 - 1}
    for name, value in {"beta1": 1.0, "beta2": -1, "rank": "x"}.items():
        with pytest.raises(UserError, match=f"budget.{name}={value}"):
            adaptive(**{name: value})
    with pytest.raises(UserError, match=r"set retrain.steps"):
        adaptive().check_retraining(0, [["triplets"]])

"""The parts of a retraining: trained parameters, losses, dropped triplets, and settings that are refused."""

from functools import partial

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from nla.budget.adaptive import Adaptive, Tightening
from nla.budget.schedule import Cubic
from nla.compressed.contents import kernel_terms
from nla.compressed.layer import LAYERS, CompressedLinear
from nla.harness.request import prepare
from nla.harness.settings import check_settings
from nla.kernels.linear import Linear
from nla.kernels.piecewise import Piecewise
from nla.machine.cache import Cache
from nla.machine.device import products_in
from nla.machine.errors import UserError
from nla.machine.peak_memory import PeakMemory
from nla.matrix.triplets import Triplets
from nla.models.base import Sample
from nla.retrain.constraints import Constraints
from nla.retrain.dropping import drop_from_training, drop_masked
from nla.retrain.history import History
from nla.retrain.losses import Distillation, softened_divergence
from nla.retrain.stages import loss_function, own_loss, recomputed_blocks
from nla.retrain.trainable import chosen_parts, prepare_terms, root_mean_square
from nla.terms.kernel_term import KernelTerm
from nla.training.loop import Recipe, train
from tests.conftest import SHORT, TINY, configuration


def request_of(tmp_path, *arguments: str):
    return prepare(check_settings(configuration("retrain.products=float32", *arguments, f"outputs_dir={tmp_path}")))


def compressed(tmp_path, *arguments: str):
    """The tiny LLaMA with every selected layer replaced by its truncated SVD."""
    request = request_of(tmp_path, *SHORT, *arguments)
    model = request.model.load("cpu", "float32", request.cache)
    for entry in request.plan.matrices:
        dense = model.module.get_submodule(entry.spec.name)
        left, s, right = torch.linalg.svd(dense.weight.detach(), full_matrices=False)
        h = entry.term.triplets.h
        triplets = Triplets(left[:, :h, None], right[:h].T[:, :, None], s[:h])
        model.module.set_submodule(entry.spec.name, CompressedLinear(KernelTerm(Linear(), triplets), dense.bias))
    return request, model


def sample(seed: int = 0, length: int = 32) -> Sample:
    tokens = torch.randint(256, (1, length), generator=torch.Generator().manual_seed(seed))
    return Sample(tokens, tokens)


def test_dropping_masked_triplets_changes_no_output(kernel):
    generator = torch.Generator().manual_seed(0)
    triplets = kernel.random_start(13, 9, 6, kernel.r, generator)
    bias, x = torch.randn(13, generator=generator), torch.randn(5, 9, generator=generator)
    for masked in ([1, 4], range(6)):
        t = Triplets(triplets.A, triplets.B, triplets.mu.clone())
        t.mu[list(masked)] = 0
        layer = CompressedLinear(KernelTerm(kernel, t), bias)
        before = layer(x)
        drop_masked(layer)
        torch.testing.assert_close(layer(x), before, rtol=1e-5, atol=1e-5)
        assert layer.term.count() == sum(p.numel() for p in layer.term.parameters())
    assert layer.term.count() == 0 and torch.equal(layer(x), bias.expand(5, 13))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropping_masked_triplets_does_not_change_the_rest_of_a_training(tmp_path, dtype):
    recipe = Recipe(steps=20, lr=0.05, warmup=2, weight_decay=0.0, clip=1e9)
    x, y = torch.randn(2, 32, 9, generator=torch.Generator().manual_seed(1)).to(dtype)
    batch = [Sample(x, y)]

    def trained(name, dropped):
        start = Linear().random_start(9, 9, 6, 1, torch.Generator().manual_seed(0)).map(lambda p: p.to(dtype))
        layer = CompressedLinear(KernelTerm(Linear(), start), None)
        moved, terms = chosen_parts(layer, ["triplets"]), kernel_terms(layer)
        masters = Triplets(*(t.master for t in moved))
        budget = Adaptive(Cubic(2.0, 0.1, 0.5, 1), 0.85, 0.85, "score", "loss")
        masks = Tightening(budget, [masters], 3 * 19, recipe.steps)

        def train_until(moved, masks, key, progress=None, until=None):
            history = History(Constraints({}, {}), dict.fromkeys(terms, ""), masks, 57, 57, 0, None, recipe, lambda row: None)
            loss = lambda s: (layer(s.inputs) - s.targets).float().square().mean()  # noqa: E731
            return train(moved, loss, lambda step: batch, recipe, Cache(tmp_path), key, "test", history, None, progress, until)

        progress = train_until(moved, masks, name, until=masks.cool_down if dropped else None)
        if dropped:
            before, mask = masters.map(torch.clone), masks.masks[0]
            moved = drop_from_training(terms, masks.masks, moved, progress)
            assert all(torch.equal(t.master, left) for t, left in zip(moved, before.prune(mask).tensors, strict=True))
            assert [t.master.numel() for t in moved] == [27, 27, 3] == [m["exp_avg"].numel() for m in progress.moments.values()]
            train_until(moved, None, f"{name}.after", progress)
        else:
            drop_masked(layer)
        return layer.term.dense().detach()

    exact = dtype == torch.float32
    torch.testing.assert_close(
        trained("a", True), trained("b", False), rtol=1e-4 if exact else 0.05, atol=1e-5 if exact else 0.05
    )


def test_the_rate_of_a_tensor_does_not_depend_on_the_thread_count():
    sizes = [torch.randn(n, 1, generator=torch.Generator().manual_seed(n)) for n in range(60_000, 130_000, 1_777)]
    try:
        torch.set_num_threads(2)
        two = [root_mean_square(p) for p in sizes]
    finally:
        torch.set_num_threads(1)
    assert two == [root_mean_square(p) for p in sizes]
    assert two[0] == pytest.approx(float(sizes[0].square().mean().sqrt()), rel=1e-5)


def test_balancing_triplets_does_not_change_their_matrix(kernel):
    t = kernel.random_start(13, 9, 6, kernel.r, torch.Generator().manual_seed(0))
    t = Triplets(t.A * 3, t.B / 7, t.mu.clone())
    t.mu[2] = 0
    torch.testing.assert_close(kernel.dense(kernel.balanced(t)), kernel.dense(t), rtol=1e-4, atol=1e-5)


def test_balanced_linear_triplets_have_factors_of_one_size():
    t = Linear().balanced(Linear().random_start(13, 9, 6, 1, torch.Generator().manual_seed(0)).scaled(50))
    assert torch.allclose(t.A.norm(dim=(0, 2)), t.B.norm(dim=(0, 2))) and set(t.mu.tolist()) <= {-1.0, 1.0}


def test_a_linear_term_begins_at_zero_and_is_paid_from_the_budget_of_its_matrix(tmp_path):
    request, model = compressed(tmp_path, "retrain=lora", "retrain.steps=2", "retrain.linear_term=2")
    plain = request_of(tmp_path, *SHORT)
    for e, p in zip(request.plan.matrices, plain.plan.matrices, strict=True):
        assert p.bits - e.bits == 32 * 2 * (e.spec.out_features + e.spec.in_features + 1)
    before = model.logits(sample().inputs)
    prepare_terms(model.module, 2, seed=0)
    torch.testing.assert_close(model.logits(sample().inputs), before, rtol=1e-4, atol=1e-5)
    assert {t.name.partition(".term.terms.")[2] for t in chosen_parts(model.module, ["linear_term"])} == {"1.A", "1.B", "1.mu"}


def test_only_the_named_parts_are_trained(tmp_path):
    _, model = compressed(tmp_path)
    kinds = {"A": ("A",), "triplets": ("A", "B", "mu"), "norms": ("weight",)}
    for part, endings in kinds.items():
        names = [t.name for t in chosen_parts(model.module, [part])]
        assert names and {name.rpartition(".")[2] for name in names} == set(endings)
        assert {n for n, p in model.module.named_parameters() if p.requires_grad} == set(names)
    assert all("norm" in t.name for t in chosen_parts(model.module, ["norms"]))
    assert len(chosen_parts(model.module, ["everything"])) == len(list(model.module.parameters()))
    assert not chosen_parts(model.module, ["biases"])


@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
def test_recomputing_blocks_gives_the_same_gradient_and_restores_their_forward(tmp_path, products):
    request, model = compressed(tmp_path)
    parameters = [t.parameter for t in chosen_parts(model.module, ["triplets", "norms"])]
    with PeakMemory(torch.device("cpu")) as whole:
        plain = torch.autograd.grad(own_loss(model, products, sample(length=256)), parameters)
    with recomputed_blocks(model, request.plan.layers), PeakMemory(torch.device("cpu")) as memory:
        again = torch.autograd.grad(own_loss(model, products, sample(length=256)), parameters)
    assert memory.peak_bytes < 0.8 * whole.peak_bytes
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert not any("forward" in vars(m) for m in model.module.modules())


def test_a_forward_that_a_block_has_of_its_own_is_put_back_after_recomputing(tmp_path):
    """accelerate puts one there if a model is spread over several GPUs."""
    request, model = compressed(tmp_path)
    block = model.module.model.layers[0]
    own = block.forward = partial(type(block).forward, block)
    with recomputed_blocks(model, request.plan.layers):
        assert block.forward is not own
    assert block.forward is own


@pytest.mark.parametrize("losses", [[], ["retrain.logits=1", "retrain.features=1"]])
def test_bfloat16_products_give_nearly_the_gradient_of_float32(tmp_path, losses):
    found = []
    for products in ("float32", "bfloat16"):
        request, model = compressed(tmp_path, "retrain.steps=2", f"retrain.products={products}", *losses)
        parameters = [t.parameter for t in chosen_parts(model.module, ["triplets", "norms"])]
        dense = partial(request.model.load, "cpu", "float32", request.cache)
        with loss_function(model, request.plan.layers, request.retraining, dense) as loss:
            gradients = torch.autograd.grad(loss(sample()), parameters)
        assert all(g.dtype == torch.float32 for g in gradients)
        found.append(torch.cat([g.flatten() for g in gradients]))
    assert 0 < (found[1] - found[0]).norm() < 0.02 * found[0].norm()


@pytest.mark.parametrize("form", LAYERS.values())
def test_bfloat16_products_do_not_change_a_matrix_in_whose_sum_terms_cancel(form):
    far = Triplets(20 + torch.randn(24, 5, 1), 20 + torch.randn(16, 5, 1), torch.randn(5))  # large self-terms
    layer, x = form(KernelTerm(Piecewise(r=1), far), None), torch.randn(40, 16)
    with torch.no_grad():
        exact = layer(x)
        with products_in(torch.bfloat16, x.device):
            assert (layer(x) - exact).norm() < 0.01 * exact.norm()


def test_distillation_from_an_equal_model_adds_no_loss(tmp_path):
    request = request_of(tmp_path, *SHORT, "retrain.steps=2", "retrain.logits=1", "retrain.features=1")
    model, dense = (request.model.load("cpu", "float32", request.cache) for _ in range(2))
    loss = Distillation(model, dense, request.plan.layers, request.retraining)
    torch.testing.assert_close(loss(sample()), model.loss(sample()))


def test_the_features_of_a_model_that_is_one_block_are_its_logits(tmp_path):
    own_head = ["model.architecture.tie_word_embeddings=false", "select.include='layers|lm_head'"]
    request = request_of(tmp_path, *SHORT, "retrain.steps=2", "retrain.features=1", *own_head)
    model, dense = (request.model.load("cpu", "float32", request.cache) for _ in range(2))
    torch.nn.init.zeros_(model.module.lm_head.weight)
    loss = Distillation(model, dense, request.plan.layers, request.retraining)
    torch.testing.assert_close(loss(sample()), model.loss(sample()) + 2)  # 2 |f - w|^2 / (|f|^2 + |w|^2) with f = 0


def test_a_loss_that_compares_weights_alone_does_not_run_the_dense_model(tmp_path):
    request, model = compressed(tmp_path, "retrain.steps=2", "retrain.perturbation=1")
    dense, ran = request.model.load("cpu", "float32", request.cache), []
    dense.module.register_forward_hook(lambda *_: ran.append(1))
    loss = Distillation(model, dense, request.plan.layers, request.retraining)(sample())
    assert loss > model.loss(sample()) and not ran and request.retraining.distils


def test_distillation_is_the_sum_of_its_parts_by_hand(tmp_path):
    request, model = compressed(
        tmp_path,
        "retrain.steps=2",
        "retrain.logits=0.5",
        "retrain.features=2",
        "retrain.perturbation=3",
        "retrain.temperature=4",
    )
    dense = request.model.load("cpu", "float32", request.cache)
    s, seen = sample(), {id(model): [], id(dense): []}
    distillation = Distillation(model, dense, request.plan.layers, request.retraining)
    loss = distillation(s)
    distillation.close()
    assert not any(part._forward_hooks for m in (model, dense) for part in m.module.modules())
    for m in (model, dense):
        for block in m.module.model.layers:
            block.register_forward_hook(lambda _, i, out, m=m: seen[id(m)].append(out[0] if isinstance(out, tuple) else out))
    a, b = model.logits(s.inputs), dense.logits(s.inputs)
    p, q = (b / 4).softmax(-1), (a / 4).softmax(-1)
    divergence = 16 * (p * (p / q).log()).sum(-1).mean()
    pairs = list(zip(seen[id(model)], seen[id(dense)], strict=True))
    sizes = [2 * (f - g).square().sum(-1) / (f.square().sum(-1) + g.square().sum(-1)) for f, g in pairs]
    features = torch.stack(sizes).mean()
    changes = [
        (model.module.get_submodule(n).dense().weight - dense.module.get_submodule(n).weight).abs().max()
        for n in request.plan.layers
    ]
    perturbation = torch.stack(changes).square().mean()
    own = cross_entropy(a[0, :-1], s.targets[0, 1:])
    torch.testing.assert_close(loss, own + 0.5 * divergence + 2 * features + 3 * perturbation, rtol=1e-4, atol=1e-4)
    loss.backward()
    assert all(t.parameter.grad is not None for t in chosen_parts(model.module, ["triplets"]))


def test_softened_divergence_of_equal_predictions_is_zero():
    logits = torch.randn(2, 3, 7)
    assert float(softened_divergence(logits, logits + 5.0, 2.0)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("rows", [1, 37])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_softened_divergence_and_its_gradient_are_those_of_torch(rows, temperature):
    logits, wanted = torch.randn(2, rows, 11).mul(3).requires_grad_(), torch.randn(2, rows, 11)
    a, b = (torch.log_softmax(x.flatten(0, 1) / temperature, -1) for x in (logits, wanted))
    reference = temperature**2 * kl_div(a, b, reduction="batchmean", log_target=True)
    found = softened_divergence(logits, wanted, temperature)
    assert found.item() == pytest.approx(reference.item(), rel=1e-5)
    (expected,), (gradient,) = (torch.autograd.grad(3 * value, logits) for value in (reference, found))
    assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-7)


ERRORS = [
    (["budget=adaptive"], "set retrain.steps"),
    (["budget=adaptive", "retrain.steps=10", "schedule.t_i=0.48", "schedule.t_f=0.5"], "leave no step to tighten"),
    (["budget=adaptive", "retrain.steps=5", "schedule.t_i=0.1", "schedule.t_f=0.9"], "their sum must be below 1"),
    (["retrain.steps=5", "dtype=float16"], "dtype=float16 cannot be retrained"),
    (["method=fwsvd", "dtype=float16"], "dtype=float16 cannot hold the gradients"),
    (["method=svd", "budget=marginal", "dtype=float16"], "dtype=float16 cannot hold the gradients"),
    (["budget=adaptive", "retrain.steps=10", "retrain=u_then_v"], "trained together"),
    (["retrain.steps=10", "retrain.batch=5", "retrain.micro=2"], "retrain.batch=5 must be a multiple of retrain.micro=2"),
    (["retrain.steps=10", "retrain.train=[weights]"], "retrain.train=weights is not known"),
    (["retrain.steps=10", "retrain.processes=9"], "retrain.processes=9 cannot share the 4 micro-batches"),
    (["retrain.steps=-1"], "retrain.steps=-1"),
    (["retrain.steps=3", "retrain=u_then_v"], "a multiple of the 2 stages"),
    (["retrain.steps=3", "retrain.linear_term=99"], "retrain.linear_term=99 takes all"),
    (["retrain.steps=3", "retrain.linear_term=2", "retrain.train=[norms]"], "is zero until trained"),
    (["retrain.steps=3", "retrain.train=[linear_term]"], "a linear term of rank 0"),
    (["retrain.steps=3", "retrain.length=4096"], "longer than the 2048 tokens"),
    (["retrain.steps=3", "calibration=digits"], "calibration=digits holds images"),
    (["method=asvd", "calibration=digits"], "calibration=digits holds images"),
    (["retrain.steps=3", "retrain.processes=2", "select.include=layers.0.mlp.up"], "have 1 matrices to share"),
    (["retrain.steps=3", "retrain.products=int8"], "retrain.products=int8 is not known"),
    (["retrain.steps=3", "retrain.lr=0"], "retrain.lr=0 must be above 0"),
    (["retrain.steps=4", "method=gptq", "bits=4", "budget=adaptive"], "masks triplets of 32-bit numbers, not int"),
    (["retrain.steps=4", "method=nla_angles", "bits=4", "budget=adaptive"], "not phase angle5 h="),
    (
        ["retrain.steps=4", "method=svd_llm_int4", "bits=4", "retrain=u_then_v"],
        "retrain.train=A names no part of the model or of factors rank=",
    ),
    (["retrain.steps=4", "retrain.train=[biases]"], r"retrain\.train=biases names no part of the model or of piecewise"),
    (["refine=block", "method=svd", "refine.train=biases"], r"refine\.train=biases names no part of the model or of linear"),
    (
        ["method=gptq", "bits=4", "refine=block", "refine.train=A+B"],
        "names no part of the model or of int3",
    ),
]


@pytest.mark.parametrize(("arguments", "told"), ERRORS, ids=[" ".join(arguments) for arguments, _ in ERRORS])
def test_impossible_settings_are_refused_before_the_run(tmp_path, arguments, told):
    with pytest.raises(UserError, match=told.replace("[", r"\[")):
        request_of(tmp_path, *TINY, *arguments)

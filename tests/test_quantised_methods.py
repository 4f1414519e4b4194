"""Tests of methods that store numbers in few bits: rtn, gptq, and a grid plus linear factors."""

import json

import pytest
import torch
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st

import nla
from nla.codes.grid_format import GridFormat
from nla.codes.rounding import rounded_to_nearest
from nla.kernels.linear import Linear
from nla.machine.errors import UserError
from nla.matrix.objective import Norms, Objective
from nla.methods.caldera import Caldera
from nla.methods.eora import EoRA
from nla.methods.gptq import GPTQ
from nla.methods.lq_lora import LQLoRA
from nla.methods.quip import QuIP
from nla.methods.rtn import RTN
from nla.methods.svd_llm import SVDLLM
from nla.methods.svdquant import SVDQuant
from nla.storage.base import Coded, Float
from nla.terms.grid import Grid
from nla.terms.kernel_term import KernelTerm
from nla.terms.lattice_term import LatticeTerm
from nla.terms.state import pack, unpack
from tests import forked
from tests.conftest import TINY, composed
from tests.samples import compress, correlated, normal

PAIRED = ["lq_lora", "eora", "svdquant", "caldera"]


def planned(m: int, n: int, form: GridFormat, rank: int) -> tuple[Grid, KernelTerm]:
    """A grid and linear factors without values."""
    grid = Grid.empty(m, n, form.width, form.group, form.kind, torch.float32)
    return grid, KernelTerm.empty(Linear(), m, n, rank, 1, torch.float32)


def make_method(name: str, **values: object):
    return instantiate(composed(f"method={name}").method, _convert_="all", **values)


@pytest.mark.parametrize("shape", [(256, 256), (192, 576)])
def test_the_factors_have_the_rank_that_is_asked_for_also_where_its_zero_points_share_bytes(shape):
    method = Caldera(64, 1, "gptq", False, Coded("int", 2, 0))
    for bits in (5, method.least_bits([shape], torch.float32) / (shape[0] * shape[1])):
        _, low = method.plan([shape], round(bits * shape[0] * shape[1]), torch.float32)[0].leaves()
        assert low.rank_bound() == 64


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(["rtn", *PAIRED]), st.integers(1, 300), st.integers(1, 300), st.floats(0.5, 15))
def test_a_planned_term_never_exceeds_its_bits_and_exists_from_the_least_bits_on(name, m, n, per_weight):
    method, bits = make_method(name), int(per_weight * m * n)
    term = method.plan_matrix(m, n, bits, torch.bfloat16)
    least = method.least_bits([(m, n)], torch.bfloat16)
    assert term.bits() <= bits and (term.count() > 0) == (bits >= least)
    assert method.plan_matrix(m, n, least, torch.bfloat16).bits() == least


def test_a_grid_gets_the_most_bits_that_fit_and_a_pair_keeps_a_sixteenth_for_its_factors():
    def plan(name: str, bits: float, **values):
        return make_method(name, **values).plan([(576, 576)], int(bits * 576**2), torch.bfloat16)[0].describe()

    assert plan("gptq", 2.29) == "int2 group=64" and plan("gptq", 2.27) == "int2 group=128"
    assert plan("gptq", 1.6) == "int1 group=32" and plan("rtn", 5) == "int4 group=32"
    assert plan("eora", 2.5) == "int2 group=64 + linear h=3 r=1"
    assert plan("eora", 4.1).startswith("int4 group=576 + linear h=")  # not int3: narrower codes lose more than ranks gain
    assert plan("eora", 2.29, rank=1) == "int2 group=128 + linear h=1 r=1"
    assert RTN("nf4").plan_matrix(512, 512, int(4.25 * 512**2), torch.bfloat16).describe() == "nf4 group=64"  # no zero points
    assert plan("lq_lora", 4.8).startswith("nf4 group=32") and plan("lq_lora", 4.8, levels="uniform").startswith("int4")


def test_gptq_changes_the_outputs_less_than_rtn_and_rtn_the_weights():
    weight = normal(48, 96)
    rtn, gptq = compress(RTN("uniform"), weight, 2.6), compress(GPTQ(False), weight, 2.6)
    assert rtn.term.describe() == gptq.term.describe()
    assert gptq.weighted_error < 0.6 * rtn.weighted_error and rtn.relative_error < gptq.relative_error
    assert rtn.losses == [(0, pytest.approx(rtn.relative_error, rel=1e-3))]
    assert gptq.losses == [(0, pytest.approx(gptq.weighted_error, rel=1e-3))] and gptq.status == "rounded"


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_eora_is_the_published_projection_to_scaled_eigenvectors(shape):
    """The repair of W - Q by the paper's recipe: eigenvectors of the Gram matrix, SVD, and back."""
    weight, statistics = normal(*shape), correlated(shape[1])
    objective = Norms(weight, statistics).outputs
    rounded, factors = next(EoRA(3, False).pairs(objective, planned(*shape, GridFormat(2, 8), 3), torch.Generator()))
    values, Q = torch.linalg.eigh(statistics.gram.double())
    scaled = Q * values.sqrt()
    rest = (weight - rounded.dense().detach()).double()
    U, s, Vh = torch.linalg.svd(rest @ scaled, full_matrices=False)
    expected = (U[:, :3] * s[:3]) @ Vh[:3] @ torch.linalg.inv(scaled)
    torch.testing.assert_close(factors.dense().detach().double(), expected, rtol=1e-3, atol=1e-4)
    left = (rest - factors.dense().detach().double()) @ scaled
    assert float(left.square().sum()) == pytest.approx(float(s[3:].square().sum()), rel=1e-4)


@pytest.mark.parametrize("name", PAIRED)
def test_a_pair_is_better_than_its_rounded_part_alone_and_is_the_best_of_all_that_were_tried(name):
    weight, statistics = normal(64, 96), correlated(96)
    fit = compress(make_method(name, rank=6), weight, 8, statistics)
    rounded = next(fit.term.leaves())
    rounding = {"eora": GPTQ(False), "caldera": QuIP(False)}.get(name, RTN("uniform"))
    alone = compress(rounding, weight, rounded.bits() / weight.numel() + 1e-3)
    assert alone.term.bits() >= rounded.bits()
    own = "relative_error" if name == "lq_lora" else "weighted_error"
    assert getattr(fit, own) < getattr(alone, own)
    assert getattr(fit, own) == pytest.approx(min(error for _, error in fit.losses), rel=0.02)


def test_caldera_on_a_grid_begins_with_eora_and_goes_on_below_it():
    weight = normal(64, 96)
    eora, caldera = compress(EoRA(4, False), weight, 5), compress(Caldera(4, 6, "gptq", False, Float()), weight, 5)
    assert caldera.losses[0][1] == pytest.approx(eora.losses[0][1]) and len(caldera.losses) == 6
    assert caldera.weighted_error < eora.weighted_error


def test_caldera_rounds_what_its_factors_leave_to_the_lattice_as_quip_does():
    weight, statistics = normal(64, 96), correlated(96)
    objective = Norms(weight, statistics).outputs
    caldera = make_method("caldera", rank=4)
    rounded, low = caldera.plan_matrix(64, 96, 6 * weight.numel(), torch.float32).leaves()
    pairs = caldera.pairs(objective, (rounded, low), torch.Generator().manual_seed(0))
    (first, factors), (second, _) = next(pairs), next(pairs)
    generator = torch.Generator().manual_seed(0)
    for found, left in ((first, weight), (second, weight - factors.dense().detach())):
        own = QuIP(False).start(Objective(left, objective.factor), rounded, generator).term
        assert isinstance(found, LatticeTerm) and torch.equal(found.dense(), own.dense())
    rest = Objective(weight - first.dense().detach(), objective.factor)
    left, s, right = rest.spectrum.truncated(4)
    torch.testing.assert_close(factors.dense().detach(), (left * s @ right.T).float(), rtol=1e-3, atol=1e-4)


def test_alternation_ends_when_the_error_rises():
    fit = compress(LQLoRA(4, 50, "weight", "nf4"), normal(64, 96), 5)
    errors = [error for _, error in fit.losses]
    assert len(errors) < 50 and errors[-1] >= errors[-2] and errors[:-1] == sorted(errors[:-1], reverse=True)


@pytest.mark.parametrize("method", [SVDQuant(4, 1, False), LQLoRA(4, 1, "weight", "nf4")])
def test_the_first_factors_are_singular_vectors_of_the_weight_and_the_grid_holds_the_rest(method):
    """Algorithm 1 of LQ-LoRA starts with Q = 0, as SVDQuant does."""
    weight, form = normal(32, 48), GridFormat(4, 16)
    sizes = planned(32, 48, form, 4)
    rounded, factors = next(method.pairs(method.objective(Norms(weight, correlated(48))), sizes, torch.Generator()))
    left, s, right = (part.float() for part in Objective(weight).spectrum.truncated(4))
    torch.testing.assert_close(factors.dense().detach(), left * s @ right.T)
    rest = rounded_to_nearest(weight - factors.dense().detach(), form)
    torch.testing.assert_close(rounded.dense().detach(), rest.dense(form))


def test_every_pair_of_a_grid_and_factors_counts_its_operations():
    fit = compress(LQLoRA(4, 50, "weight", "nf4"), normal(64, 96), 5)
    one = compress(LQLoRA(4, 1, "weight", "nf4"), normal(64, 96), 5)
    assert fit.steps == len(fit.losses) - 1 > 0 and one.steps == 0 and fit.flops == len(fit.losses) * one.flops > 0


def test_weighting_the_inputs_lowers_lq_loras_error_of_the_outputs():
    weight = normal(64, 96)
    plain, weighted = (compress(LQLoRA(4, 20, loss, "nf4"), weight, 6) for loss in ("weight", "inputs"))
    assert weighted.weighted_error < plain.weighted_error


@pytest.mark.parametrize("name", ["rtn", "gptq", *PAIRED])
@pytest.mark.parametrize("tokens", [3, 0])
def test_gram_matrices_that_are_singular_and_weights_with_zero_rows_and_columns_are_fitted(name, tokens):
    weight, statistics = normal(24, 32), correlated(32, tokens)
    weight[3], weight[:, 5] = 0, 0
    if not tokens:
        statistics.gram[7], statistics.gram[:, 7] = 0, 0
    fit = compress(make_method(name), weight, 6, statistics)
    assert fit.term.is_finite() and 0 < fit.relative_error < 1 and fit.weighted_error < 0.1
    zero = compress(make_method(name), torch.zeros(24, 32), 6, statistics)
    assert torch.equal(unpack(*pack({"w": zero.term}))["w"].dense(), torch.zeros(24, 32))
    assert zero.status == "zero" and zero.relative_error == 0 and not zero.term.dense().any()


def test_settings_that_make_no_sense_are_errors_that_name_them():
    with pytest.raises(UserError, match=r"method\.rank=0 must be a whole number from 1"):
        EoRA(0, False)
    with pytest.raises(UserError, match=r"method\.iterations=0"):
        Caldera(None, 0, "gptq", False, Float())
    with pytest.raises(UserError, match=r"method\.rounding=rtn is not known; allowed: lattice, gptq"):
        Caldera(None, 5, "rtn", False, Float())
    with pytest.raises(UserError, match=r"method\.levels=nf3 is not known; allowed: uniform, nf4"):
        LQLoRA(None, 5, "weight", "nf3")
    with pytest.raises(UserError, match=r"linear factors of this method .* use storage=float, int8"):
        SVDLLM(False, 0.0, Coded("angle", 3, 0))


@pytest.mark.parametrize("name", ["gptq", "caldera"])
def test_a_quantised_model_is_saved_trained_and_loaded_again(name, run_here, tmp_path):
    folder = tmp_path / "saved"
    arguments = [f"method={name}", "bits=3.5", "dtype=bfloat16", "retrain.steps=2", "retrain.length=32", f"save={folder}"]
    arguments += ["select.include='layers.0'"]
    record = run_here(*TINY, *arguments, "retrain.watch=0", "statistics.windows=4", "statistics.length=32")
    assert record.status == "done" and record.bits.selected_per_weight <= 3.5
    assert record.history[-1]["kept"] == record.history[-1]["budget"] == sum(fit.n_params for fit in record.fits)
    loaded = nla.load_compressed(folder)
    rounded = [module for module in loaded.modules() if isinstance(module, Grid | LatticeTerm)]
    assert len(rounded) == 7 and sum(8 * b.numel() for term in rounded for b in term.buffers()) > 0


def test_folders_of_all_kinds_of_codes_load_in_a_process_that_has_made_no_table_of_codes(run_here, tmp_path):
    """transformers builds a model on the meta device, where tables of codes that are made then would have no values."""
    asked = [*TINY, "dtype=bfloat16", "statistics.windows=4", "statistics.length=32", "solver.steps=5", "task.max_windows=1"]
    asked += [r"select.include='layers\.0.*(q_proj|up_proj)'"]
    expected = {}
    for name, bits in (("quip", 2.5), ("lq_lora", 5.5), ("nla_angles", 6), ("svd_llm_int4", 4)):
        run_here(*asked, f"method={name}", f"bits={bits}", f"save={tmp_path / name}")
        expected[name] = float(nla.load_compressed(tmp_path / name)(torch.arange(9)[None]).logits.detach().float().sum())
    code = (
        "import json, nla, torch; print(json.dumps({path.rpartition('/')[2]: float(nla.load_compressed(path)"
        f"(torch.arange(9)[None]).logits.float().sum()) for path in {[str(tmp_path / name) for name in expected]}}}))"
    )
    assert json.loads(forked.finish(["-c", code]).stdout) == expected


def test_caldera_with_factors_of_four_bits_gets_more_rank_in_the_same_bits():
    weight = normal(96, 128).to(torch.bfloat16)
    wide, narrow = (
        compress(Caldera(None, 3, "gptq", False, storage), weight, 3, correlated(128))
        for storage in (Float(), Coded("int", 4, 0))
    )
    (_, low), (_, packed_low) = (fit.term.leaves() for fit in (wide, narrow))
    assert packed_low.rank_bound() > 2 * low.rank_bound() and narrow.bits <= 3 * weight.numel()
    assert narrow.weighted_error < wide.weighted_error

"""The training loop and the models that the harness trains. Kills and the thread count do not change the result."""

import math

import pytest
import torch
from hydra.utils import instantiate
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

from nla.machine.cache import Cache
from nla.machine.errors import NonFiniteError
from nla.models.base import LanguageModel, Sample
from nla.pretrain.language_model import END, learn_tokenizer
from nla.training.checkpoints import Checkpoints, Progress
from nla.training.loop import Recipe, train
from nla.training.observer import Observer
from nla.training.parameters import TrainedParameter, whole_model
from nla.training.processes import OneProcess, assign_owners
from tests.conftest import configuration

RECIPE = Recipe(steps=30, lr=0.05, warmup=3, weight_decay=0.1, clip=1.0)


class StoppedError(Exception):
    pass


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))


def batch(step: int) -> list[Sample]:
    """Random points, labelled by the largest of three coordinates: learnable in a few steps."""
    x = torch.randn(24, 4, generator=torch.Generator().manual_seed(step))
    return [Sample(part, part[:, :3].argmax(1)) for part in x.split(8)]


def trained(cache: Cache, stop_at: int | None = None, threads: int = 1, recipe: Recipe = RECIPE) -> nn.Module:
    module = network()

    def batches(step: int) -> list[Sample]:
        if step == stop_at:
            raise StoppedError
        return batch(step)

    torch.set_num_threads(threads)
    try:
        train(whole_model(module), lambda s: cross_entropy(module(s.inputs), s.targets), batches, recipe, cache, "key", "test")
    except StoppedError:
        pass
    finally:
        torch.set_num_threads(1)
    return module


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_a_training_learns_and_does_not_depend_on_the_thread_count(tmp_path):
    one, two = trained(Cache(tmp_path / "one")), trained(Cache(tmp_path / "two"), threads=2)
    assert same(one, two)
    x, y = torch.cat([s.inputs for s in batch(99)]), torch.cat([s.targets for s in batch(99)])
    assert float((one(x).argmax(1) == y).float().mean()) > 0.8


@pytest.mark.parametrize("stop_at", [2, 7, 29])
def test_a_training_that_was_stopped_goes_on_to_the_same_weights(tmp_path, stop_at):
    quiet = trained(Cache(tmp_path / "quiet"))
    stopped = trained(Cache(tmp_path / "stopped"), stop_at)
    assert not same(quiet, stopped)
    assert same(quiet, trained(Cache(tmp_path / "stopped")))


def test_one_step_of_micro_batches_is_adamw_on_the_mean_gradient_clipped(tmp_path):
    recipe = Recipe(steps=1, lr=0.05, warmup=0, weight_decay=0.1, clip=0.01)
    module = network()
    matrices = [p for p in module.parameters() if p.ndim > 1]
    vectors = [p for p in module.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=0.05, betas=(0.9, 0.95))
    x, y = torch.cat([s.inputs for s in batch(0)]), torch.cat([s.targets for s in batch(0)])
    cross_entropy(module(x), y).backward()
    nn.utils.clip_grad_norm_(module.parameters(), 0.01)
    optimiser.step()
    for p, q in zip(module.parameters(), trained(Cache(tmp_path), recipe=recipe).parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_a_loss_that_is_not_finite_names_the_step(tmp_path):
    module = network()
    with pytest.raises(NonFiniteError, match="step 3"):
        bad = lambda step: [Sample(part.inputs * (float("nan") if step == 3 else 1), part.targets) for part in batch(step)]  # noqa: E731
        train(
            whole_model(module),
            lambda s: cross_entropy(module(s.inputs), s.targets),
            bad,
            RECIPE,
            Cache(tmp_path),
            "key",
            "test",
        )


def test_the_tokeniser_is_lossless_and_has_the_size_it_was_asked_for():
    text = "We hold these truths to be self-evident.\n\n" * 30 + "Schöne Grüße \u2014 and emoji \U0001f600."
    tokenizer = learn_tokenizer(text, 300)
    assert len(tokenizer) == 300 and tokenizer.eos_token == END and tokenizer.eos_token_id == 0
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("these truths")["input_ids"]) < len("these truths") / 2


def test_models_with_other_tokenisers_are_told_apart():
    one, other = (LanguageModel(None, learn_tokenizer("these truths " * 30, size)).tokenizer_identity() for size in (260, 262))
    again = LanguageModel(None, learn_tokenizer("these truths " * 30, 260)).tokenizer_identity()
    assert one == again != other


@pytest.mark.parametrize(("model", "each"), [("opt_micro", 2), ("swin_micro", 32)])
def test_a_batch_whose_parts_would_count_unequally_is_refused(model, each):
    with pytest.raises(Exception, match=rf"model\.batch={each + 1} must be a multiple of {each}"):
        instantiate(configuration(f"model={model}", f"model.batch={each + 1}").model, _convert_="all")


def test_the_micro_opt_is_made_once_from_its_recipe_and_not_from_held_out_speeches(tmp_path):
    small = ["model.recipe.steps=2", "model.batch=2", "model.architecture.vocab_size=300", "model.architecture.hidden_size=32"]
    small += ["model.architecture.word_embed_proj_dim=32", "model.architecture.ffn_dim=64", "model.training.text.held_out=240"]
    small += ["model.architecture.max_position_embeddings=64", "model.architecture.num_hidden_layers=1"]
    source = instantiate(configuration("model=opt_micro", *small).model, _convert_="all")
    first = source.load("cpu", "float32", Cache(tmp_path / "first"))
    again = source.load("cpu", "float32", Cache(tmp_path / "again"))
    assert same(first.module, again.module)
    (folder,) = (tmp_path / "first" / "models").glob("opt_micro-*")
    weights = folder / "model.safetensors"
    made = weights.stat().st_mtime_ns
    source.load("cpu", "float32", Cache(tmp_path / "first"))
    assert weights.stat().st_mtime_ns == made
    cfg = configuration("model=opt_micro")
    assert source.training.split == "train" and cfg.model.training == cfg.data


@given(st.lists(st.integers(1, 99), min_size=1, max_size=30), st.integers(1, 5))
def test_no_process_keeps_more_than_the_largest_module_above_the_others(sizes, count):
    owners = assign_owners({str(i): size for i, size in enumerate(sizes)}, count)
    load = [sum(size for i, size in enumerate(sizes) if owners[str(i)] == rank) for rank in range(count)]
    assert sum(load) == sum(sizes) and max(load) - min(load) <= max(sizes)


def test_bf16_numbers_move_although_each_step_is_below_their_rounding(tmp_path):
    parameter = torch.ones(4, dtype=torch.bfloat16, requires_grad=True)
    recipe = Recipe(steps=100, lr=5e-4, warmup=0, weight_decay=0.0, clip=1.0)
    batch = [Sample(torch.zeros(1), torch.zeros(1))]
    train(
        [TrainedParameter("p", parameter)],
        lambda s: parameter.sum(),
        lambda step: batch,
        recipe,
        Cache(tmp_path),
        "key",
        "test",
    )
    assert torch.finfo(torch.bfloat16).eps / 2 > 5e-4 and float(parameter.detach().max()) < 0.98


@pytest.mark.parametrize(("bad", "told"), [(math.nan, "the loss is nan"), (50.0, "the loss leaps from -0.0")])
@pytest.mark.parametrize("begin", [0, 40])
def test_a_training_that_goes_wrong_names_step_batch_and_last_good_checkpoint(tmp_path, bad, told, begin):
    parameter = torch.zeros(1, requires_grad=True)
    recipe = Recipe(steps=20, lr=0.01, warmup=0, weight_decay=0.0, clip=1.0, checkpoint=4, spike=2.0, begin=begin)
    cache = Cache(tmp_path)

    def batch(step: int) -> list[Sample]:
        return [Sample(torch.tensor([bad if step == begin + 10 else 0.0]), torch.zeros(1))]

    with pytest.raises(NonFiniteError) as raised:
        train([TrainedParameter("p", parameter)], lambda s: (s.inputs + parameter).sum(), batch, recipe, cache, "key", "test")
    last = f"checkpoint is of step {begin + 8}, {tmp_path}/trainings/key.{begin + 8}.0.safetensors"
    assert all(part in str(raised.value) for part in (told, f"step {begin + 10}, batch {begin + 10} ({begin + 20}", last))
    assert (tmp_path / f"trainings/key.{begin + 8}.0.safetensors").exists()


def test_a_checkpoint_in_place_of_a_damaged_one_of_the_same_step_is_kept(tmp_path):
    checkpoints = Checkpoints(Cache(tmp_path), "key", [], Observer(), OneProcess())
    checkpoints.save(Progress(4))
    file = tmp_path / "trainings" / "key.4.0.safetensors"
    file.write_bytes(b"damaged")
    assert checkpoints.restore() is None
    checkpoints.save(Progress(4, smoothed=2.5))
    assert file.exists() and checkpoints.restore() == Progress(4, smoothed=2.5)


def test_removing_a_cache_entry_also_removes_the_drafts_of_killed_writers(tmp_path):
    cache = Cache(tmp_path)
    for key in ("ab.1", "abc"):
        cache.store_json("trainings", key, 1)
        (tmp_path / "trainings" / f".{key}.json.0123").write_bytes(b"half")
    cache.remove("trainings", "ab")
    assert {path.name for path in (tmp_path / "trainings").iterdir()} == {"abc.json", ".abc.json.0123"}

"""Image classifiers: architectures without weights, local weights, images, accuracy, and a Swin trained here."""

import gzip
import re
from types import SimpleNamespace

import pytest
import torch
from hydra.utils import instantiate
from PIL import Image
from torch import nn

from nla.machine.cache import Cache, digest
from nla.machine.errors import NonFiniteError, UserError
from nla.models.base import VisionModel
from nla.models.select import select_linears
from nla.models.vision import TimmModel, from_architecture
from nla.pretrain.classifier import shifted
from tasks.data.images import Digits, Images, Items
from tasks.imagenet import ImageNet, flops
from tests.conftest import configuration

PELA = (r"\.blocks\.", r"attn\.proj")  # include, exclude: no norm, head, patch_embed, downsample, attn.proj


class Given(Images):
    """Images of one pixel that carry their number, and these labels."""

    name, split, classes = "given", "test", 10

    def __init__(self, *labels: int) -> None:
        self.labels = labels

    def items(self) -> Items:
        return Items(self.labels, lambda i: Image.new("L", (1, 1), i))

    def identity(self, cache: Cache) -> str:
        return digest(self.labels)


class Scores(nn.Module):
    """Logits from a table, by the number in the image; counts its forwards."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table, self.seen = nn.Parameter(table), 0

    def forward(self, images):
        self.seen += len(images)
        return self.table[images.flatten().long()]


def hand_made(table: torch.Tensor) -> VisionModel:
    return VisionModel(Scores(table), lambda image: torch.tensor(float(image.getpixel((0, 0)))).view(1, 1, 1))


def evaluate(task: ImageNet, model: VisionModel, tmp_path) -> dict[str, float]:
    (figures,) = task.evaluate(model, Cache(tmp_path), "state", "test").values()
    return figures


def source(name: str, *overrides: str):
    return instantiate(configuration(f"model={name}", *overrides).model, _convert_="all")


@pytest.fixture
def tiny(tmp_path) -> VisionModel:
    return source("tiny_swin").load("cpu", "float32", Cache(tmp_path))


@pytest.mark.parametrize(("size", "published"), [("tiny", 28_288_354), ("small", 49_606_258), ("base", 87_768_224)])
def test_swins_are_known_without_weights_and_have_the_published_counts(size, published, tmp_path):
    model = source(f"swin_{size}")
    inventory = model.inventory(Cache(tmp_path))
    assert (inventory.parameters, inventory.limit, inventory.reads) == (published, 1000, "images")
    with torch.device("meta"):
        assert from_architecture(model.architecture).pretrained_cfg["hf_hub_id"] == model.name


def test_pelas_selection_and_rank_give_its_published_count_of_swin_base(tmp_path):
    inventory = source("swin_base").inventory(Cache(tmp_path))
    chosen = select_linears(inventory.linears, *PELA)
    assert len(chosen) == 72 and sum(s.n_params for s in chosen) == 76_775_424
    rank = {s.name: int(s.n_params / (1.5 * (s.out_features + s.in_features))) for s in chosen}
    factors = sum(rank[s.name] * (s.out_features + s.in_features) for s in chosen)
    assert inventory.parameters - 76_775_424 + factors == pytest.approx(62.2e6, abs=0.05e6)


def test_weights_that_are_nowhere_are_an_error_that_says_what_to_give(tmp_path):
    with pytest.raises(UserError, match=r"model\.path=.*0\.4 GB of disk.*licence: MIT.*the hub does not answer"):
        source("swin_base").check("float32", Cache(tmp_path))


def local(path, *changes: str) -> TimmModel:
    architecture = source("tiny_swin", *changes).architecture
    return TimmModel("timm/tiny_swin", str(path), "float32", architecture)


def old_names(weights: dict) -> dict:
    """As Swin was first published: classifier `head`, downsampling at the end of a stage."""
    return {
        re.sub(r"layers\.1\.downsample", "layers.0.downsample", k).replace("head.fc.", "head."): v for k, v in weights.items()
    }


@pytest.mark.parametrize("form", ["safetensors", "pth", "pth under model", "pth under state_dict", "folder", "old names"])
def test_a_local_state_dict_reloads_bit_equal(tiny, tmp_path, form):
    from safetensors.torch import save_file

    weights = tiny.module.state_dict()
    path = tmp_path / f"weights.{'safetensors' if form in ('safetensors', 'folder') else 'pth'}"
    if path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        key = form.partition(" under ")[2]
        torch.save({key: weights} if key else {"model": old_names(weights)} if form == "old names" else weights, path)
    model, cache = local(tmp_path if form == "folder" else path), Cache(tmp_path / "cache")
    model.inspect(cache)
    loaded = model.load("cpu", "float32", cache).module.state_dict()
    assert loaded.keys() == weights.keys() and all(torch.equal(loaded[k], weights[k]) for k in weights)
    before = model.identity(cache)
    path.write_bytes(path.read_bytes() + b" ")
    assert model.identity(cache) != before


def test_weights_that_do_not_fit_are_an_error_that_names_the_key(tiny, tmp_path):
    weights, file = tiny.module.state_dict(), tmp_path / "weights.pth"
    head = weights["head.fc.bias"]
    for changed, message in (
        ({k: v for k, v in weights.items() if k != "norm.weight"}, r"lack 1 tensor of the model, such as norm\.weight"),
        (weights | {"extra": head}, r"have 1 tensor that the model does not have, such as extra"),
        (weights | {"head.fc.bias": head[:7]}, r"head\.fc\.bias \(7 in the file, 10 in the model\)"),
        ({"epoch": 3}, "something else than the names and tensors"),
    ):
        torch.save(changed, file)
        with pytest.raises(UserError, match=message):
            local(file).inspect(Cache(tmp_path))
        with pytest.raises(UserError, match=message):
            local(file).load("cpu", "float32", Cache(tmp_path))
    torch.save(old_names(weights), file)
    with pytest.raises(UserError, match=r"relative_position_bias_table \(9x2 in the file, 49x2 in the model\)"):
        local(file, "model.architecture.window_size=4").inspect(Cache(tmp_path))  # timm would have interpolated it


def test_a_file_that_is_no_weights_and_a_folder_without_are_errors_with_their_names(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights.pth").write_bytes(b"none")
    for path, message in (
        ("weights.pth", "weights with|weights only"),
        ("empty", "holds no weights"),
        ("none", "not a file or folder"),
    ):
        with pytest.raises(UserError, match=rf"{path}.*({message})"):
            local(tmp_path / path).inspect(Cache(tmp_path))


def test_an_untrained_swin_reloads_bit_equal_without_touching_the_global_seed(tiny, tmp_path):
    state = torch.random.get_rng_state()
    again = source("tiny_swin").load("cpu", "float32", Cache(tmp_path)).module.state_dict()
    assert all(torch.equal(value, again[key]) for key, value in tiny.module.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_grey_and_coloured_images_become_what_the_model_reads(tiny):
    assert tiny.transform(Image.new("RGB", (40, 30))).shape == (1, 16, 16)


def test_accuracy_on_hand_made_logits_is_counted_by_hand(tmp_path):
    table = torch.zeros(4, 8)
    table[0, 3] = 1  # label 3: first
    table[1, :5] = 1  # label 4: fifth, for equal logits go to the lower class first
    table[2, 1:6] = 1  # label 6: after 1, .., 5 not among five
    table[3, 0] = 2  # label 1: second
    figures = evaluate(ImageNet(Given(3, 4, 6, 1), 3, None), hand_made(table), tmp_path)
    assert list(figures)[:6] == ["top1", "top1_stderr", "top5", "top5_stderr", "loss", "images"]
    assert (figures["top1"], figures["top5"], figures["images"], figures["images_available"]) == (0.25, 0.75, 4, 4)
    assert figures["top1_stderr"] == pytest.approx(0.25)  # variance ((3/4)^2 + 3 (1/4)^2) / 3 = 1/4, of 4 images
    expected = nn.functional.cross_entropy(table, torch.tensor([3, 4, 6, 1]))
    assert figures["loss"] == pytest.approx(float(expected), rel=1e-6)
    few = evaluate(ImageNet(Given(1, 0), 2, None), hand_made(torch.zeros(2, 3)), tmp_path / "few")
    assert few["top1"] == 0.5 and few["top5"] == 1  # fewer than six classes: every label is among five
    one = evaluate(ImageNet(Given(1, 0), 2, 1), hand_made(torch.zeros(2, 3)), tmp_path / "one")
    assert not any(name.endswith("stderr") for name in one)  # of one image nothing is known


def test_accuracy_of_a_swin_is_that_of_a_plain_loop_whatever_the_threads(tiny, tmp_path):
    data = Digits("digits", 0.05)
    with torch.no_grad():
        ranks = [
            tiny.logits(tiny.transform(i)[None])[0].argsort(descending=True).tolist().index(label) for i, label in data.items()
        ]
    found = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        found.append(evaluate(ImageNet(data, 32, None), tiny, tmp_path / str(threads)))
        torch.set_num_threads(before)
    one, two = ({k: v for k, v in f.items() if "second" not in k} for f in found)
    assert one == two and one["images"] == len(ranks) == 90
    assert one["top1"] == sum(r == 0 for r in ranks) / 90 and one["top5"] == sum(r < 5 for r in ranks) / 90


def test_max_images_takes_the_first_ones_and_the_journal_carries_on(tmp_path):
    model = hand_made(torch.eye(10))
    few = evaluate(ImageNet(Given(*range(10)), 4, 6), model, tmp_path)
    assert (few["images"], few["images_available"], few["top1"]) == (6, 10, 1) and model.module.seen == 6 + 1  # one for FLOPs
    whole = evaluate(ImageNet(Given(*range(10)), 4, None), model, tmp_path)
    assert whole["images"] == 10 and model.module.seen == 7 + 6 + 1  # the half batch is made again, the whole one is not
    assert evaluate(ImageNet(Given(*range(10)), 4, None), model, tmp_path) == whole and model.module.seen == 14 + 1


def test_a_logit_that_is_not_finite_is_an_error_that_names_the_batch(tmp_path):
    table = torch.zeros(6, 3)
    table[4, 2] = float("nan")
    with pytest.raises(NonFiniteError, match=r"data=given, batch 2 \(images 4 to 5\): 1 images"):
        evaluate(ImageNet(Given(*[0] * 6), 2, None), hand_made(table), tmp_path)


def test_flops_of_a_linear_layer_and_of_a_convolution_are_those_counted_by_hand():
    linear = VisionModel(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), torch.Tensor)
    assert flops(linear, torch.zeros(1, 3, 2, 2)) == 2 * 12 * 5
    convolution = VisionModel(nn.Conv2d(3, 4, 2, stride=2), torch.Tensor)
    assert flops(convolution, torch.zeros(1, 3, 8, 8)) == 2 * (3 * 2 * 2) * 4 * 16


def test_the_operations_of_fused_attention_are_those_of_its_two_products():
    def attend(x: torch.Tensor) -> torch.Tensor:  # (images, heads, tokens, width)
        return nn.functional.scaled_dot_product_attention(x, x, x)

    assert flops(SimpleNamespace(logits=attend), torch.zeros(2, 3, 5, 8)) == 2 * 2 * (2 * 3 * 5 * 5 * 8)


def test_labels_that_the_model_cannot_give_are_an_error_before_anything_runs(tmp_path):
    inventory = source("tiny_swin").inventory(Cache(tmp_path))
    instantiate(configuration("model=tiny_swin").task.imagenet).check(inventory)
    with pytest.raises(UserError, match=r"data=imagenet has 1000 classes, the model knows 10"):
        instantiate(configuration("model=tiny_swin", "data=imagenet").task.imagenet).check(inventory)
    with pytest.raises(UserError, match=r"task=imagenet is for models that read images"):
        instantiate(configuration("model=tiny_swin").task.imagenet).check(source("tiny_llama").inventory(Cache(tmp_path)))


def test_digits_held_out_and_those_to_train_on_are_all_and_disjoint():
    test = instantiate(configuration("model=tiny_swin").data.images)
    assert len(test.opened) == 449
    train = test.training()
    seen = [digest([list(image.tobytes()), label]) for data in (test, train) for image, label in data.opened]
    assert len(seen) == 1797 == len(set(seen)) and (test.split, train.split) == ("test", "train")
    image, _ = train.items()[0]
    assert image.mode == "L" and image.size == (8, 8) and max(image.tobytes()) > 200


def test_samples_are_seeded_and_no_image_comes_twice_before_all_came(tiny):
    data = Digits("digits", 0.01)  # 18 images
    first, again, other = (data.samples(tiny, 18, 0, seed) for seed in (1, 1, 2))
    assert first[0].inputs.shape == (1, 1, 16, 16) and first[0].targets.shape == (1,)
    order = [[tuple(s.inputs.flatten().tolist()) for s in samples] for samples in (first, again, other)]
    assert order[0] == order[1] != order[2] and set(order[0]) == set(order[2]) and len(set(order[0])) == 18
    assert len(data.samples(tiny, 20, 0, 1)) == 20


def write_idx(path, array: torch.Tensor) -> None:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    data = header + array.numpy().tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_fashion_mnist_files_are_read_back(tmp_path, suffix):
    pixels = torch.randint(256, (5, 28, 28), dtype=torch.uint8)
    write_idx(tmp_path / f"t10k-images-idx3-ubyte{suffix}", pixels)
    write_idx(tmp_path / f"t10k-labels-idx1-ubyte{suffix}", torch.tensor([9, 0, 3, 1, 2], dtype=torch.uint8))
    data = instantiate(configuration("model=tiny_swin", "data=fashion_mnist", f"data.path={tmp_path}").data.images)
    data.check()
    image, label = data.items()[2]
    assert label == 3 and image.tobytes() == pixels[2].numpy().tobytes() and data.items()[-1][1] == 2
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte.*data\.path=.*dataset-fashion-mnist"):
        data.training().check()
    (tmp_path / f"t10k-labels-idx1-ubyte{suffix}").write_bytes(b"\0\0\x08\x01")
    with pytest.raises(UserError, match=r"t10k-labels-idx1-ubyte.*cannot be read as an IDX file"):
        data.check()


def folders(path, *classes: str) -> None:
    for i, name in enumerate(classes):
        (path / "val" / name).mkdir(parents=True)
        for j in range(2):
            Image.new("RGB", (20, 10), (100 * i, 0, j)).save(path / "val" / name / f"{j}.JPEG")


def test_an_image_folder_has_its_classes_in_sorted_order_and_is_known_by_its_contents(tmp_path):
    folders(tmp_path, "n02", "n01")
    settings = configuration("model=swin_base", f"data.path={tmp_path}", "data.images.classes=2").data.images
    data, cache = instantiate(settings), Cache(tmp_path / "cache")
    data.check()
    assert [label for _, label in data.items()] == [0, 0, 1, 1]
    assert data.items()[0][0].size == (20, 10) and data.items()[0][0].getpixel((0, 0))[0] > 90  # n01, written second
    before = data.identity(cache)
    assert instantiate(settings).identity(cache) == before
    Image.new("RGB", (20, 10), (9, 9, 9)).save(tmp_path / "val" / "n01" / "1.JPEG")
    assert instantiate(settings).identity(cache) != before


def test_image_folders_that_would_shift_the_labels_are_an_error(tmp_path):
    folders(tmp_path, "n01", "n02")
    with pytest.raises(UserError, match=r"2 classes, expected 1000.*sorted folders"):
        instantiate(configuration("model=swin_base", f"data.path={tmp_path}").data.images).check()
    with pytest.raises(UserError, match="has no folder train"):
        instantiate(configuration("model=swin_base", f"data.path={tmp_path}").data.images).training().check()


def test_imagenet_out_of_reach_says_what_to_give_instead():
    with pytest.raises(UserError, match=r"data=imagenet .*terms.*data\.path="):
        instantiate(configuration("model=swin_base").data.images).check()


def test_an_image_moves_by_the_shift_and_its_border_is_repeated():
    image = torch.arange(9.0).view(1, 3, 3)
    assert torch.equal(shifted(image, 2, [2, 2]), image)
    assert torch.equal(shifted(image, 1, [0, 1]), image[:, [0, 0, 1]])


def test_a_swin_trained_here_is_the_same_every_time_and_trained_once(tmp_path):
    short = ["model.recipe.steps=3", "model.recipe.warmup=1", "model.batch=64", "model.architecture.embed_dim=16"]
    weights = []
    for folder, threads in (("one", 1), ("two", 2)):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        model, cache = source("swin_micro", *short), Cache(tmp_path / folder)
        weights.append(model.load("cpu", "float32", cache).module.state_dict())
        torch.set_num_threads(before)
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    start = from_architecture(model.architecture, 0).state_dict()
    assert any(not torch.equal(value, weights[0][key]) for key, value in start.items())
    (made,) = (tmp_path / "two" / "models").glob("swin_micro-*/model.safetensors")
    written = made.stat().st_mtime_ns
    model.load("cpu", "float32", cache)
    assert made.stat().st_mtime_ns == written
    for other in ("model.weights_seed=1", "data.images.held_out_fraction=0.5"):
        assert source("swin_micro", *short, other).folder(cache) != made.parent

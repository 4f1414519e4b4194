"""Peak bytes by hand-counted examples, the type of products, and the packaged model's cache."""

import shutil

import pytest
import torch
from hydra.utils import instantiate

from nla.harness.request import resolve
from nla.harness.settings import check_settings
from nla.machine import device
from nla.machine.cache import Cache
from nla.machine.errors import UserError
from nla.machine.peak_memory import PeakMemory, unmeasured
from nla.machine.sealed_folder import intact, seal
from tests.conftest import ROOT, configuration

CPU = torch.device("cpu")


def test_peak_memory_counts_storages_once_until_they_are_freed():
    held = torch.zeros(1000)
    with PeakMemory(CPU) as memory:
        a = torch.zeros(1000)  # 4 kB
        b = a + held  # 8 kB
        del a  # 4 kB
        c = b.view(10, 100)[2:].T  # views hold no more
        d = c * 2  # 3.2 kB more
        del b, c, d
    assert memory.peak_bytes == 8000


def test_peak_memory_sees_the_backward_pass_and_leaves_out_what_was_there_before():
    x = torch.ones(1000, requires_grad=True)
    with PeakMemory(CPU) as memory:
        (x * x).sum().backward()
    assert 4000 < memory.peak_bytes <= 16_100


def test_peak_memory_leaves_out_what_is_unmeasured_and_goes_on_behind_it():
    with PeakMemory(CPU) as memory:
        a = torch.zeros(1000)
        with unmeasured():
            a + torch.zeros(1000)
        b = torch.zeros(500)
        del a, b
    assert memory.peak_bytes == 6000


@pytest.mark.parametrize(
    ("amx", "avx512_bf16", "name", "fast"),
    [
        (True, True, "Intel(R) Xeon(R)", True),
        (False, True, "Intel(R) Xeon(R)", False),
        (False, True, "AMD EPYC 9555", True),
        (False, False, "AMD EPYC 7763", False),
    ],
)
def test_products_are_computed_in_bfloat16_where_that_was_measured_to_be_faster(monkeypatch, amx, avx512_bf16, name, fast):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(device, "processor", lambda: name)
    cfg = configuration("refine=block", "device=cpu")
    wanted = "bfloat16" if fast else "float32"
    settings = resolve(check_settings(cfg))
    assert settings["method"]["solver"]["products"] == settings["refine"]["products"] == wanted


def test_a_sealed_folder_is_intact_until_a_byte_changes(tmp_path, caplog):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_bytes(b"12345678")
    seal(folder)
    assert intact(folder)
    (folder / "weights").write_bytes(b"12345679")
    assert not intact(folder)
    assert "weights" in caplog.text and not folder.exists()


def test_the_packaged_model_is_the_published_one_and_reads_english(smollm2):
    model = instantiate(configuration("model=smollm2_135m").model, _convert_="all").load(
        "cpu", "float32", Cache(ROOT / "outputs" / "cache")
    )
    assert sum(p.numel() for p in model.module.parameters()) == 134_515_008
    with torch.no_grad():
        logits = model.module(model.encode("The capital of France is")[None]).logits
    assert int(logits[0, -1].argmax()) == int(model.encode(" Paris")[0])


def test_a_package_with_other_contents_is_refused(tmp_path, smollm2):
    source = instantiate(configuration("model=smollm2_135m", "model.sha256=00").model, _convert_="all")
    with pytest.raises(UserError, match="SHA-256"):
        source.folder(Cache(tmp_path))
    assert not list((tmp_path / "models").glob("*"))
    shutil.rmtree(tmp_path)

"""`pretrained=`: published weights through a stand-in for the hub, local files, other classes and images, refusals."""

import pickle
import sys
from functools import partial
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import save_file
from timm.models import nfnet as timm_nfnet

from nfnets_kernels.models import (
    NFNet,
    NFResNet,
    like_timm,
    nf_regnet,
    nf_regnet_b0,
    nf_regnet_b1,
    nf_resnet,
    nf_resnet26,
    nf_resnet50,
    nfnet,
    nfnet_f0,
    nfnet_f0_plus,
    nfnet_f7,
    timm_state_dict,
)
from nfnets_kernels.models.pretrained import HUB_TAGS, create

from .helpers import assert_same
from .module_helpers import on_one_thread, perturb

one_thread = pytest.fixture(on_one_thread, autouse=True)

SMALL = {"depths": (1, 1, 1, 1), "channels": (32, 64, 96, 128), "group_size": 8, "num_features": 256}


class Hub:
    """Files by repository and name, kept in a folder; `calls` tells what was asked for."""

    def __init__(self, folder):
        self.folder, self.files, self.calls = folder, {}, []

    def publish(self, repo, state, file="model.safetensors"):
        path = self.folder / f"{repo.replace('/', '_')}_{file}"
        save = save_file if file.endswith(".safetensors") else torch.save
        save({name: value.contiguous() for name, value in state.items()}, path)
        self.files[repo, file] = str(path)
        return str(path)

    def get(self, repo_id, filename, *, cache_dir=None):
        self.calls.append((repo_id, filename, cache_dir))
        if (repo_id, filename) not in self.files:
            raise EntryNotFoundError(f"404: {filename}")
        return self.files[repo_id, filename]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub.get)
    return hub


@pytest.fixture
def small():
    """timm's test_nfnet with 1000 classes, off its initial values."""
    return perturb(timm.create_model("test_nfnet"))


@pytest.fixture
def small_file(hub, small):
    """Where the hub keeps its weights."""
    return hub.publish("timm/test_nfnet.r160_in1k", small.state_dict())


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def outputs(model, in_chans=3):
    with torch.no_grad():
        return model.eval()(torch.linspace(-2, 2, in_chans * 32 * 32).view(1, in_chans, 32, 32).sin())


def test_the_tags_are_timms():
    configurations = timm_nfnet.default_cfgs.items()
    tags = [(name, tag) for name, of_name in configurations for tag, cfg in of_name.cfgs.items() if cfg.hf_hub_id]
    assert sorted(tags) == sorted(HUB_TAGS.items())


def test_published_weights_are_downloaded_and_compute_the_same(hub, small, small_file, tmp_path):
    model = like_timm("test_nfnet", pretrained=True, cache_dir=tmp_path)
    assert relative_error(outputs(model), outputs(small)) < 1e-5
    assert hub.calls == [("timm/test_nfnet.r160_in1k", "model.safetensors", tmp_path)]


def test_without_safetensors_the_other_file_is_taken(hub, small):
    hub.publish("timm/test_nfnet.r160_in1k", small.state_dict(), "pytorch_model.bin")
    assert relative_error(outputs(like_timm("test_nfnet", pretrained=True)), outputs(small)) < 1e-5
    assert [file for _, file, _ in hub.calls] == ["model.safetensors", "pytorch_model.bin"]


@pytest.mark.parametrize("in_chans", [1, 2, 3, 4, 7])
def test_other_classes_and_images_are_adapted_as_timm_does(small_file, in_chans):
    options = {"num_classes": 10, "in_chans": in_chans}
    theirs = timm.create_model(
        "test_nfnet", pretrained=True, pretrained_cfg_overlay={"file": small_file, "hf_hub_id": None}, **options
    )
    ours = like_timm("test_nfnet", pretrained=True, **options)
    assert relative_error(ours.stem_conv0.weight, theirs.stem.conv1.weight) < 1e-6
    state, expected = timm_state_dict(ours), theirs.state_dict()
    for name in expected.keys() - {"stem.conv1.weight", "head.fc.weight"}:
        assert_same(state[name], expected[name])
    with torch.no_grad():
        assert 0.005 < ours.fc.weight.std() < 0.02  # as initialized
        theirs.head.fc.load_state_dict(ours.fc.state_dict())
    assert relative_error(outputs(ours, in_chans), outputs(theirs, in_chans)) < 1e-5


def test_networks_without_a_classifier_are_filled(small, small_file):
    for options in ({"num_classes": 0}, {"features_only": True}):
        model = like_timm("test_nfnet", pretrained=True, **options)
        assert_same(model.final_conv.weight, small.final_conv.weight)


@pytest.fixture
def small_f0(monkeypatch):
    """Makes nfnet_f0 small; the options that timm's has too."""
    monkeypatch.setattr(nfnet, "WIDTH", SMALL["channels"])
    monkeypatch.setitem(nfnet.VARIANTS, "f0", nfnet.VARIANTS["f0"]._replace(depth=SMALL["depths"]))
    return {"group_width": 8, "stem_width": 128}


def test_nfnet_keeps_the_authors_numerics(hub, small_f0):
    """timm holds the authors' own weights, whose eps, its form and GELU it has otherwise."""
    theirs = timm.create_model("dm_nfnet_f0", **SMALL)
    with torch.no_grad():
        for block in theirs.stages:
            block[0].skipinit_gain.fill_(0.7)
    hub.publish("timm/dm_nfnet_f0.dm_in1k", theirs.state_dict())
    model = nfnet_f0(pretrained=True, **small_f0)
    assert (model.numerics, model.approximate, model.blocks[0].skip_gain) == ("deepmind", "tanh", 0.7)
    assert 1e-6 < relative_error(outputs(model), outputs(theirs)) < 3e-2  # eps: some 0.3 % a layer
    exact = nfnet_f0(pretrained=True, numerics="timm_dm", approximate="none", **small_f0)
    assert relative_error(outputs(exact), outputs(theirs)) < 1e-5
    with pytest.raises(ValueError, match=r"unexpected: .*skipinit_gain"):
        nfnet_f0(pretrained=True, numerics="timm", **small_f0)


def test_networks_that_nobody_trained_point_to_those_that_timm_did(hub, monkeypatch):
    for make, name in ((nf_resnet50, "nf_resnet50"), (nf_regnet_b1, "nf_regnet_b1")):
        with pytest.raises(ValueError, match=rf'numerics=\'timm\'.*like_timm\("{name}", pretrained=True\)'):
            make(pretrained=True)
    with pytest.raises(ValueError, match="need shortcut='avg_pool'"):
        nf_resnet50(pretrained=True, numerics="timm")
    assert not hub.calls
    monkeypatch.setitem(nf_resnet.DEPTHS, 50, (1, 1, 1, 1))
    trained = NFResNet((1, 1, 1, 1), 4, numerics="timm", shortcut="avg_pool")
    hub.publish("timm/nf_resnet50.ra2_in1k", timm_state_dict(trained))
    model = nf_resnet50(pretrained=True, numerics="timm", shortcut="avg_pool")
    assert_same(dict(model.state_dict()), dict(trained.state_dict()))
    monkeypatch.setitem(nf_regnet.VARIANTS, "b1", nf_regnet.VARIANTS["b1"]._replace(depth=(1, 1, 1, 1)))
    trained = nf_regnet_b1(numerics="timm")
    hub.publish("timm/nf_regnet_b1.ra2_in1k", timm_state_dict(trained))
    assert_same(dict(nf_regnet_b1(pretrained=True, numerics="timm").state_dict()), dict(trained.state_dict()))


@pytest.mark.parametrize(
    "make",
    [nfnet_f7, nfnet_f0_plus, nf_resnet26, nf_regnet_b0, pytest.param(partial(like_timm, "nfnet_f0"), id="like_timm")],
)
def test_networks_without_published_weights_say_which_have_some(hub, make):
    with pytest.raises(ValueError, match=r"no weights are published for .*dm_nfnet_f0, .*nf_resnet50"):
        make(pretrained=True)
    assert not hub.calls


def test_no_weights_are_read_unless_asked_for(hub):
    like_timm("test_nfnet")
    like_timm("test_nfnet", pretrained=False, cache_dir="nowhere")
    like_timm("test_nfnet", pretrained=None)
    assert not hub.calls


@pytest.mark.parametrize("wrap", [dict, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}])
@pytest.mark.parametrize("whose", ["timm", "ours"])
def test_reads_local_files(small, tmp_path, whose, wrap):
    state = small.state_dict()
    if whose == "ours":
        save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "w.safetensors")
        state = like_timm("test_nfnet", pretrained=tmp_path / "w.safetensors").state_dict()
    torch.save(wrap(dict(state)), tmp_path / "w.pth")
    model = like_timm("test_nfnet", pretrained=str(tmp_path / "w.pth"))
    assert_same({key: timm_state_dict(model)[key] for key in small.state_dict()}, dict(small.state_dict()))


@pytest.mark.parametrize("num_classes", [10, 3])
def test_reads_the_authors_npz(golden, tmp_path, num_classes):
    prefix = "nfnet_tiny/params/"
    arrays = {key.removeprefix(prefix): value for key, value in golden.items() if key.startswith(prefix)}
    np.savez(tmp_path / "F0_haiku.npz", **arrays)
    make = partial(NFNet, [32, 48, 64, 64], [1, 2, 1, 1], num_classes=num_classes, group_width=8)
    model = create(make, {"pretrained": tmp_path / "F0_haiku.npz"}, hub_name=None)
    x = torch.from_numpy(golden["nfnet_tiny/input_nhwc"]).permute(0, 3, 1, 2)
    with torch.no_grad():
        assert relative_error(model.forward_pool(x), torch.from_numpy(golden["nfnet_tiny/outputs/pool"])) < 1e-4
        if num_classes == 10:
            assert relative_error(model(x), torch.from_numpy(golden["nfnet_tiny/outputs/logits"])) < 1e-4


def test_files_that_do_not_fit_are_refused(small, tmp_path):
    state = small.state_dict()
    del state["stages.2.0.conv3.gain"]
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"missing: stages\.2\.0\.conv3\.gain"):
        like_timm("test_nfnet", num_classes=10, pretrained=tmp_path / "w.pth")
    torch.save({"weights": [torch.zeros(1)]}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth must hold a state_dict"):
        like_timm("test_nfnet", pretrained=tmp_path / "other.pth")
    torch.save({"x": Path("anything")}, tmp_path / "objects.pth")
    with pytest.raises(pickle.UnpicklingError):
        like_timm("test_nfnet", pretrained=tmp_path / "objects.pth")
    for name in ("nothing.pth", "nothing.safetensors", "nothing.npz"):
        with pytest.raises(OSError, match="nothing"):
            like_timm("test_nfnet", pretrained=tmp_path / name)


MESSAGE = r"cannot get model\.safetensors or pytorch_model\.bin of https://huggingface\.co/timm/test_nfnet\.r160_in1k"


def test_without_a_network_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=rf"{MESSAGE}.*pretrained=.*cache_dir=.*HF_HUB_OFFLINE"):
        like_timm("test_nfnet", pretrained=True, cache_dir=tmp_path)


def test_a_repository_without_weights_and_a_hub_that_fails_are_told(hub, monkeypatch):
    with pytest.raises(OSError, match=rf"{MESSAGE}: 404: model\.safetensors"):
        like_timm("test_nfnet", pretrained=True)
    calls = []

    def full(*args, **options):
        calls.append(args)
        raise OSError("no space left")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", full)
    with pytest.raises(OSError, match=rf"{MESSAGE}: no space left"):
        like_timm("test_nfnet", pretrained=True)
    assert len(calls) == 1


@pytest.mark.parametrize("package", ["huggingface_hub", "safetensors"])
def test_a_missing_package_is_named_with_its_installation(small_file, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.torch", None)
    with pytest.raises(ImportError, match=rf'need {package}.*pip install "nfnets-kernels\[pretrained\]"'):
        like_timm("test_nfnet", pretrained=True)

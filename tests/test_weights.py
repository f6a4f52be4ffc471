"""`load_haiku`: the authors' checkpoint layout from files and mappings, and what does not fit."""

import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from nfnets_kernels.models import NFNet, NFRegNet, NFResNet, load_haiku, nfnet_f0, nfnet_f1, nfnet_f2
from nfnets_kernels.models.weights import from_haiku

from .helpers import assert_same

PREFIX = "nf_resnet_tiny/params/"
# One parameter of each kind, and the authors' name of it.
NAMES = {
    "initial_conv.weight": "initial_conv/w",
    "initial_conv.bias": "initial_conv/bias",
    "blocks.0.conv0.gain": "nf_res_block/~/conv0/gain",
    "blocks.0.skip_gain": "nf_res_block/skip_gain",
    "blocks.2.conv1.weight": "nf_res_block_2/~/conv1/w",
    "blocks.4.conv_shortcut.weight": "nf_res_block_4/~/conv_shortcut/w",
    "blocks.4.conv2.bias": "nf_res_block_4/~/conv2/bias",
    "blocks.4.skip_gain": "nf_res_block_4/skip_gain",
    "fc.weight": "linear/w",
    "fc.bias": "linear/b",
}
SE_NAMES = {
    "blocks.0.se.fc0.weight": "nf_res_block/~/squeeze_excite/~/linear/w",
    "blocks.0.se.fc1.bias": "nf_res_block/~/squeeze_excite/~/linear_1/b",
    "blocks.3.se.fc0.bias": "nf_res_block_3/~/squeeze_excite/~/linear/b",
    "blocks.3.se.fc1.weight": "nf_res_block_3/~/squeeze_excite/~/linear_1/w",
}


def tiny(**options):
    return NFResNet((1, 2, 1, 1), 1, **{"num_classes": 10, **options})


@pytest.fixture
def arrays(golden):
    """The checkpoint of nf_resnet_tiny."""
    return {key.removeprefix(PREFIX): value for key, value in golden.items() if key.startswith(PREFIX)}


def with_se(arrays):
    """The checkpoint with squeeze and excite in every block."""
    arrays = dict(arrays)
    for index, channels in enumerate((64, 128, 128, 256, 512)):
        root = "NF_ResNet/~/nf_res_block" + (f"_{index}" if index else "") + "/~/squeeze_excite/~/"
        for name, (inputs, outputs) in {
            "linear": (channels, channels // 4),
            "linear_1": (channels // 4, channels),
        }.items():
            arrays[f"{root}{name}/w"] = np.random.default_rng(0).normal(size=(inputs, outputs)).astype(np.float32)
            arrays[f"{root}{name}/b"] = np.random.default_rng(0).normal(size=outputs).astype(np.float32)
    return arrays


def assert_holds(model, arrays, names=NAMES):
    """Every array sits where its name says: HWIO as OIHW, IO as OI."""
    state = model.state_dict()
    assert len(state) == len(arrays)
    for name, key in names.items():
        array = arrays[f"NF_ResNet/~/{key}"]
        expected = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
        np.testing.assert_array_equal(state[name].numpy(), expected.astype(state[name].numpy().dtype))


def test_loads_a_mapping(arrays):
    model, keys = tiny(), list(arrays)
    assert load_haiku(model, arrays) is model
    assert_holds(model, arrays)
    assert list(arrays) == keys


@pytest.mark.parametrize("as_path", [lambda path: path, str, np.load], ids=["Path", "str", "NpzFile"])
def test_loads_a_file(arrays, tmp_path, as_path):
    np.savez(tmp_path / "weights.npz", **arrays)
    assert_holds(load_haiku(tiny(), as_path(tmp_path / "weights.npz")), arrays)


def test_reads_only_what_has_the_prefix(golden, arrays):
    assert_holds(load_haiku(tiny(), golden, prefix=PREFIX), arrays)


def test_loads_squeeze_and_excite(arrays):
    arrays = with_se(arrays)
    assert_holds(load_haiku(tiny(use_se=True), arrays), arrays, {**NAMES, **SE_NAMES})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_keeps_the_models_dtype_layout_and_parameters(arrays, dtype):
    model = tiny(dtype=dtype).to(memory_format=torch.channels_last)
    before = {name: (p, p.stride()) for name, p in model.named_parameters()}
    load_haiku(model, arrays)
    assert_holds(model, arrays)
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0] and parameter.stride() == before[name][1] and parameter.dtype == dtype


def test_later_changes_of_the_arrays_do_not_reach_the_model(arrays):
    arrays = {key: value.copy() for key, value in arrays.items()}
    model = load_haiku(tiny(), arrays)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for value in arrays.values():
        value[...] = np.nan
    assert_same(dict(model.state_dict()), before)


MISSING = ["NF_ResNet/~/nf_res_block_1/~/conv0/gain", "NF_ResNet/~/linear/b"]
UNEXPECTED = ["NF_ResNet/~/nf_res_block_9/skip_gain", "extra"]
MISSHAPEN = ["NF_ResNet/~/linear/w", "NF_ResNet/~/nf_res_block_4/~/conv_shortcut/w"]


def test_everything_that_does_not_fit_is_named_and_nothing_is_written(arrays):
    for key in MISSING:
        del arrays[key]
    arrays |= dict.fromkeys(UNEXPECTED, np.zeros(()))
    arrays |= {key: arrays[key].swapaxes(-1, -2) for key in MISSHAPEN}
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        load_haiku(model, arrays)
    missing, unexpected, misshapen = str(error.value).split("; ")[1:]
    assert "missing" in missing and "unexpected" in unexpected and "shape" in misshapen
    for part, keys in ((missing, MISSING), (unexpected, UNEXPECTED), (misshapen, MISSHAPEN)):
        assert all(key in part for key in keys)
    assert str(error.value).count("NF_ResNet/") == 5
    assert "(512, 10) where the model has (10, 512)" in misshapen
    assert_same(dict(model.state_dict()), before)


@pytest.mark.parametrize("problem", ["missing", "unexpected", "shape"])
def test_one_problem_is_enough(arrays, problem):
    if problem == "missing":
        del arrays[MISSING[0]]
    elif problem == "unexpected":
        arrays["extra"] = np.zeros(3)
    else:
        arrays[MISSHAPEN[0]] = arrays[MISSHAPEN[0]][:, :9]
    with pytest.raises(ValueError, match=problem):
        load_haiku(tiny(), arrays)


def test_a_checkpoint_of_another_model_is_refused(arrays, golden):
    for model in (tiny(num_classes=11), tiny(use_se=True), NFResNet((1, 1, 1, 1), 1, num_classes=10)):
        with pytest.raises(ValueError, match="npz does not fit the model"):
            load_haiku(model, arrays)
    for prefix in ("nfnet_tiny/params/", "nf_resnet_tiny/", "nothing/"):
        with pytest.raises(ValueError, match="missing"):
            load_haiku(tiny(), golden, prefix=prefix)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), None], ids=["Linear", "None"])
def test_a_model_of_another_type_is_refused(model, arrays):
    with pytest.raises(TypeError, match="model must be an NFResNet"):
        load_haiku(model, arrays)


def nested(arrays):
    """As haiku holds parameters: module to parameter to array."""
    modules = {}
    for key, value in arrays.items():
        module, _, name = key.rpartition("/")
        modules.setdefault(module, {})[name] = value
    return modules


@pytest.fixture
def nfnet_arrays(golden):
    """The checkpoint of nfnet_tiny."""
    prefix = "nfnet_tiny/params/"
    return {key.removeprefix(prefix): value for key, value in golden.items() if key.startswith(prefix)}


def tiny_nfnet(**options):
    return NFNet([32, 48, 64, 64], [1, 2, 1, 1], **{"num_classes": 10, "group_width": 8, **options})


def assert_gives_the_authors_logits(model, golden):
    x = torch.from_numpy(golden["nfnet_tiny/input_nhwc"]).permute(0, 3, 1, 2)
    expected = torch.from_numpy(golden["nfnet_tiny/outputs/logits"])
    with torch.no_grad():
        assert (model.eval()(x) - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("layout", [dict, nested], ids=["flat", "nested"])
def test_loads_an_nfnet(golden, nfnet_arrays, layout):
    model = load_haiku(tiny_nfnet(), layout(nfnet_arrays))
    assert_gives_the_authors_logits(model, golden)
    for name, key in {"stem_conv3.weight": "stem_conv3/w", "blocks.3.conv1b.weight": "nf_block_3/~/conv1b/w"}.items():
        expected = nfnet_arrays[f"NFNet/~/{key}"].transpose(3, 2, 0, 1)
        np.testing.assert_array_equal(model.state_dict()[name].numpy(), expected)
    prefixed = {f"ema/{key}": value for key, value in layout(nfnet_arrays).items()}
    assert_same(dict(load_haiku(tiny_nfnet(), prefixed, prefix="ema/").state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_loads_a_pickle_under_the_name_npz_as_the_authors_published_it(golden, nfnet_arrays, tmp_path, protocol):
    path = tmp_path / "F0_haiku.npz"
    path.write_bytes(pickle.dumps(nested(nfnet_arrays), protocol=protocol))
    assert_gives_the_authors_logits(load_haiku(tiny_nfnet(), path), golden)


def test_loads_arrays_as_dill_pickles_them(golden, nfnet_arrays, tmp_path, monkeypatch):
    """As calls of a function of its own, which the published files name; dill need not be installed."""

    def create(make, args, state, attributes):
        raise AssertionError

    create.__module__, create.__qualname__ = "dill._dill", "_create_array"

    class Pickler(pickle.Pickler):
        def reducer_override(self, value):
            return (create, (*value.__reduce__(), None)) if isinstance(value, np.ndarray) else NotImplemented

    path = tmp_path / "F0_haiku.npz"
    with monkeypatch.context() as patch, path.open("wb") as file:
        patch.setitem(sys.modules, "dill", SimpleNamespace())
        patch.setitem(sys.modules, "dill._dill", SimpleNamespace(_create_array=create))
        Pickler(file).dump(nested(nfnet_arrays))
    assert b"_create_array" in path.read_bytes()
    assert_gives_the_authors_logits(load_haiku(tiny_nfnet(), path), golden)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "hide",
    [lambda bad: bad, lambda bad: {"module": {"w": bad}}, lambda bad: {"w": np.array([bad], dtype=object)}],
    ids=["bare", "value", "element"],
)
def test_a_pickle_that_would_run_code_is_refused(tmp_path, hide):
    (tmp_path / "bad.npz").write_bytes(pickle.dumps(hide(Malicious(tmp_path / "executed"))))
    with pytest.raises(pickle.UnpicklingError, match="not only arrays"):
        load_haiku(tiny(), tmp_path / "bad.npz")
    assert not (tmp_path / "executed").exists()


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "list.npz").write_bytes(pickle.dumps([np.zeros(3)]))
    with pytest.raises(ValueError, match=r"list\.npz must hold a mapping of arrays, got list"):
        load_haiku(tiny(), tmp_path / "list.npz")
    (tmp_path / "text.npz").write_text("weights")
    with pytest.raises(pickle.UnpicklingError):
        load_haiku(tiny(), tmp_path / "text.npz")
    with pytest.raises(OSError, match="nothing"):
        load_haiku(tiny(), tmp_path / "nothing.npz")


def test_published_nfnets_have_as_many_modules_as_ours():
    """The counts by which a converter for the published files tells F0 to F5 apart (benjs/nfnets_pytorch)."""
    for make, count in zip((nfnet_f0, nfnet_f1, nfnet_f2), (94, 178, 262), strict=True):
        with torch.device("meta"):
            model = make()
        keys = from_haiku(model, {}).keys.values()
        assert len({key.rpartition("/")[0] for key in keys}) == count


# The parameters of the authors' NF-RegNet (nfnets/nf_regnet.py) with two blocks in its second stage.
REGNET_CONVS = ["initial_conv", "final_conv"] + [
    f"{block}/~/{conv}"
    for block, projects in (("nf_block", 1), ("nf_block_1", 1), ("nf_block_2", 0), ("nf_block_3", 1), ("nf_block_4", 1))
    for conv in ("conv0", "conv1", "conv2", *["conv_shortcut"] * projects)
]
REGNET_BLOCKS = ["nf_block", *(f"nf_block_{k}" for k in range(1, 5))]


def test_loads_an_nf_regnet():
    model = NFRegNet([48, 64, 80, 96], [1, 2, 1, 1], num_classes=10)
    names = [f"{conv}/{leaf}" for conv in REGNET_CONVS for leaf in ("w", "bias", "gain")]
    names += [f"{block}/skip_gain" for block in REGNET_BLOCKS]
    linears = ["linear", *(f"{b}/~/squeeze_excite/~/{name}" for b in REGNET_BLOCKS for name in ("linear", "linear_1"))]
    names += [f"{linear}/{leaf}" for linear in linears for leaf in ("w", "b")]
    keys = from_haiku(model, {}).keys
    assert set(keys.values()) == {f"NF_RegNet/~/{name}" for name in names}
    generator = np.random.default_rng(0)
    arrays = {
        keys[name]: generator.normal(size=(*value.shape[2:], *value.shape[1::-1]) if value.ndim > 1 else value.shape)
        for name, value in model.state_dict().items()
    }
    load_haiku(model, nested(arrays))
    for name, key in {
        "blocks.2.conv1.weight": "nf_block_2/~/conv1/w",
        "blocks.0.skip_gain": "nf_block/skip_gain",
        "blocks.4.se.fc1.weight": "nf_block_4/~/squeeze_excite/~/linear_1/w",
        "final_conv.gain": "final_conv/gain",
        "fc.weight": "linear/w",
    }.items():
        array = arrays[f"NF_RegNet/~/{key}"]
        expected = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
        np.testing.assert_array_equal(model.state_dict()[name].numpy(), expected.astype(np.float32))


def test_a_network_without_classifier_leaves_the_checkpoints(nfnet_arrays):
    model = load_haiku(tiny_nfnet(num_classes=0), nfnet_arrays)
    np.testing.assert_array_equal(model.final_conv.gain.detach().numpy(), nfnet_arrays["NFNet/~/final_conv/gain"])

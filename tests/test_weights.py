"""`load_haiku`: the authors' checkpoint layout from files and mappings, and what does not fit."""

import numpy as np
import pytest
import torch
from torch import nn

from nfnets_kernels.models import NFResNet, load_haiku

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

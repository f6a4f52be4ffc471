"""`diagnostics.signal_propagation`: the authors' metrics, the theory at initialization, and no trace left behind."""

import pytest
import torch
from torch import nn

from nfnets_kernels.diagnostics import SignalPropagation, signal_propagation
from nfnets_kernels.models import NFResNet, load_haiku

from .helpers import assert_same, channels_last
from .module_helpers import authors_nf_resnet, float64_parameters, on_one_thread, perturb

PREFIX = "nf_resnet_tiny/"
DEPTH = (1, 2, 1, 1)

one_thread = pytest.fixture(on_one_thread, autouse=True)
KEYS = {f"avg_{kind}_{i}" for kind in ("sq_mean", "var") for i in range(6)} | {f"res_avg_var_{i}" for i in range(5)}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_metrics_are_the_authors(golden, layout):
    model = load_haiku(NFResNet(DEPTH, 1, num_classes=10), golden, prefix=f"{PREFIX}params/")
    x = torch.from_numpy(golden[f"{PREFIX}input_nhwc"]).permute(0, 3, 1, 2)
    metrics = signal_propagation(model, channels_last(x) if layout == "channels_last" else x.contiguous())
    expected = {key: golden[f"{PREFIX}outputs/{key}"].item() for key in KEYS}
    assert {key: value.item() for key, value in metrics.items()} == pytest.approx(expected, rel=1e-4)
    assert all(value.ndim == 0 and not value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{"activation": "gelu"}, {"use_se": True}, {"stochdepth_rate": 0.5}], ids=str)
def test_metrics_are_those_of_the_forward_pass_written_out(options, training):
    model = perturb(NFResNet(DEPTH, 1, num_classes=10, dtype=torch.float64, **options)).train(training)
    x = torch.randn(2, 3, 33, 32, dtype=torch.float64)
    metrics = signal_propagation(model, x)
    activation = options.get("activation", "relu")
    written_out = authors_nf_resnet(float64_parameters(model), x, DEPTH, activation=activation)
    expected = {key: written_out[key].item() for key in KEYS}
    random = training and "stochdepth_rate" in options
    if random:  # block 0 is never dropped, and a branch is looked at before it is dropped
        metrics, expected = ({key: values[key] for key in KEYS if key[-1] == "0"} for values in (metrics, expected))
    assert {key: value.item() for key, value in metrics.items()} == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_variance_at_initialization_grows_by_alpha_squared_within_a_stage(seed):
    torch.manual_seed(seed)
    depth, alpha = (4, 4, 4, 4), 0.5
    model = NFResNet(depth, 2, num_classes=10, alpha=alpha)
    for block in model.blocks:
        nn.init.ones_(block.skip_gain)
    metrics = signal_propagation(model, torch.randn(16, 3, 128, 128))
    expected = {f"avg_var_{4 * stage + k}": 1 + k * alpha**2 for stage in range(4) for k in range(1, 5)}
    assert {key: metrics[key].item() for key in expected} == pytest.approx(expected, rel=0.25)


class Failure(Exception):
    pass


@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
@pytest.mark.parametrize("training", [True, False])
def test_leaves_no_trace(training, fails):
    model, x = perturb(NFResNet(DEPTH, 1, num_classes=10)).train(training), torch.randn(2, 3, 32, 32)
    seen = []
    handle = model.blocks[1].register_forward_hook(lambda block, inputs, outputs: seen.append(outputs[0]))

    def traces():
        hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks), m.training) for m in model.modules()]
        with torch.no_grad():
            return hooks, model(x), {name: value.clone() for name, value in model.state_dict().items()}

    before = traces()
    if fails:
        failing = model.blocks[3].register_forward_pre_hook(lambda block, inputs: (_ for _ in ()).throw(Failure()))
        with pytest.raises(Failure):
            signal_propagation(model, x)
        failing.remove()
    else:
        signal_propagation(model, x)
    assert len(seen) == 2
    assert torch.is_grad_enabled() and all(parameter.grad is None for parameter in model.parameters())
    after = traces()
    assert before[0] == after[0]
    assert_same(before[1:], after[1:])
    handle.remove()


def test_another_model_is_refused():
    with pytest.raises(TypeError, match=r"model must be an NF network of .*, got Linear"):
        signal_propagation(nn.Linear(3, 3), torch.randn(2, 3))


def test_the_plot_shows_each_metric_block_by_block(tmp_path):
    metrics = signal_propagation(perturb(NFResNet(DEPTH, 1, num_classes=10)), torch.randn(2, 3, 32, 32))
    figure = metrics.plot(tmp_path / "signal.png")
    for axes, metric, count in zip(figure.axes, ("avg_sq_mean", "avg_var", "res_avg_var"), (6, 6, 5), strict=True):
        (line,) = axes.lines
        assert list(line.get_xdata()) == list(range(count))
        assert list(line.get_ydata()) == [metrics[f"{metric}_{i}"].item() for i in range(count)]
    assert (tmp_path / "signal.png").read_bytes().startswith(b"\x89PNG")


def test_blocks_are_drawn_in_their_order_however_many_there_are():
    metrics = SignalPropagation({f"avg_var_{i}": torch.tensor(float(i)) for i in (10, 2, 0, 1, 9, 3, 4, 5, 6, 7, 8)})
    assert metrics.of("avg_var") == [float(i) for i in range(11)]

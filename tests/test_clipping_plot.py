"""`diagnostics.clipping.plot`: what clipping did, parameter by parameter, as its statistics say."""

import sys

import pytest
import torch
from torch import nn

from nfnets_kernels.diagnostics import clipping
from nfnets_kernels.optim import AGC, SGD_AGC, param_groups


def model_with_gradients() -> nn.Module:
    """Of the weight's four units two are clipped at 0.01, and the bias, whose norm counts as 1e-3."""
    model = nn.Sequential(nn.Linear(3, 4))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].bias.zero_()
    model[0].weight.grad = torch.tensor([0.1, 0.001, 0.5, 0.002]).view(4, 1).expand(4, 3).clone()
    model[0].bias.grad = torch.full((4,), 1e-3)
    return model


def drawn(figure) -> tuple[list[float], list[float]]:
    """Fractions and ratios in a figure."""
    fractions, ratios = figure.axes
    return [bar.get_width() for bar in fractions.patches], list(ratios.lines[0].get_xdata())


@pytest.mark.parametrize("clipper", ["AGC", "SGD_AGC"])
def test_fractions_and_ratios_are_drawn(clipper, tmp_path):
    model = model_with_gradients()
    if clipper == "AGC":
        clipped = AGC(model, statistics=True)
        clipped.clip_()
    else:
        clipped = SGD_AGC(param_groups(model, head=()), lr=0.1, statistics=True)
        clipped.step()
    figure = clipping.plot(clipped, tmp_path / "clipping.png")
    fractions, ratios = drawn(figure)
    assert fractions == [0.5, 1.0]
    assert ratios == pytest.approx([0.5, 2.0])  # the bias: a norm of 2e-3 against eps, 1e-3
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == ["0.weight", "0.bias"]
    assert list(figure.axes[1].lines[1].get_xdata()) == [0.01, 0.01]
    assert (tmp_path / "clipping.png").read_bytes().startswith(b"\x89PNG")


def test_statistics_can_be_drawn_later():
    agc = AGC(model_with_gradients(), statistics=True)
    agc.clip_()
    figure = clipping.plot(agc.stats(), clip_factor=0.03)
    assert drawn(figure)[0] == [0.5, 1.0]
    assert list(figure.axes[1].lines[1].get_xdata()) == [0.03, 0.03]
    assert len(clipping.plot(agc.stats()).axes[1].lines) == 1


def test_no_line_where_groups_have_several_factors():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    groups = [{"params": [first.weight], "clip_factor": 0.01}, {"params": [second.weight], "clip_factor": 0.02}]
    optimizer = SGD_AGC(groups, lr=0.1, statistics=True)
    for layer in (first, second):
        layer.weight.grad = torch.ones(2, 2)
    optimizer.step()
    assert len(clipping.plot(optimizer).axes[1].lines) == 1


def test_what_cannot_be_drawn_is_named(monkeypatch):
    model = model_with_gradients()
    with pytest.raises(TypeError, match=r"clipped must be an AGC.*got Sequential"):
        clipping.plot(model)
    with pytest.raises(RuntimeError, match="statistics=True"):
        clipping.plot(AGC(model))
    agc = AGC(model, statistics=True)
    with pytest.raises(ValueError, match="clipped must have clipped gradients"):
        clipping.plot(agc)
    agc.clip_()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        clipping.plot(agc)

"""The Lightning callback: what the Trainer trains with it is what a loop with `agc_` trains, bit for bit."""

import copy
import functools
import pickle
import runpy
import sys

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import nfnets_kernels as nfk
from nfnets_kernels.integrations.lightning import AdaptiveGradientClipping
from nfnets_kernels.optim.param_groups import param_groups

from .agc_cases import Net
from .module_helpers import on_one_thread

one_thread = pytest.fixture(on_one_thread, autouse=True)
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning", "ignore:.*num_workers")

STEPS = 6
SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True)


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 3, 8, 8, generator=generator), torch.tensor([0, 1, 2, 3])) for _ in range(STEPS)]


def loader() -> DataLoader:
    images, labels = (torch.cat(tensors) for tensors in zip(*batches(), strict=True))
    return DataLoader(TensorDataset(images, labels), batch_size=4)


def loss_of(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return 100 * nn.functional.cross_entropy(model(batch[0]).float(), batch[1])


@functools.cache
def lit_class(package):
    class Lit(package.LightningModule):
        def __init__(self, optimizer=SGD, groups=nn.Module.parameters):
            super().__init__()
            self.model = start()
            self.optimizer, self.groups = optimizer, groups

        def training_step(self, batch, _):
            return loss_of(self.model, batch)

        def configure_optimizers(self):
            return self.optimizer(self.groups(self.model))

    return Lit


Lit = lit_class(lightning.pytorch)


def start() -> Net:
    torch.manual_seed(0)
    return Net()


def trainer(*callbacks, package=lightning.pytorch, max_epochs=1, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return package.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=max_epochs,
        callbacks=list(callbacks),
        **{"enable_checkpointing": False, **quiet, **options},
    )


def fit(module, *callbacks, **options) -> nn.Module:
    trainer(*callbacks, **options).fit(module, loader())
    return module.model


def by_hand(clip=nfk.agc_, optimizer=SGD, groups=nn.Module.parameters, accumulate=1, exclude=("fc",)) -> nn.Module:
    """The same training, written out; fc.weight is tied's too."""
    model = start()
    excluded = {p for name in exclude for p in model.get_submodule(name).parameters()}
    optimizer = optimizer(groups(model))
    for step, batch in enumerate(batches(), 1):
        (loss_of(model, batch) / accumulate).backward()
        if step % accumulate == 0:
            clip([p for p in model.parameters() if p not in excluded])
            optimizer.step()
            optimizer.zero_grad()
    return model


def assert_equal(model: nn.Module, expected: nn.Module) -> None:
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(p, q), name


def differ(model: nn.Module, other: nn.Module) -> bool:
    return any(not torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("package", [lightning.pytorch, pytorch_lightning], ids=lambda package: package.__name__)
def test_training_is_that_of_a_loop_with_agc_(package):
    clip = AdaptiveGradientClipping(0.02, 1e-2, norm_type=1.0, rule="deepmind", exclude=("model.fc",))
    model = fit(lit_class(package)(), clip, package=package)
    options = {"clip_factor": 0.02, "eps": 1e-2, "norm_type": 1.0, "rule": "deepmind"}
    assert_equal(model, by_hand(functools.partial(nfk.agc_, **options)))
    assert differ(model, by_hand())
    assert differ(model, by_hand(lambda parameters: None))


def test_accumulated_gradients_are_clipped_once_they_are_complete():
    model = fit(Lit(), AdaptiveGradientClipping(exclude=["model.fc"]), accumulate_grad_batches=2)
    assert_equal(model, by_hand(accumulate=2))


def test_a_group_has_its_own_clip_factor():
    """And no name has to be given: `param_groups` knows the head."""
    groups = functools.partial(param_groups, clip_factor=0.02)
    model = fit(Lit(groups=groups), AdaptiveGradientClipping(0.5))
    assert_equal(model, by_hand(functools.partial(nfk.agc_, clip_factor=0.02), groups=groups))


def test_a_closure_is_clipped_each_time_it_is_called():
    lbfgs = functools.partial(torch.optim.LBFGS, lr=0.1, max_iter=3)
    model = start()
    optimizer = lbfgs(model.parameters())
    for batch in batches():

        def closure(batch=batch):
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            nfk.agc_(model.parameters())
            return loss

        optimizer.step(closure)
    assert_equal(fit(Lit(lbfgs), AdaptiveGradientClipping()), model)


class Manual(Lit):
    """Two optimizers with a loss each, the second one at every other step."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        return SGD([*self.model.stem.parameters(), *self.model.fc.parameters()]), SGD(self.model.body.parameters())

    def training_step(self, batch, index):
        for optimizer in self.optimizers()[: 1 + index % 2]:
            optimizer.zero_grad()
            self.manual_backward(loss_of(self.model, batch))
            optimizer.step()


def test_manual_optimization_clips_the_parameters_of_the_optimizer_that_steps():
    model = start()
    parts = [[*model.stem.parameters(), *model.fc.parameters()], list(model.body.parameters())]
    optimizers = list(map(SGD, parts))
    for index, batch in enumerate(batches()):
        for part, optimizer in list(zip(parts, optimizers, strict=True))[: 1 + index % 2]:
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            nfk.agc_(part)
            optimizer.step()
    assert_equal(fit(Manual(), AdaptiveGradientClipping()), model)


def test_bfloat16_autocast():
    model = start()
    optimizer = SGD(model.parameters())
    for batch in batches():
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, batch)
        loss.backward()
        nfk.agc_(model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert_equal(fit(Lit(), AdaptiveGradientClipping(), precision="bf16-mixed"), model)


class Flawed(Lit):
    """The third batch has an infinite loss; the fifth one none."""

    def training_step(self, batch, index):
        return None if index == 4 else super().training_step(batch, index) * (float("inf") if index == 2 else 1.0)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("fused", [False, True])
def test_scaled_gradients_are_unscaled_first(fused):
    """Fused optimizers unscale by themselves, in their step: Lightning leaves them the scaled gradients."""
    optimizer_of = functools.partial(SGD, fused=fused)
    scaler = functools.partial(torch.amp.GradScaler, "cpu", init_scale=512.0, growth_interval=2)
    model = start()
    optimizer, by_hand = optimizer_of(model.parameters()), scaler()
    for index, batch in enumerate(batches()):
        if index == 4:
            continue
        with torch.autocast("cpu", torch.float16):
            loss = loss_of(model, batch) * (float("inf") if index == 2 else 1.0)
        by_hand.scale(loss).backward()
        by_hand.unscale_(optimizer)
        nfk.agc_(model.parameters())
        by_hand.step(optimizer)
        by_hand.update()
        optimizer.zero_grad()
    plugin = MixedPrecision("16-mixed", "cpu", scaler())
    trained = fit(Flawed(optimizer_of), AdaptiveGradientClipping(), plugins=plugin)
    assert_equal(trained, model)
    assert plugin.scaler.get_scale() == by_hand.get_scale() != 512.0
    assert all(p.isfinite().all() for p in trained.parameters())


class Unfreezing(lightning.pytorch.Callback):
    """Trains the body from the fourth batch on."""

    def on_train_batch_start(self, trainer, pl_module, batch, index):
        if index == 3:
            trainer.optimizers[0].add_param_group({"params": list(pl_module.model.body.parameters())})


def test_parameters_may_be_added_while_training():
    def stem_and_fc(model):
        return [*model.stem.parameters(), *model.fc.parameters()]

    model = start()
    optimizer = SGD(stem_and_fc(model))
    for index, batch in enumerate(batches()):
        if index == 3:
            optimizer.add_param_group({"params": list(model.body.parameters())})
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        nfk.agc_([p for group in optimizer.param_groups for p in group["params"]])
        optimizer.step()
    assert_equal(fit(Lit(groups=stem_and_fc), AdaptiveGradientClipping(), Unfreezing()), model)


def test_training_resumes_from_a_checkpoint(tmp_path):
    whole = fit(Lit(), AdaptiveGradientClipping(), max_epochs=3)
    first = trainer(AdaptiveGradientClipping(), max_epochs=1)
    first.fit(Lit(), loader())
    first.save_checkpoint(tmp_path / "one.ckpt")
    resumed = Lit()
    second = trainer(AdaptiveGradientClipping(), max_epochs=3)
    second.fit(resumed, loader(), ckpt_path=tmp_path / "one.ckpt", weights_only=True)
    assert_equal(resumed.model, whole)


def test_the_callback_can_be_copied_and_used_again():
    clip = AdaptiveGradientClipping(exclude=("model.fc",))
    copies = copy.deepcopy(clip), pickle.loads(pickle.dumps(clip))
    for each in (clip, clip, *copies):
        assert_equal(fit(Lit(), each), by_hand())


def test_the_trainers_own_clipping_is_refused():
    with pytest.raises(ValueError, match=r"Trainer\(gradient_clip_val=0.5\).*would both clip"):
        fit(Lit(), AdaptiveGradientClipping(), gradient_clip_val=0.5)


def test_what_is_excluded_must_be_there():
    with pytest.raises(ValueError, match=r"exclude='fc' matches no module.*model\.fc"):
        fit(Lit(), AdaptiveGradientClipping(exclude=("fc",)))


@pytest.mark.parametrize(
    "error, message, options",
    [
        (ValueError, "clip_factor must be finite and not negative, got -1", {"clip_factor": -1}),
        (ValueError, "eps must be finite", {"eps": float("inf")}),
        (ValueError, "norm_type must be", {"norm_type": 0}),
        (ValueError, "rule must be", {"rule": "optax"}),
        (ValueError, "backend must be", {"backend": "gpu"}),
        (TypeError, "exclude must be a sequence of names or modules, got a single str", {"exclude": "fc"}),
        (
            TypeError,
            "exclude must be a sequence of names or modules, got a single Linear",
            {"exclude": nn.Linear(1, 1)},
        ),
    ],
)
def test_bad_options_are_named_before_training(error, message, options):
    with pytest.raises(error, match=message):
        AdaptiveGradientClipping(**options)


MODULE = "nfnets_kernels.integrations.lightning"


def test_the_other_package_serves_where_the_first_is_missing(monkeypatch):
    monkeypatch.delitem(sys.modules, MODULE)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    clip = runpy.run_module(MODULE)["AdaptiveGradientClipping"]
    assert clip.__base__ is pytorch_lightning.Callback
    assert AdaptiveGradientClipping.__base__ is lightning.pytorch.Callback


def test_the_extra_is_named_where_both_are_missing(monkeypatch):
    monkeypatch.delitem(sys.modules, MODULE)
    for package in ("lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"needs Lightning: pip install 'nfnets-kernels\[lightning\]'"):
        runpy.run_module(MODULE)

"""Training on several processes is training on one: FSDP2, tensor and data parallelism; what FSDP1 does is rejected.

The functions that are not tests run in each of two processes; two of them need a grid, and run in test_sharded.py.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.distributed import fsdp
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import nfnets_kernels as nfk
from nfnets_kernels.optim import SGD_AGC
from nfnets_kernels.sharded import clip_sharded_, is_sharded, reject_flat_parameters, reshape_scalars_

from .distributed import assert_clips_as_whole, grid, line, run, whole


class Network(nn.Module):
    """An NF network with stages, whose owner standardizes them one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nfk.WSConv2d(3, 8, 3, 2)
        first = nn.Sequential(nfk.WSConv2d(8, 8, 3), nfk.ScaledReLU(), nfk.WSConv2d(8, 6, 1))
        second = nn.Sequential(nfk.ScaledReLU(), nfk.WSConv2d(6, 7, 3), nfk.ScaledReLU())
        self.stages = nn.Sequential(first, second)
        self.head = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


def network(group: str = "stage") -> Network:
    """The same on all ranks."""
    torch.manual_seed(1)
    model = Network()
    nfk.BatchedWeightStandardization(model, group)
    return model


def batch(rank: int | None = None) -> tuple[Tensor, Tensor]:
    """Images and labels of all ranks, or of one."""
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(8, 3, 16, 16, generator=generator)
    labels = torch.arange(8) % 5
    world = distributed.get_world_size()
    return (images, labels) if rank is None else (images.chunk(world)[rank], labels.chunk(world)[rank])


def backward(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    model.zero_grad()
    (100 * F.cross_entropy(model(images), labels)).backward()


def shard(model: Network, mesh) -> Network:
    for part in (model.stem, *model.stages, model.head):
        fsdp.fully_shard(part, mesh=mesh)
    return fsdp.fully_shard(model, mesh=mesh)


def fully_sharded_gradients_are_clipped_as_whole_ones():
    model = shard(network(), line())
    backward(model, *batch(distributed.get_rank()))
    assert all(map(is_sharded, model.parameters()))
    assert assert_clips_as_whole(list(model.parameters())) == 1


def our_networks_fully_sharded():
    """Block by block; with a gate the last pass of a block multiplies by the skip gain, without one a weight does."""
    for use_se in (False, True):
        torch.manual_seed(1)
        model = nfk.models.NFResNet((1, 1, 1, 1), 1, num_classes=5, use_se=use_se, dtype=torch.float64)
        for block in model.blocks:
            nn.init.constant_(block.skip_gain, 0.5)
        (images, labels), (all_images, all_labels) = batch(distributed.get_rank()), batch()
        backward(model, all_images.double(), all_labels)
        expected = [p.grad.clone() for p in model.parameters()]
        reshape_scalars_(model)
        for block in model.blocks:
            fsdp.fully_shard(block, mesh=line())
        fsdp.fully_shard(model, mesh=line())
        backward(model, images.double(), labels)
        for p, grad in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(whole(p.grad).reshape(grad.shape), grad)
        assert assert_clips_as_whole(list(model.parameters())) == 1


def hybrid_sharded_gradients_are_clipped_as_whole_ones():
    model = shard(network(), grid())
    backward(model, *batch(distributed.get_rank()))
    assert assert_clips_as_whole(list(model.parameters())) == 1


def train(model: nn.Module, images: Tensor, labels: Tensor, clip_factor: float | None = 0.01) -> list[Tensor]:
    """The parameters after five steps, whole."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-4)
    for _ in range(5):
        backward(model, images, labels)
        if clip_factor is not None:
            clip_sharded_(list(model.parameters()), clip_factor, 1e-3, 2.0, rule="timm", backend="auto")
        optimizer.step()
    return [whole(p) for p in model.parameters()]


def train_fused(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters after five steps of SGD_AGC, whole, and how often their units were clipped, on this rank."""
    named = dict(model.named_parameters())
    head = [named.pop(name) for name in ("head.weight", "head.bias")]
    groups = [{"params": list(named.values())}, {"params": head, "clip_factor": None, "weight_decay": 0.0}]
    optimizer = SGD_AGC(groups, lr=0.05, weight_decay=1e-4, ema_decay=0.9, statistics=True)
    for _ in range(5):
        backward(model, images, labels)
        optimizer.step()
    rows = torch.tensor([[row.units, row.units * row.steps * row.fraction] for row in optimizer.stats()])
    averages = [optimizer.state[p]["ema"] for p in model.parameters()]
    return [whole(p) for p in [*model.parameters(), *averages]], rows


def fused_training_fully_sharded_is_that_of_one_process():
    expected, of_all = train_fused(network(), *batch())
    actual, of_rank = train_fused(shard(network(), line()), *batch(distributed.get_rank()))
    torch.testing.assert_close(actual, expected)
    spread = [p.ndim < 2 for name, p in network().named_parameters() if not name.startswith("head")]
    distributed.all_reduce(of_rank)
    of_rank[torch.tensor(spread)] /= distributed.get_world_size()  # both ranks hold a part of these units
    torch.testing.assert_close(of_rank, of_all)


def fully_sharded_training_is_that_of_one_process():
    expected, unclipped = train(network(), *batch()), train(network(), *batch(), clip_factor=None)
    actual = train(shard(network(), line()), *batch(distributed.get_rank()))
    torch.testing.assert_close(actual, expected)
    assert all((one - other).abs().max() > 1e-3 for one, other in zip(expected, unclipped, strict=True))


def perceptron() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8))


def in_tensor_parallel(mesh) -> nn.Module:
    return parallelize_module(perceptron(), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def tensor_parallel_training_is_that_of_one_process():
    inputs, labels = torch.randn(8, 6), torch.arange(8)
    model = in_tensor_parallel(line())
    backward(model, inputs, labels)
    assert assert_clips_as_whole(list(model.parameters())) == 1
    torch.testing.assert_close(train(in_tensor_parallel(line()), inputs, labels), train(perceptron(), inputs, labels))


def fully_sharded_tensor_parallel_training_is_that_of_one_process():
    mesh = grid()
    inputs, labels = torch.randn(8, 6), torch.arange(8)
    rows = mesh["outer"].get_local_rank()

    def make() -> nn.Module:
        return fsdp.fully_shard(in_tensor_parallel(mesh["inner"]), mesh=mesh["outer"])

    part = inputs.chunk(2)[rows], labels.chunk(2)[rows]
    model = make()
    backward(model, *part)
    assert assert_clips_as_whole(list(model.parameters())) == 2
    torch.testing.assert_close(train(make(), *part), train(perceptron(), inputs, labels))


def data_parallel_training_is_that_of_one_process():
    wrapped = DistributedDataParallel(network(), bucket_cap_mb=1e-4)
    actual = train(wrapped, *batch(distributed.get_rank()))
    torch.testing.assert_close(actual, train(network(), *batch()))
    for tensor in [*actual, *(p.grad for p in wrapped.parameters())]:
        first = tensor.clone()
        distributed.broadcast(first, 0)
        assert torch.equal(tensor, first)


def data_parallel_gradients_are_reduced_during_the_backward_pass():
    """By stage; the model's own launch has no gradient before its backward pass, the last one of all."""
    for group in ("stage", "model"):
        events: list[str] = []
        wrapped = DistributedDataParallel(network(group), bucket_cap_mb=1e-4)

        def reduce(state, bucket, events=events):
            events.append(f"bucket of {[tuple(p.shape) for p in bucket.parameters()]}")
            future = distributed.all_reduce(bucket.buffer(), async_op=True).get_future()
            return future.then(lambda done: done.value()[0] / distributed.get_world_size())

        wrapped.register_comm_hook(None, reduce)
        images, labels = batch(distributed.get_rank())
        backward(wrapped, images, labels)  # after this pass DDP orders its buckets as gradients come
        wrapped.module.stem.register_full_backward_hook(lambda *_, events=events: events.append("stem"))
        events.clear()
        backward(wrapped, images.requires_grad_(), labels)
        before_stem = " ".join(events[: events.index("stem")])
        assert len(events) > 2 and ("(7, 6, 3, 3)" in before_stem) == (group == "stage"), events


def flat_parameters_are_rejected():
    for use_orig_params in (False, True):
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
        options = {"use_orig_params": use_orig_params, "device_id": torch.device("cpu")}
        model = fsdp.FullyShardedDataParallel(net, **options)
        with pytest.raises(TypeError, match="fully_shard"):
            reject_flat_parameters(model.parameters())
        model(torch.randn(2, 3, 8, 8)).sum().backward()
        with pytest.raises(TypeError, match="fully_shard"):
            reject_flat_parameters(list(model.parameters())[-1:])
    reject_flat_parameters([*network().parameters(), *shard(network(), line()).parameters()])


def the_benchmark_s_synchronized_batchnorm_is_that_of_the_whole_batch():
    from benchmarks.bench_distributed import SynchronizedBatchNorm2d  # imports timm, which no other process needs

    rank, images = distributed.get_rank(), batch()[0].double()
    expected, actual = nn.BatchNorm2d(3).double(), SynchronizedBatchNorm2d(3).double()
    for norm, x in ((expected, images), (actual, images.chunk(2)[rank])):
        nn.init.constant_(norm.weight, 1.5)
        norm.x = x.clone().requires_grad_()
        norm.out = norm(norm.x)
        (norm.out**3 * x).sum().backward()
    for p in actual.parameters():
        distributed.all_reduce(p.grad)
    torch.testing.assert_close(actual.out, expected.out.chunk(2)[rank])
    torch.testing.assert_close(actual.x.grad, expected.x.grad.chunk(2)[rank])
    torch.testing.assert_close([p.grad for p in actual.parameters()], [p.grad for p in expected.parameters()])


FUNCTIONS = [
    fully_sharded_gradients_are_clipped_as_whole_ones,
    our_networks_fully_sharded,
    fully_sharded_training_is_that_of_one_process,
    fused_training_fully_sharded_is_that_of_one_process,
    tensor_parallel_training_is_that_of_one_process,
    data_parallel_training_is_that_of_one_process,
    data_parallel_gradients_are_reduced_during_the_backward_pass,
    flat_parameters_are_rejected,
    the_benchmark_s_synchronized_batchnorm_is_that_of_the_whole_batch,
]


@pytest.fixture(scope="module")
def raised(tmp_path_factory):
    return run(2, FUNCTIONS, tmp_path_factory.mktemp("gloo"))


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_on_two_processes(raised, function):
    assert not raised[function.__name__], raised[function.__name__]


def test_a_checkpoint_without_scalars_fits_a_network_with_them():
    model = reshape_scalars_(nfk.models.NFResNet((1, 1, 1, 1), 1, num_classes=5))
    nn.init.constant_(model.blocks[0].skip_gain, 0.5)
    twin = nfk.models.NFResNet((1, 1, 1, 1), 1, num_classes=5)
    twin.load_state_dict(model.state_dict())
    assert twin.blocks[0].skip_gain.shape == ()
    assert twin.blocks[0].skip_gain.item() == 0.5

"""Several processes over gloo against one process with the same global batch."""

import multiprocessing
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

import genotypes
from architect import Architect, search_step
from fused import Gradients
from harness import data, distributed, imagenet, loops
from model import NetworkImageNet
from model_search import Network
from test_imagenet import fill
from utils import UserError

CPU = torch.device("cpu")
# torch is imported once, not in every process.
multiprocessing.get_context("forkserver").set_forkserver_preload(["train", "train_search"])
RUN = SimpleNamespace(  # a runs.Run that saves nothing
    log=SimpleNamespace(info=lambda *args: None), unfinished=None, epoch=0, step=lambda figures: 0
)


def in_processes(n, function, *args):
    """[what function(*args) returns in each of n processes]."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            _process, (n, folder, function, args), nprocs=n, start_method="forkserver"
        )
        return [torch.load(Path(folder, str(rank)), weights_only=False) for rank in range(n)]


def _process(rank, n, folder, function, args):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=n)
    torch.save(function(*args), Path(folder, str(rank)))
    dist.barrier()  # none leaves while another still talks to it
    dist.destroy_process_group()


def mine(batch):
    """The share of a global batch that a Loader gives to this process."""
    return [tensor[distributed.rank() :: distributed.world_size()] for tensor in batch]


def batch(n, size, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, size, size, generator=draw).double(), torch.arange(n) % 5


def assert_equal_tensors(one, other, rtol=1e-9):
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-12)


# --- the search ---

SEARCH = SimpleNamespace(
    momentum=0.9, weight_decay=3e-4, arch_learning_rate=6e-3, arch_weight_decay=1e-3,
    arch_grad_clip=0.02, grad_clip=5.0, unrolled=False,
)  # fmt: skip


def search(synchronized, unrolled, sizes):
    """Alphas, betas, weights and running statistics after a step on batches of these sizes."""
    torch.manual_seed(0)
    criterion = nn.CrossEntropyLoss()
    network = Network(8, 5, 3, criterion, k=2, stem="imagenet").double().train()
    if synchronized:
        network = distributed.synchronized(network, CPU)
        assert all(cell.is_fast() and not cell._plan().kinds.others for cell in network.cells)
    else:
        network.eval()  # norms by running statistics: no batch counts
    optimizer = torch.optim.SGD(network.weights(), 0.1, 0.9)
    args = SimpleNamespace(**vars(SEARCH) | {"unrolled": unrolled})
    architect = Architect(network, args)
    architect.gradients = distributed.averaged(architect.gradients)
    gradients = distributed.averaged(Gradients(network, criterion))
    for i, n in enumerate(sizes):
        train, valid = (mine(batch(n, 64, seed=10 * i + j)) for j in range(2))
        both = architect, optimizer
        search_step(train, valid, network.weights(), gradients, *both, args)
    arch = [tensor.detach() for tensor in network.arch_parameters()]
    distributed.check_equal(arch, "alphas and betas")
    statistics = [tensor for name, tensor in network.named_buffers() if "running" in name]
    weights = [weight.detach() for weight in network.weights()]
    return arch, weights, statistics


@pytest.mark.parametrize(
    ("processes", "synchronized", "unrolled", "sizes"),
    [(2, True, True, (6, 5)), (3, True, False, (6, 4)), (2, False, True, (4, 3))],
)
def test_a_search_is_that_of_one_process(processes, synchronized, unrolled, sizes):
    """Also with uneven shares: 5 images are 3 and 2. check_equal inside compares bits."""
    alone = search(synchronized, unrolled, sizes)
    for together in in_processes(processes, search, synchronized, unrolled, sizes):
        for one, other in zip(together, alone, strict=True):
            assert_equal_tensors(one, other, rtol=1e-7 if unrolled else 1e-9)


# --- training ---

SUBSET = genotypes.PCDARTS._replace(normal_concat=[4, 5], reduce_concat=[3, 5])


class Shares(list):
    """Global batches as a loader of this process."""

    device = CPU

    def __iter__(self):
        return (mine(batch) for batch in super().__iter__())


class Fixed(NetworkImageNet):
    """Its norms use their running statistics."""

    def train(self, mode=True):
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


def train(synchronized, genotype):
    torch.manual_seed(0)
    network = (NetworkImageNet if synchronized else Fixed)(4, 5, 3, False, genotype).double()
    if synchronized:
        network = distributed.synchronized(network, CPU)
    args = SimpleNamespace(
        auxiliary=False, amp=False, grad_clip=5.0, report_freq=1, device=None, gpu=None
    )
    model = distributed.wrap(network, CPU, args)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, 0.9, weight_decay=3e-5)
    batches = Shares(batch(n, 64, seed=n) for n in (6, 5))
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    figures = loops.train_epoch(batches, model, criterion, optimizer, args, RUN)
    tested = loops.evaluate(batches, distributed.for_evaluation(model), criterion, args, RUN.log)
    statistics = [tensor for name, tensor in network.named_buffers() if "running" in name]
    weights = [weight.detach() for weight in network.parameters()]
    figures = [torch.tensor(each[name]) for each in (figures, tested) for name in ("loss", "top1")]
    return weights, statistics, figures


@pytest.mark.parametrize(
    ("processes", "synchronized", "genotype"),
    [(2, True, genotypes.PCDARTS), (2, False, SUBSET), (3, True, SUBSET)],
    ids=["2 synchronized", "2 fixed", "3 synchronized"],
)
def test_a_training_is_that_of_one_process(processes, synchronized, genotype):
    alone = train(synchronized, genotype)
    for together in in_processes(processes, train, synchronized, genotype):
        for one, other, rtol in zip(together, alone, (1e-9, 1e-9, 1e-6), strict=True):
            assert_equal_tensors(one, other, rtol)  # percentages are float32


def test_one_process_on_a_cpu_goes_through_data_parallel():
    """nn.DataParallel without a GPU hands the batch through: names, figures, gradients."""
    torch.manual_seed(0)
    network = NetworkImageNet(4, 5, 3, False, genotypes.PCDARTS).double()
    model = nn.DataParallel(network)
    assert distributed.for_evaluation(model) is model
    x, y = batch(4, 64)
    network.drop_path_prob = 0.0
    torch.testing.assert_close(model(x)[0], network(x)[0])
    args = SimpleNamespace(auxiliary=False, amp=False, grad_clip=5.0, report_freq=1)
    before = network.classifier.weight.detach().clone()
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    loops.train_epoch(Shares([(x, y)]), model, nn.CrossEntropyLoss(), optimizer, args, RUN)
    assert not torch.equal(before, network.classifier.weight)
    other = NetworkImageNet(4, 5, 3, False, genotypes.PCDARTS).double()
    other.load_state_dict(model.state_dict())  # with module.


def test_several_gpus_of_one_process_are_data_parallel(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(nn, "DataParallel", lambda model: ["parallel", model])
    gpu, model = torch.device("cuda"), nn.Linear(1, 1)
    free = SimpleNamespace(device=None, gpu=None)
    assert distributed.wrap(model, gpu, free) == ["parallel", model]
    assert distributed.wrap(model, gpu, SimpleNamespace(device=None, gpu=0)) is model
    assert distributed.wrap(model, CPU, free) is model


# --- loaders and helpers ---


def read(root, shuffle, batch_size):
    files, _ = imagenet.load(root)
    files = files.transformed(imagenet.train_transform(16, True))
    loader = imagenet.Loader(files, batch_size, CPU, 0, shuffle=shuffle)
    return len(loader), [(x, y) for _ in range(2) for x, y in loader]


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("shuffle", [False, True])
def test_processes_share_the_batches_of_one(tmp_path, processes, shuffle):
    """13 images in batches of 4: the last has 1, which training leaves out and evaluation not."""
    fill(tmp_path / "imagenet" / "train", {"cat": 7, "dog": 6})
    fill(tmp_path / "imagenet" / "val", {"cat": 1, "dog": 1})
    _, alone = read(tmp_path, shuffle, 4)
    together = in_processes(processes, read, tmp_path, shuffle, 4)
    assert {length for length, _ in together} == {3 if shuffle else 4}
    shares = [[mine_of(batch, rank, processes) for batch in alone] for rank in range(processes)]
    for rank, (_, batches) in enumerate(together):
        expected = [share for share in shares[rank] if len(share[1])]
        if shuffle:
            expected = [s for i, s in enumerate(shares[rank]) if i % 4 < 3]
        assert len(batches) == len(expected)
        for (x, y), (a, b) in zip(batches, expected, strict=True):
            assert torch.equal(x, a) and torch.equal(y, b)


def mine_of(batch, rank, processes):
    return [tensor[rank::processes] for tensor in batch]


def helpers(root):
    rank = dist.get_rank()
    assert distributed.is_main() == (rank == 0)
    assert distributed.gather(f"process {rank}") == ["process 0", "process 1"]
    assert distributed.on_main(lambda: f"made by {rank}") == "made by 0"
    assert distributed.total([rank + 1, torch.tensor(2.5)], CPU) == [3.0, 5.0]
    a, b = distributed.summed([torch.full((2, 3), float(rank)), torch.tensor([1.0])])
    assert torch.equal(a, torch.full((2, 3), 1.0)) and b.item() == 2
    assert distributed.share(3 - rank, CPU).item() == pytest.approx((3 - rank) * 2 / 5)
    tensor = torch.tensor([float(rank)])
    distributed.broadcast([tensor])
    assert tensor.item() == 0
    distributed.check_equal([torch.ones(3), torch.zeros(2)], "alphas")
    with pytest.raises(UserError, match=r"alphas are not the same in processes 0 and 1.*--resume"):
        distributed.check_equal([torch.ones(3) + 1e-7 * rank], "alphas")
    files, _ = imagenet.load(root)
    with pytest.raises(UserError, match="--batch_size 2"):
        imagenet.Loader(files, 1, CPU, 0)
    return True


def test_helpers(tmp_path):
    fill(tmp_path / "imagenet" / "train", {"cat": 1, "dog": 1})
    fill(tmp_path / "imagenet" / "val", {"cat": 1, "dog": 1})
    assert in_processes(2, helpers, tmp_path) == [True, True]


def test_helpers_of_a_process_alone():
    assert distributed.is_main() and distributed.world_size() == 1
    assert distributed.gather(3) == [3] and distributed.on_main(lambda: 4) == 4
    assert distributed.total([1, 2.5], CPU) == [1, 2.5]
    assert distributed.share(3, CPU) == 1
    distributed.check_equal([torch.ones(1)], "alphas")


def test_each_gpu_of_data_parallel_is_measured_with_its_own_images(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    gpu, free, chosen = (
        torch.device("cuda"),
        *(SimpleNamespace(device=None, gpu=g) for g in (None, 1)),
    )
    shares = [
        distributed.on_one_device(8, *how) for how in ((gpu, free), (gpu, chosen), (CPU, free))
    ]
    assert shares == [3, 8, 8]


def scored(images):
    """How many images an evaluation in batches of 4 counts."""
    noise = data.Images(torch.zeros(images, 8, 8, 3, dtype=torch.uint8), torch.arange(images) % 2)
    about = SimpleNamespace(mean=(0.5,) * 3, std=(0.5,) * 3, flip=False)
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    loader = data.Batches(noise, about, 4, CPU)
    figures = loops.evaluate(
        loader, network, nn.CrossEntropyLoss(), SimpleNamespace(report_freq=1), RUN.log
    )
    assert figures["loss"] < 100
    return figures["images"]


def test_an_evaluation_counts_each_image_once():
    assert in_processes(3, scored, 9) == [9, 9, 9]

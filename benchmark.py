"""Speed and memory, side by side with the network edge by edge and the loops as released.

    python benchmark.py supernet   # forward + backward of the search network, bytes kept, calls
    python benchmark.py search     # whole search steps, first and second order, loaders included
    python benchmark.py train      # steps of the 20-cell network
    python benchmark.py data       # images per second of the loaders
    python benchmark.py files      # JPEG files read and augmented per second and core
    python benchmark.py cost       # time and memory against K, channels and batch
    python benchmark.py all

All sides run in one process, in turns; a row is the median of --repeats runs, with the fastest
and the slowest. Prints Markdown and writes the same figures to --json. The other side is
the paper's form of the supernet, Network(fused=False). What was measured stands in BENCHMARKS.md.
"""

import json
import os
import statistics
import tempfile
import time
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import CIFAR10

import fused
import genotypes
import utils
from architect import Architect, search_step
from harness import costs, data, flags, imagefiles, imagenet, report, script
from model import NetworkCIFAR
from model_search import Network

IMAGES, EPOCHS, FROZEN = 25_000, 50, 15  # of the published CIFAR-10 search: half, epochs, --begin
CRITERION = nn.CrossEntropyLoss()
ORDERS = {"alphas and betas frozen": None, "first order": False, "second order": True}


def get_args():
    parser = flags.Parser(__doc__)
    add = parser.add_argument
    add("what", nargs="?", default="all", choices=[*TABLES, "all"], help="which of the tables")
    add("--batch_size", type=flags.count, help="of a step; None: 256 on a GPU, 64 on a CPU")
    add("--repeats", type=flags.count, default=5, help="runs of each side, after one to warm up")
    add("--init_channels", type=flags.count, default=16, help="channels C of the supernet")
    add("--layers", type=flags.depth, default=8, help="cells of the supernet")
    add("--images", metavar="DIR", help="of files: folder of classes; None: made for it, 500 x 375")
    add("--json", default="benchmark.json", help="file for the figures")
    add("--gpu", type=flags.natural, default=0, help="which GPU, where there is one")
    add("--device", help="cpu, cuda, cuda:1 or mps instead of --gpu")
    return parser.parse_args()


def main(args):
    args.device = flags.choose_device(args)
    args.batch_size = args.batch_size or (256 if args.device.type == "cuda" else 64)
    machine = {
        "device": hardware(args.device), "torch": torch.__version__,
        "threads": torch.get_num_threads(), "batch_size": args.batch_size,
        "repeats": args.repeats, "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    results, path = {"machine": machine}, Path(args.json)
    place = path if path.exists() else path.absolute().parent
    if path.is_dir() or not os.access(place, os.W_OK):  # told before measuring
        raise utils.UserError(f"--json {path} cannot be written: name another file")
    for name in TABLES if args.what == "all" else [args.what]:
        utils.set_seed(0)
        results[name] = TABLES[name](args)
        print(f"\n## {name}\n\n{report.markdown(results[name])}", flush=True)
        path.write_text(json.dumps(results, indent=2) + "\n")


def supernet(args):
    """Forward + backward: seconds, megabytes kept for backward, aten calls; peak of a GPU."""
    plain, ours, again = supernets(args)
    runs = {
        "plain, float32": (plain, False), "ours, float32": (ours, False),
        "ours, float32, --recompute": (again, False),
        "plain, bfloat16": (plain, True), "ours, bfloat16 (--amp)": (ours, True),
    }  # fmt: skip
    x, y = batch(args, args.batch_size)
    steps = {name: forward_backward(*run, x, y) for name, run in runs.items()}
    times = in_turns(steps, args)
    rows = []
    for name, (network, amp) in runs.items():
        reference = times["plain, bfloat16" if amp else "plain, float32"]
        figures = row(name, times[name], reference)
        figures["MB kept per image"] = kept_per_image(network, amp, x, y)
        figures["aten calls"] = costs.aten_calls(steps[name]).total()
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(args.device)
            steps[name]()
            figures["peak memory, MiB"] = costs.peak_memory(args.device)
        rows.append(figures)
    return rows


def search(args):
    """Whole search steps, with their loaders: the released way against ours."""
    plain, ours, _ = supernets(args)
    images = random_images(10 * args.batch_size)
    mine = [our_batches(args, images) for _ in range(2)]
    ways = {"released way": (plain, *released_batches(args, images)), "ours": (ours, *mine)}
    if args.device.type == "cuda":
        ways["ours, bfloat16"] = ways["ours"]
    steps = {}
    for way, sides in ways.items():
        how = {"released": way == "released way", "amp": "bfloat16" in way}
        steps |= {(way, order): searching_step(*sides, ORDERS[order], **how) for order in ORDERS}
    times = in_turns(steps, args)
    rows = []
    for (way, order), seconds in times.items():
        figures = row(f"{way}, {order}", seconds, times["released way", order], args.batch_size)
        frozen = statistics.median(times[way, "alphas and betas frozen"])
        whole = FROZEN * frozen + (EPOCHS - FROZEN) * figures["median, s"]
        minutes = whole * IMAGES / args.batch_size / 60
        figures["whole search, minutes"] = minutes if "order" in order else None
        if args.device.type == "cuda":  # all ways keep theirs at once: memory may not suffice
            figures["CUDA graphs"] = steps[way, order].graphs()
        rows.append(figures)
    return rows


def train(args):
    """Steps of the discrete network: in NCHW against ours, channels_last."""
    size = args.batch_size if args.device.type == "cuda" else max(1, args.batch_size // 4)
    plain, ours = (NetworkCIFAR(36, 10, 20, False, genotypes.PCDARTS) for _ in range(2))
    plain.layout, ours.layout = torch.contiguous_format, torch.channels_last
    x, y = batch(args, size)
    steps = {}
    for name, network in {"plain": plain, "ours": ours}.items():
        steps[name] = training_step(network.to(args.device), False, x, y)
        steps[f"{name}, bfloat16"] = training_step(network, True, x, y)
    times = in_turns(steps, args)
    return [
        row(f"{name}, batch {size}", seconds, times[name.replace("ours", "plain")], size)
        for name, seconds in times.items()
    ]


def loaders(args):
    """Batches of random images: torchvision transforms in two workers against data.Batches."""
    images = random_images(10 * args.batch_size)
    steady, fresh = released_batches(args, images)
    mine = our_batches(args, images)
    counts = {  # batches in a run: many more than the workers have ready when it begins
        "torchvision, 2 workers": (steady, 40),
        "torchvision, a fresh iterator each step, as released": (fresh, 4),
        "ours, on the device": (mine, 40),
    }
    steps = {name: partial(take, *of) for name, of in counts.items()}
    times = in_turns(steps, args)
    times = {name: [t / counts[name][1] for t in seconds] for name, seconds in times.items()}
    reference = times["torchvision, 2 workers"]
    return [row(name, seconds, reference, args.batch_size) for name, seconds in times.items()]


def files(args):
    """Reading image files: what one core does, then imagenet.Loader with a worker on each core."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(args.images or photos(made, 256))
        if not folder.is_dir():
            raise utils.UserError(f"--images {folder}: there is no such folder of classes")
        images = imagenet.read_files(folder, imagefiles.class_names(folder))
        n, workers = min(64, len(images)), imagenet.cores()
        transforms = {
            "decode": lambda image: image,
            "decode, crop, flip (search)": imagenet.train_transform(224, False),
            "decode, crop, flip, colour jitter (training)": imagenet.train_transform(224, True),
            "decode, resize, centre crop (validation)": imagenet.test_transform(224),
        }  # fmt: skip
        parts = {name: images.transformed(transform) for name, transform in transforms.items()}
        steps = {name: lambda p=part: [p[i, i] for i in range(n)] for name, part in parts.items()}
        loader = imagenet.Loader(  # of whole epochs, in which every worker has some eight batches
            parts["decode, crop, flip, colour jitter (training)"],
            max(1, len(images) // (8 * workers)), args.device, workers, shuffle=True,
        )  # fmt: skip
        all_cores = f"imagenet.Loader, {workers} workers (training)"
        steps[all_cores] = partial(take, loader.forever(), len(loader))
        times = in_turns(steps, args)
    rows = []
    for name, seconds in times.items():
        count = len(images) if name == all_cores else n
        rate = count / statistics.median(seconds)
        rows.append({"step": name, "ms per image": 1e3 / rate, "images per second": rate})
    return rows


def cost(args):
    """Time and memory of ours against K, channels and batch."""
    B = args.batch_size
    grid = [(k, 16, B) for k in (1, 2, 4, 8)] + [(4, 32, B)] + [(4, 16, 2 * B), (4, 16, 4 * B)]
    rows = []
    for k, C, size in grid:
        with utils.user_errors(ValueError):
            network = Network(C, 10, args.layers, CRITERION, k=k).to(args.device)
        run = network, False, *batch(args, size)
        [seconds] = in_turns({"ours": forward_backward(*run)}, args).values()
        median = statistics.median(seconds)
        speed = {"median, s": median, "ms per image": median / size * 1e3}
        memory = {"MB kept per image": kept_per_image(*run)}
        rows.append({"K": k, "C": C, "batch": size, **speed, **memory})
    return rows


TABLES = {
    "supernet": supernet, "search": search, "train": train, "data": loaders, "files": files,
    "cost": cost,
}  # fmt: skip


def supernets(args):
    """The plain supernet, ours, and ours with recompute, of the same weights, on the device."""
    make = partial(Network, args.init_channels, 10, args.layers, CRITERION)
    with utils.user_errors(ValueError):
        networks = make(fused=False), make(), make(recompute=True)
    for network in networks:
        network.load_state_dict(networks[0].state_dict())
    return [network.to(args.device) for network in networks]


def loss_of(network, amp, x, y):
    def loss():
        with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
            output = network(x)
            return CRITERION(output[0] if isinstance(output, tuple) else output, y)

    return loss


def forward_backward(network, amp, x, y):
    """A function that takes the gradients of the loss in weights, alphas and betas."""
    loss, learning = loss_of(network, amp, x, y), [*network.weights(), *network.arch_parameters()]
    return lambda: torch.autograd.grad(loss(), learning)


def kept_per_image(network, amp, x, y):
    """Megabytes kept for the backward pass."""
    return costs.bytes_kept(loss_of(network, amp, x, y), network.parameters()) / len(x) / 1e6


def training_step(network, amp, x, y):
    loss = loss_of(network, amp, x, y)
    optimizer = torch.optim.SGD(network.parameters(), 0.025, momentum=0.9, weight_decay=3e-4)

    def step():
        optimizer.zero_grad()
        loss().backward()
        nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()

    return step


def searching_step(network, train, valid, unrolled, released=False, amp=False):
    """A function that takes a step of the published search, architect.search_step.

    train, valid: iterators of (x, y). unrolled: None for the weights only, as while alphas and
    betas are frozen. released: with all gradients in both halves of the step.
    """
    args = SimpleNamespace(
        momentum=0.9, weight_decay=3e-4, arch_learning_rate=6e-4, arch_weight_decay=1e-3,
        grad_clip=5.0, amp=amp, no_cuda_graph=released, unrolled=unrolled,
    )  # fmt: skip
    architect, weights = Architect(network, args), network.weights()
    optimizer = torch.optim.SGD(weights, 0.1, args.momentum, weight_decay=args.weight_decay)
    gradients = fused.Gradients(network, CRITERION, amp)
    if released:
        gradients = AllGradients(network, CRITERION)
        if not unrolled:  # the second order takes only those that it needs, as released
            architect.gradients = AllGradients(network)

    def step():
        held_out = None if unrolled is None else next(valid)
        search_step(next(train), held_out, weights, gradients, architect, optimizer, args)

    def graphs():
        both = gradients, architect.gradients
        reasons = [each.reason for each in both if each.reason is not None]
        return reasons[0] if reasons else "yes" if any(each.captured for each in both) else "no"

    step.graphs = graphs
    return step


class AllGradients(fused.Gradients):
    """Computes those of weights, alphas and betas, whichever are wanted; no CUDA graph."""

    def __call__(self, wanted, input, target):
        everything = [*self.model.weights(), *self.model.arch_parameters()]
        loss, logits, values = self._compute(everything, input, target)
        found = {id(tensor): value for tensor, value in zip(everything, values, strict=True)}
        return loss, logits, [found[id(tensor)] for tensor in wanted]


class CIFARLike(CIFAR10):
    """Torchvision's CIFAR10 of other images, through the transforms of the released code."""

    def __init__(self, images):
        self.data, self.targets = images.images.numpy(), images.labels.tolist()
        self.transform, _ = utils._data_transforms_cifar10(SimpleNamespace(cutout=False))
        self.target_transform = None


def released_batches(args, images):
    """Batches without end: of one iterator of a loader with two workers, and of a new one each."""
    how = dict(shuffle=True, num_workers=2, drop_last=True)
    loader = DataLoader(CIFARLike(images), args.batch_size, **how)
    steady, fresh = chain.from_iterable(repeat(loader)), (next(iter(new)) for new in repeat(loader))
    return [([t.to(args.device) for t in pair] for pair in pairs) for pairs in (steady, fresh)]


def our_batches(args, images):
    mean, std = data.STATISTICS["cifar10"]
    dataset = SimpleNamespace(mean=mean, std=std, flip=True)
    how = dict(augment=True, shuffle=True)
    return data.Batches(images, dataset, args.batch_size, args.device, **how).forever()


def random_images(n):
    return data.Images(torch.randint(256, (n, 32, 32, 3)).byte(), torch.randint(10, (n,)))


def batch(args, n):
    x = torch.randn(n, 3, 32, 32, device=args.device)
    return x, torch.randint(10, (n,), device=args.device)


def photos(folder, n):
    """n JPEG files of 500 x 375 in two classes, of 75 KB."""
    draw = np.random.default_rng(0)
    for i in range(n):
        path = Path(folder, "ab"[i % 2])
        path.mkdir(exist_ok=True)
        coarse = Image.fromarray(draw.integers(0, 256, (75, 100, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC)).astype(int)
        pixels = (pixels + draw.integers(-12, 13, pixels.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(path / f"{i}.jpg", quality=85)
    return folder


def take(iterator, n):
    for _ in range(n):
        next(iterator)


def in_turns(steps, args):
    """Seconds of args.repeats runs of each of `steps`, a dict, that alternate."""
    graphs = args.device.type == "cuda"
    for _ in range(1 + graphs * fused.Gradients.WARM_UP):
        for step in steps.values():
            step()
    seconds = {name: [] for name in steps}
    for _ in range(args.repeats):
        for name, step in steps.items():
            seconds[name].append(costs.seconds(step, args.device))
    return seconds


def hardware(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return device.type


def row(side, seconds, reference, images=None):
    """A row of a table: times, against those of the `reference`; images: in a step."""
    median = statistics.median(seconds)
    times = {
        "side": side, "median, s": median, "fastest, s": min(seconds), "slowest, s": max(seconds),
        "times as fast": statistics.median(reference) / median,
    }  # fmt: skip
    return times if images is None else times | {"images per second": images / median}


if __name__ == "__main__":
    script.run(main, get_args)

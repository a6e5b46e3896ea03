"""Speed and memory, side by side with the network edge by edge and the loops as released.

    python benchmark.py supernet   # forward + backward of the search network, bytes kept, calls
    python benchmark.py search     # whole search steps, first and second order, loaders included
    python benchmark.py train      # steps of the 20-cell network
    python benchmark.py data       # images per second of the loaders
    python benchmark.py files      # JPEG files read and augmented per second and core
    python benchmark.py cost       # time and memory against K, channels and batch
    python benchmark.py all

Both sides run in one process, in turns; a row is the median of --repeats runs, with the fastest
and the slowest. Prints Markdown and writes the same figures to --json. The other side is
the paper's form of the supernet, Network(fused=False). What was measured stands in BENCHMARKS.md.
"""

import json
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torchvision.transforms as T
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

import fused
import genotypes
import utils
from architect import Architect
from harness import costs, data, flags, imagenet, loops, script
from model import NetworkCIFAR
from model_search import Network

IMAGES, EPOCHS, FROZEN = 25_000, 50, 15  # of the published CIFAR-10 search: half, epochs, --begin
CRITERION = nn.CrossEntropyLoss()
SETTINGS = SimpleNamespace(  # of the published search
    momentum=0.9, weight_decay=3e-4, arch_learning_rate=6e-4, arch_weight_decay=1e-3,
    learning_rate=0.1, grad_clip=5.0,
)  # fmt: skip


def get_args():
    parser = flags.Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    kinds = ["supernet", "search", "train", "data", "files", "cost", "all"]
    add("what", nargs="?", default="all", choices=kinds, help="which of the tables")
    add(
        "--batch_size",
        type=flags.count,
        help="images in a step; None: 256 on a GPU, 64 on a CPU",
    )
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
    tables = {"supernet": supernet, "search": search, "train": train}
    tables |= {"data": loaders, "files": files, "cost": cost}
    machine = {
        "device": hardware(args.device), "torch": torch.__version__,
        "threads": torch.get_num_threads(), "batch_size": args.batch_size,
        "repeats": args.repeats, "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    results = {"machine": machine}
    try:  # before the measuring, not after it
        new = not Path(args.json).exists()
        Path(args.json).touch()
        if new:
            Path(args.json).unlink()
    except OSError as error:
        raise utils.UserError(f"--json {args.json}: {error.strerror}; name another file") from None
    for name in tables if args.what == "all" else [args.what]:
        utils.set_seed(0)
        results[name] = tables[name](args)
        print(f"\n## {name}\n\n{markdown(results[name])}", flush=True)
    Path(args.json).write_text(json.dumps(results, indent=2) + "\n")


def supernet(args):
    """Forward + backward: seconds, bytes kept for backward, aten calls, peak memory, the floor."""
    old, new, again = sides(args, recompute=(False, True))
    x, y = batch(args, args.batch_size)
    runs = {
        "plain, float32": (old, False), "ours, float32": (new, False),
        "ours, float32, --recompute": (again, False),
        "plain, bfloat16": (old, True), "ours, bfloat16 (--amp)": (new, True),
    }  # fmt: skip
    steps = {name: forward_backward(*run, x, y) for name, run in runs.items()}
    times = in_turns(steps, args)
    few = x[:4], y[:4]  # enough for the counts
    bandwidth = copy_bandwidth(args.device)
    rows = []
    for name, (network, amp) in runs.items():
        step = forward_backward(network, amp, *few)
        loss = loss_of(network, amp, x, y)
        moved = costs.bytes_moved(step) / len(few[0]) * len(x)
        rows.append(
            {
                "side": name,
                **timing(times[name], times[f"plain, {name.split(', ')[1].split()[0]}"]),
                "MB kept per image": costs.bytes_kept(loss, network.parameters()) / len(x) / 1e6,
                "aten calls": costs.aten_calls(step).total(),
                "peak memory, MiB": peak(args, network, amp),
                "floor: bytes moved / copy speed, s": moved / bandwidth,
            }
        )
    return rows


def search(args):
    """Whole search steps, with their loaders: the released way against ours."""
    old, new = sides(args)
    rows = []
    for amp in (False, True) if args.device.type == "cuda" else (False,):
        for unrolled in (False, True):
            steps = {
                "released way": ReleasedSearch(args, old, unrolled).step,
                "ours": OurSearch(args, new, unrolled, amp).step,
                "ours, alphas and betas frozen": OurSearch(args, new, None, amp).step,
            }
            times = in_turns(steps, args, warm_up=1 + fused.Gradients.WARM_UP)
            frozen = statistics.median(times["ours, alphas and betas frozen"])
            order = "second order" if unrolled else "first order"
            for name, seconds in times.items():
                row = {"side": f"{name}, {order}" + ", bfloat16" * (amp and "ours" in name)}
                row |= timing(seconds, times["released way"])
                row["images per second"] = args.batch_size / row["median, s"]
                before = row["median, s"] / 2 if "released" in name else frozen
                whole = FROZEN * before + (EPOCHS - FROZEN) * row["median, s"]
                row["whole search, minutes"] = whole * IMAGES / args.batch_size / 60
                if "frozen" in name:
                    row["whole search, minutes"] = None
                rows.append(row)
    return rows


def train(args):
    """Steps of the discrete network: plain (a ReLU in each operation, NCHW) against ours."""
    size = args.batch_size if args.device.type == "cuda" else max(1, args.batch_size // 4)
    new = NetworkCIFAR(36, 10, 20, False, genotypes.PCDARTS)
    old = NetworkCIFAR(36, 10, 20, False, genotypes.PCDARTS)
    old.layout = torch.contiguous_format
    old.load_state_dict(new.state_dict())
    x, y = batch(args, size)
    steps = {}
    for name, network in {"plain": old, "ours": new}.items():
        steps[name] = training_step(network.to(args.device), False, x, y)
        steps[f"{name}, bfloat16"] = training_step(network, True, x, y)
    times = in_turns(steps, args)
    return [
        {
            "side": f"{name}, batch {size}",
            **timing(seconds, times["plain" + ", bfloat16" * ("bfloat16" in name)]),
            "images per second": size / statistics.median(seconds),
        }
        for name, seconds in times.items()
    ]


def loaders(args):
    """Batches of random images: torchvision transforms in two workers against data.Batches."""
    images = random_images(10 * args.batch_size)
    mine = iter(our_batches(args, images).forever())
    theirs = forever(torchvision_loader(images, args.batch_size))
    fresh = torchvision_loader(images, args.batch_size)
    counts = {  # batches in a run: many more than the workers have ready when it begins
        "torchvision, 2 workers": (40, lambda: next(theirs)),
        "torchvision, a fresh iterator each step, as released": (4, lambda: next(iter(fresh))),
        "ours, on the device": (40, lambda: next(mine)),
    }
    steps = {
        name: lambda n=n, one=one: [one() for _ in range(n)] for name, (n, one) in counts.items()
    }
    times = in_turns(steps, args)
    times = {name: [t / counts[name][0] for t in seconds] for name, seconds in times.items()}
    return [
        {
            "side": name,
            **timing(seconds, times["torchvision, 2 workers"]),
            "images per second": args.batch_size / statistics.median(seconds),
        }
        for name, seconds in times.items()
    ]


def files(args):
    """Reading image files: what one core does, step by step, and imagenet.Loader with workers."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(args.images or _photos(made, 256))
        if not folder.is_dir():
            raise utils.UserError(f"--images {folder}: there is no such folder of classes")
        images = imagenet.read_files(folder, data.class_names(folder))
        n, workers = min(64, len(images)), len(os.sched_getaffinity(0))
        transforms = {
            "decode": lambda image: image,
            "decode, crop, flip (search)": imagenet.train_transform(224, False),
            "decode, crop, flip, colour jitter (training)": imagenet.train_transform(224, True),
            "decode, resize, centre crop (validation)": imagenet.test_transform(224),
        }  # fmt: skip
        steps = {}
        for name, transform in transforms.items():
            part = images.transformed(transform)
            steps[name] = lambda part=part: [part[i, i] for i in range(n)]
        crop = images.transformed(transforms["decode, crop, flip, colour jitter (training)"])
        loader = imagenet.Loader(crop, n // 2, args.device, workers, shuffle=True).forever()
        steps["imagenet.Loader"] = lambda: [next(loader) for _ in range(16)]  # 8 n images
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        times = in_turns(steps, args)
        torch.set_num_threads(threads)
    rows = []
    for name, seconds in times.items():
        whole = "Loader" in name
        median, cores = (
            statistics.median(seconds) / n / (8 if whole else 1),
            workers if whole else 1,
        )
        name += f", {workers} workers (training)" * whole
        row = {"step": name, "ms per image": 1e3 * median, "images per second": 1 / median}
        rows.append(row | {"per core": 1 / median / cores})
    return rows


def _photos(folder, n):
    """n JPEG files of 500 x 375 in two classes, about 100 KB each, as ImageNet's are."""
    draw = np.random.default_rng(0)
    for i in range(n):
        path = Path(folder, "ab"[i % 2])
        path.mkdir(exist_ok=True)
        coarse = Image.fromarray(draw.integers(0, 256, (75, 100, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC)).astype(int)
        pixels = (pixels + draw.integers(-12, 13, pixels.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(path / f"{i}.jpg", quality=85)
    return folder


def cost(args):
    """Time and memory of ours against K, channels and batch."""
    B = args.batch_size
    grid = [(k, 16, B) for k in (1, 2, 4, 8)] + [(4, 32, B)] + [(4, 16, 2 * B), (4, 16, 4 * B)]
    rows = []
    for k, C, size in grid:
        with utils.user_errors(ValueError):
            network = Network(C, 10, args.layers, CRITERION, k=k).to(args.device)
        x, y = batch(args, size)
        times = in_turns({"ours": forward_backward(network, False, x, y)}, args)["ours"]
        kept = costs.bytes_kept(loss_of(network, False, x, y), network.parameters()) / 1e6
        median = statistics.median(times)
        row = {
            "K": k,
            "C": C,
            "batch": size,
            "median, s": median,
            "ms per image": median / size * 1e3,
        }
        rows.append(row | {"MB kept per image": kept / size, "MB kept": kept})
    return rows


def sides(args, recompute=(False,)):
    """The plain supernet and ours, one for each of `recompute`, on the device."""
    make = dict(C=args.init_channels, num_classes=10, layers=args.layers, criterion=CRITERION)
    with utils.user_errors(ValueError):
        ours = [Network(**make, recompute=again) for again in recompute]
    old = Network(**make, fused=False)
    old.load_state_dict(ours[0].state_dict())
    return [network.to(args.device) for network in (old, *ours)]


def loss_of(network, amp, x, y):
    def loss():
        with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
            return CRITERION(logits(network(x)), y)

    return loss


def logits(output):
    return output[0] if isinstance(output, tuple) else output


def forward_backward(network, amp, x, y):
    loss = loss_of(network, amp, x, y)

    def step():
        network.zero_grad()
        for parameter in network.arch_parameters():
            parameter.grad = None
        loss().backward()

    return step


def training_step(network, amp, x, y):
    loss = loss_of(network, amp, x, y)
    optimizer = torch.optim.SGD(network.parameters(), 0.025, momentum=0.9, weight_decay=3e-4)

    def step():
        optimizer.zero_grad()
        loss().backward()
        nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()

    return step


class ReleasedSearch:
    """Search steps as released: all gradients in both, loaders with workers."""

    def __init__(self, args, network, unrolled):
        self.network, self.unrolled, self.device = network, unrolled, args.device
        images = random_images(10 * args.batch_size)
        self.train = forever(torchvision_loader(images, args.batch_size))
        self.valid = torchvision_loader(images, args.batch_size)
        self.weights, self.arch = list(network.parameters()), network.arch_parameters()
        self.optimizer, self.adam = optimizers(self.weights, self.arch)

    def step(self):
        x, y = (tensor.to(self.device) for tensor in next(self.train))
        valid = [tensor.to(self.device) for tensor in next(iter(self.valid))]
        self.adam.zero_grad()
        if self.unrolled:
            self._unrolled(x, y, *valid)
        else:
            self.network._loss(*valid).backward()
        self.adam.step()
        self.optimizer.zero_grad()
        self.network._loss(x, y).backward()
        nn.utils.clip_grad_norm_(self.weights, SETTINGS.grad_clip)
        self.optimizer.step()

    def _unrolled(self, x, y, x_valid, y_valid):
        eta = self.optimizer.param_groups[0]["lr"]
        w = [weight.detach().clone() for weight in self.weights]
        gradient = torch.autograd.grad(self.network._loss(x, y), self.weights)
        with torch.no_grad():
            for weight, g in zip(self.weights, gradient, strict=True):
                moment = self.optimizer.state[weight].get("momentum_buffer", torch.zeros_like(g))
                moment = SETTINGS.momentum * moment + g + SETTINGS.weight_decay * weight
                weight.sub_(eta * moment)
        self.optimizer.zero_grad()
        self.network._loss(x_valid, y_valid).backward()
        v = [weight.grad.clone() for weight in self.weights]
        R = 0.01 / torch.cat([g.flatten() for g in v]).norm()
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                for weight, value, g in zip(self.weights, w, v, strict=True):
                    weight.copy_(value + sign * R * g)
            sides.append(torch.autograd.grad(self.network._loss(x, y), self.arch))
        with torch.no_grad():
            for weight, value in zip(self.weights, w, strict=True):
                weight.copy_(value)
            for parameter, plus, minus in zip(self.arch, *sides, strict=True):
                parameter.grad -= eta * (plus - minus) / (2 * R)


class OurSearch:
    """Search steps of loops.search_epoch; unrolled=None: weights only, as while frozen."""

    def __init__(self, args, network, unrolled, amp):
        self.network, self.unrolled = network, unrolled
        images = random_images(10 * args.batch_size)
        self.train, self.valid = (our_batches(args, images).forever() for _ in range(2))
        self.weights = network.weights()
        self.optimizer, _ = optimizers(self.weights, network.arch_parameters())
        self.args = SimpleNamespace(**vars(SETTINGS), amp=amp, unrolled=unrolled)
        self.architect = Architect(network, self.args)
        self.gradients = fused.Gradients(network, CRITERION, amp)

    def step(self):
        valid = None if self.unrolled is None else next(self.valid)
        both = self.architect, self.optimizer
        loops.search_step(next(self.train), valid, self.weights, self.gradients, *both, self.args)


def optimizers(weights, arch):
    sgd = torch.optim.SGD(
        weights, SETTINGS.learning_rate, momentum=0.9, weight_decay=SETTINGS.weight_decay
    )
    adam = torch.optim.Adam(arch, SETTINGS.arch_learning_rate, (0.5, 0.999), weight_decay=1e-3)
    return sgd, adam


class CIFARLike(Dataset):
    """Images as torchvision's CIFAR10 gives them, through the transforms of the released code."""

    def __init__(self, images):
        self.images = images
        mean, std = data.STATISTICS["cifar10"]
        crop = [T.RandomCrop(32, padding=4), T.RandomHorizontalFlip()]
        self.transform = T.Compose([T.ToPILImage(), *crop, T.ToTensor(), T.Normalize(mean, std)])

    def __len__(self):
        return len(self.images.labels)

    def __getitem__(self, i):
        return self.transform(self.images.images[i].numpy()), int(self.images.labels[i])


def random_images(n):
    draw = np.random.default_rng(0)
    pixels = torch.from_numpy(draw.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8))
    return data.Images(pixels, torch.from_numpy(draw.integers(0, 10, n)))


def torchvision_loader(images, batch_size):
    return DataLoader(CIFARLike(images), batch_size, shuffle=True, num_workers=2, drop_last=True)


def our_batches(args, images):
    mean, std = data.STATISTICS["cifar10"]
    dataset = SimpleNamespace(mean=mean, std=std, flip=True)
    return data.Batches(images, dataset, args.batch_size, args.device, augment=True, shuffle=True)


def forever(loader):
    while True:
        yield from loader


def batch(args, n):
    x = torch.randn(n, 3, 32, 32, device=args.device)
    return x, torch.randint(10, (n,), device=args.device)


def in_turns(steps, args, warm_up=1):
    """Seconds of args.repeats runs of each of `steps`, a dict, that alternate; bfloat16 apart."""
    rounded = {name: step for name, step in steps.items() if "bfloat16" in name}
    if 0 < len(rounded) < len(steps):
        exact = {name: step for name, step in steps.items() if name not in rounded}
        times = in_turns(exact, args, warm_up) | in_turns(rounded, args, warm_up)
        return {name: times[name] for name in steps}
    seconds = {name: [] for name in steps}
    for _ in range(warm_up):
        for step in steps.values():
            step()
    for _ in range(args.repeats):
        for name, step in steps.items():
            wait(args.device)
            start = time.perf_counter()
            step()
            wait(args.device)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timing(seconds, reference):
    median = statistics.median(seconds)
    return {
        "median, s": median, "fastest, s": min(seconds), "slowest, s": max(seconds),
        "times as fast": statistics.median(reference) / median,
    }  # fmt: skip


def copy_bandwidth(device):
    """Bytes a second, read and written, of copies of 256 MiB."""
    source = torch.zeros(2**26, device=device)
    target = torch.ones_like(source)
    seconds = in_turns(
        {"": lambda: target.copy_(source)}, SimpleNamespace(device=device, repeats=5)
    )
    return 2 * source.nbytes / statistics.median(seconds[""])


def peak(args, network, amp):
    """Peak memory of one step in MiB: of the tensors on a GPU, else of a process of its own."""
    if args.device.type == "cuda":
        x, y = batch(args, args.batch_size)
        torch.cuda.reset_peak_memory_stats(args.device)
        forward_backward(network, amp, x, y)()
        return torch.cuda.max_memory_allocated(args.device) / 2**20
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        again = getattr(network, "_arguments", {}).get("recompute", False)
        which = (network.fused, again, amp)
        return pool.apply(
            _peak_of_process, (args.batch_size, args.init_channels, args.layers, *which)
        )


def _peak_of_process(batch_size, C, layers, ours, recompute, amp):
    args = SimpleNamespace(device=torch.device("cpu"), init_channels=C, layers=layers)
    x, y = batch(args, batch_size)
    network = sides(args, recompute=(recompute,))[ours]
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak, which a process inherits
        before = _resident_peak()
        forward_backward(network, amp, x, y)()
        return (_resident_peak() - before) / 2**10
    except OSError:
        return None


def _resident_peak():
    """The largest resident size of this process in KiB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def hardware(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return device.type


def markdown(rows):
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        lines.append("| " + " | ".join(_shown(row[name]) for name in names) + " |")
    return "\n".join(lines)


def _shown(value):
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    script.run(main, get_args)

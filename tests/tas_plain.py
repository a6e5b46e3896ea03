"""TAS's search pass as it is written in the paper: slow, and only to compare with.

Each convolution runs at full width on an input filled up with zeros, two norms read its first
channels, both results are averaged over channels to the wider width and added. It reads the
modules and parameters of a tas.SearchNetwork.

    python -m tests.tas_plain --depth 32 --batch_size 256

measures a forward and backward pass of both in turns, and of the convolutions alone, on one thread,
each in a process of its own.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch
from torch.nn import functional as F

import tas


def search(network, x, tau, sample):
    """What SearchNetwork.search returns, for a given draw (index, gumbel, gumbel_depth)."""
    logits = (network.width_attentions.log_softmax(1) + sample["gumbel"]) / tau
    weights = F.softmax(logits.gather(1, sample["index"]), dim=1)
    draws = list(zip(sample["index"].tolist(), weights, strict=True))
    stages = [1, 1 + network.n, 1 + 2 * network.n, 1 + 3 * network.n]
    if network.depth_attentions is not None:
        scores = (network.depth_attentions.log_softmax(1) + sample["gumbel_depth"]) / tau
        depth_weights = F.softmax(scores, dim=1)

    x = F.relu(conv_norms(network.layers[0], x, *draws[0]))
    for stage in range(3):
        maps = []
        for number in range(stages[stage], stages[stage + 1]):
            block = network.layers[number]
            draw_a, draw_b = draws[2 * number - 1], draws[2 * number]
            out = conv_norms(block.conv_b, F.relu(conv_norms(block.conv_a, x, *draw_a)), *draw_b)
            if block.downsample is not None:
                x = conv_norms(block.downsample, F.avg_pool2d(x, 2), *draw_b)
            x = F.relu(sum_of(x, out))
            maps.append(x)
        if network.depth_attentions is not None:
            chosen = [maps[count - 1] for count in depth_choices(network.n)]
            C = max(map.shape[1] for map in chosen)
            parts = zip(depth_weights[stage], chosen, strict=True)
            x = sum(weight * cwi(map, C) for weight, map in parts)
    return linear(network.classifier, x.mean((2, 3))), expected(network, x.shape[2] * 4)


def conv_norms(layer, x, index, weights):
    N, C, H, W = x.shape
    zeros = x.new_zeros(N, layer.conv.in_channels - C, H, W)
    y = layer.conv(torch.cat([x, zeros], dim=1))
    norms = [layer.BNs[i] for i in index]
    outs = [norm(y[:, : norm.num_features]) for norm in norms]
    wide = max(norm.num_features for norm in norms)
    return sum(weight * cwi(out, wide) for weight, out in zip(weights, outs, strict=True))


def cwi(x, C):
    """Adaptive average over channels; the fact that the matrices are held to."""
    return F.adaptive_avg_pool3d(x, (C, *x.shape[2:]))


def sum_of(x, y):
    narrow, wide = sorted([x, y], key=lambda map: map.shape[1])
    C = narrow.shape[1]
    return torch.cat([wide[:, :C] + narrow, wide[:, C:]], dim=1)


def linear(classifier, features):
    return F.linear(features, classifier.weight[:, : features.shape[1]], classifier.bias)


def depth_choices(n):
    return {1: [1], 2: [1, 2], 3: [1, 2, 3]}.get(n) or sorted({*range(1, n + 1, 2), n})


def expected(network, size):
    """Expected multiply-adds in millions, convolution by convolution."""
    probabilities = F.softmax(network.width_attentions, dim=1)
    C_full = [16] * (1 + 2 * network.n) + [32] * 2 * network.n + [64] * 2 * network.n
    C = [
        sum(p * int(full * tenth / 10) for p, tenth in zip(row, range(3, 11), strict=True))
        for row, full in zip(probabilities, C_full, strict=True)
    ]
    total = 27 * C[0] * size**2 + C[-1] * network.classifier.out_features
    for number in range(3 * network.n):
        stage, block = divmod(number, network.n)
        pixels = (size // 2**stage) ** 2
        C_in, C_a, C_b = C[2 * number : 2 * number + 3]
        count = (9 * C_in * C_a + 9 * C_a * C_b) * pixels
        if stage > 0 and block == 0:
            count = count + C_in * C_b * pixels
        if network.depth_attentions is not None:
            row = F.softmax(network.depth_attentions[stage], dim=0)
            choices = depth_choices(network.n)
            count = count * sum(p for p, c in zip(row, choices, strict=True) if c > block)
        total = total + count
    return total / 1e6


# --- side by side ---


def convolutions(network, x, index):
    """All convolutions at the widths of a draw, one after the other: no norm, no interpolation."""
    widths = network.choices.gather(1, index).amax(1).tolist()
    layers = [("", network.layers[0].conv, widths[0])]
    for block, a, b in zip(network.layers[1:], widths[1::2], widths[2::2], strict=True):
        layers += [("a", block.conv_a.conv, a), ("b", block.conv_b.conv, b)]
        if block.downsample is not None:
            layers[-2:-2] = [("shortcut", block.downsample.conv, b)]
    shortcut = None
    for what, conv, C in layers:
        weight = conv.weight[:C]
        if what == "shortcut":
            pooled = F.avg_pool2d(x, 2)
            shortcut = F.conv2d(pooled, weight[:, : x.shape[1]])
            continue
        x = F.conv2d(x, weight[:, : x.shape[1]], None, conv.stride, conv.padding)
        if what == "b" and shortcut is not None:
            x, shortcut = x + shortcut, None
    return x


def measure(form, depth, batch_size, size, seed):
    """Seconds on the clock and of the processor, and MiB, of "tas", "plain" or "convolutions"."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    network = tas.SearchNetwork(depth, 10)
    images = torch.randn(batch_size, 3, size, size).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch_size,))
    sample = {"index": torch.multinomial(torch.ones(depth - 1, 8), 2)}
    sample["gumbel"] = tas.draw.gumbel(torch.empty(depth - 1, 8))

    def step():
        if form == "convolutions":
            return convolutions(network, images, sample["index"]).mean().backward()
        pass_ = tas.SearchNetwork.search if form == "tas" else search
        logits, expected = pass_(network, images, 1.0, sample)
        (F.cross_entropy(logits, labels) + 2 * expected.log()).backward()

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step()  # the first is not counted
    begun = time.perf_counter(), time.process_time()
    step()
    seconds, processor = time.perf_counter() - begun[0], time.process_time() - begun[1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "processor": processor, "mib": (peak - before) / 1024}


def main():
    parser = argparse.ArgumentParser(description="TAS's search pass beside its plain form")
    add = parser.add_argument
    add("--depth", type=int, default=32, help="layers")
    add("--batch_size", type=int, default=256, help="images")
    add("--size", type=int, default=32, help="of an image, pixels")
    add("--repeats", type=int, default=3, help="draws, each measured in all forms")
    add("--form", help="measure this form once and print a line of JSON")
    add("--seed", type=int, default=0, help="of the draw")
    args = parser.parse_args()
    what = args.depth, args.batch_size, args.size
    if args.form:
        print(json.dumps(measure(args.form, *what, args.seed)))
        return
    found = {"plain": [], "tas": [], "convolutions": []}
    flags = zip(("--depth", "--batch_size", "--size"), what, strict=True)
    flags = [str(word) for pair in flags for word in pair]
    for seed in range(args.repeats):
        for form, each in found.items():
            command = [sys.executable, "-m", "tests.tas_plain", *flags]
            command += ["--form", form, "--seed", str(seed)]
            each.append(json.loads(subprocess.check_output(command)))
            figures = "{seconds:.2f} s, {processor:.2f} s of the processor, {mib:.0f} MiB"
            print(f"draw {seed}, {form}:", figures.format(**each[-1]), flush=True)
    columns = {form: {name: [row[name] for row in each] for name in each[0]}
               for form, each in found.items()}  # fmt: skip
    for form, each in columns.items():
        text = f"{form}: {statistics.median(each['mib']):.0f} MiB"
        for name in ("seconds", "processor"):
            pairs = zip(columns["plain"][name], each[name], strict=True)
            faster = statistics.median(plain / mine for plain, mine in pairs)
            low, middle, high = min(each[name]), statistics.median(each[name]), max(each[name])
            text += f"; {name} {middle:.2f} ({low:.2f} to {high:.2f}), plain's / {faster:.2f}"
        print(text)


if __name__ == "__main__":
    main()

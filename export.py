"""Write a trained network to ONNX and to torch.export, and check what was written.

    python export.py eval-EXP-...          # network.onnx and network.pt2 in the run's folder

Both take images (N, 3, H, W) of any N, normalized as in training, and give logits (N, classes): no
auxiliary head, drop path or batch statistics. Needs onnx, onnxscript and onnxruntime
(requirements-export.txt).
"""

import time
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

import genotypes
import utils
from harness import costs, files, flags, script
from model import build
from operations import OPS
from tas import found

TOLERANCE = 1e-4  # of logits, relative to the largest


def get_args():
    parser = flags.Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("run", help="folder of a training; its last weights are taken")
    add("--out", help="folder for the files; None: the run's own")
    add("--batch_size", type=flags.count, default=8, help="images for the check and the latency")
    return parser.parse_args()


class Logits(nn.Module):
    """A discrete network with one output."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x)[0]


def main(args):
    flags.need("export", ["onnx", "onnxscript", "onnxruntime"], "requirements-export.txt")
    folder = Path(args.run)
    network, size = load(folder)
    out = files.expanded(args.out or folder)
    images = torch.randn(args.batch_size, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = network(images)
    paths = out / "network.pt2", out / "network.onnx"
    try:
        out.mkdir(parents=True, exist_ok=True)
        write(network, size, *paths)
    except OSError as error:
        raise utils.UserError(f"cannot write to {out} ({error}): give another --out") from None
    runners = {"PyTorch eager": network, "torch.export": exported(paths[0]), "ONNX": onnx(paths[1])}
    with torch.no_grad():
        for name, runner in runners.items():
            for n in {1, args.batch_size}:
                off = (runner(images[:n]) - wanted[:n]).abs().max() / wanted.abs().max()
                if not off < TOLERANCE:
                    raise utils.UserError(f"{name} gives other logits, by {off:.1e}: do not use it")
            print(
                f"{name}: {latency(runner, images[:1]):.1f} ms an image alone, "
                f"{latency(runner, images) / len(images):.1f} ms of {len(images)} together"
            )
    for path in paths:
        print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB, logits agree to {TOLERANCE:g}")


def load(folder):
    """(the network of a run in evaluation, with one output, on the CPU; side of its images)."""
    about = files.read_args(folder)
    if about.get("script") == "train_tas":
        return found.load_trained(folder).eval(), found.load(str(folder)).size
    if about.get("script") not in ("train", "train_imagenet"):
        raise utils.UserError(f"{folder} is no run of train.py, train_imagenet.py or train_tas.py")
    args, classes = about["args"], about.get("classes", [])
    imagenet = about["script"] == "train_imagenet"
    stem = "imagenet" if imagenet else args.get("stem", "cifar")
    side = args.get("input_size") or (16 if args.get("set") == "digits" else 32)
    sizes = [args.get("init_channels"), args.get("classes") or len(classes), args.get("layers")]
    if not all(type(size) is int and size > 0 for size in (*sizes, side)):
        raise utils.UserError(f"{folder}/args.json is damaged, in init_channels, layers or sizes")
    path, auxiliary = folder / "weights.pt", args.get("auxiliary") is True
    with utils.user_errors(ValueError):  # a GenotypeError too
        network = build(genotypes.load(folder, OPS), *sizes, stem, auxiliary)
        costs.check_size(network.eval(), side)
    files.load_weights(network, files.load(path), path)
    network.auxiliary_head = None
    return Logits(network).eval(), side


def write(network, size, exported_path, onnx_path):
    """Both files; the number of images is left open."""
    images = torch.zeros(2, 3, size, size)
    shapes = {"x": {0: torch.export.Dim("images", min=1)}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporters, about themselves
        program = torch.export.export(network, (images,), dynamic_shapes=shapes)
        torch.export.save(program, exported_path)
        program = torch.onnx.export(
            network, (images,), dynamo=True, dynamic_shapes=shapes, input_names=["images"],
            output_names=["logits"], verbose=False,
        )  # fmt: skip
        program.save(onnx_path)


def exported(path):
    return torch.export.load(path).module()


def onnx(path):
    """The network in an ONNX file as a function of images, by onnxruntime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(
        np.asarray(session.run(["logits"], {"images": x.contiguous().numpy()})[0])
    )


def latency(run, images, repeats=5):
    """Median time in milliseconds."""
    times = []
    for _ in range(repeats + 1):  # the first warms up
        begun = time.perf_counter()
        run(images)
        times.append(time.perf_counter() - begun)
    return 1e3 * sorted(times[1:])[repeats // 2]


if __name__ == "__main__":
    script.run(main, get_args)

"""Write a trained network to ONNX and to torch.export, and check what was written.

    python export.py eval-EXP-...          # network.onnx and network.pt2 in the run's folder

Both take images (N, 3, H, W) of any N, normalized as in training, which the last line tells, and
give logits (N, classes), those of a run of train_reid.py embeddings (N, D): no auxiliary head, drop
path or batch statistics. Needs onnx, onnxscript and onnxruntime (requirements-export.txt).
"""

import io
import statistics
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

import genotypes
import utils
from harness import costs, data, files, flags, imagenet, script, trainings
from model import build
from operations import OPS
from reid import trained
from tas import found

TOLERANCE = 1e-4  # of logits, relative to the largest


def get_args():
    parser = flags.Parser(__doc__)
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
    network, size, gives = load(folder)
    out = files.expanded(args.out or folder)
    images = torch.randn(args.batch_size, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = network(images)
    paths = out / "network.pt2", out / "network.onnx"
    try:
        out.mkdir(parents=True, exist_ok=True)
        write(network, size, gives, *paths)
    except OSError as error:
        raise utils.UserError(f"cannot write to {out} ({error}): give another --out") from None
    runners = {"PyTorch eager": network, "torch.export": exported(paths[0]), "ONNX": onnx(paths[1])}
    with torch.no_grad():
        for name, runner in runners.items():
            for n in {1, args.batch_size}:
                off = (runner(images[:n]) - wanted[:n]).abs().max() / wanted.abs().max()
                if not off < TOLERANCE:
                    raise utils.UserError(
                        f"{name} gives other {gives}, by {off:.1e}: do not use it"
                    )
            print(
                f"{name}: {latency(runner, images[:1]):.1f} ms an image alone, "
                f"{latency(runner, images) / len(images):.1f} ms of {len(images)} together"
            )
    for path in paths:
        print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB, {gives} agree to {TOLERANCE:g}")
    print(f"images: RGB from 0 to 1 of {size[0]} x {size[1]} pixels, {normalization(folder)}")


def load(folder):
    """(the network of a run in evaluation, with one output, on the CPU; (height, width); its name).

    height, width: of its images. The name of the output: "logits" or "embeddings".
    """
    about = files.read_args(folder)
    if about.get("script") == "train_tas":
        side = found.load(str(folder)).size
        return found.load_trained(folder).eval(), (side, side), "logits"
    if about.get("script") == "train_reid":
        return *trained.load(folder), "embeddings"
    sizes = trainings.sizes(folder)
    if not sizes:
        raise utils.UserError(f"{folder} is no run of train.py or of another training")
    args, path = about["args"], folder / "weights.pt"
    stem = "imagenet" if about["script"] == "train_imagenet" else args.get("stem", "cifar")
    side = args.get("input_size") or data.default_side(args.get("set"))
    if type(side) is not int or side < 1:
        raise utils.UserError(f"{folder}/args.json is damaged, in input_size")
    with utils.user_errors(ValueError):  # a GenotypeError too
        network = build(genotypes.load(folder, OPS), stem=stem, **sizes)
        costs.check_size(network.eval(), side)
    files.load_weights(network, files.load(path), path)
    network.auxiliary_head = None
    return Logits(network).eval(), (side, side), "logits"


def normalization(folder):
    """In words, what the images of a run are normalized by."""
    about = files.read_args(folder)
    if about["script"] == "train_reid":
        about |= {"mean": imagenet.MEAN, "std": imagenet.STD}
    if "mean" not in about:
        return "normalized as in training"
    mean, std = (", ".join(f"{value:.4f}" for value in about[name]) for name in ("mean", "std"))
    return f"less ({mean}), divided by ({std})"


def write(network, size, gives, exported_path, onnx_path):
    """Both files; the number of images is left open."""
    images = torch.zeros(2, 3, *size)
    shapes = {"x": {0: torch.export.Dim("images", min=1)}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporters, about themselves
        program = torch.export.export(network, (images,), dynamic_shapes=shapes)
        content = io.BytesIO()
        torch.export.save(program, content)  # to a path its errors are no OSError
        files.write(exported_path, content.getvalue())
        program = torch.onnx.export(
            network, (images,), dynamo=True, dynamic_shapes=shapes, input_names=["images"],
            output_names=[gives], verbose=False,
        )  # fmt: skip
        program.save(onnx_path)


def exported(path):
    return torch.export.load(path).module()


def onnx(path):
    """The network in an ONNX file as a function of images, by onnxruntime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(
        np.asarray(session.run(None, {"images": x.contiguous().numpy()})[0])
    )


def latency(run, images):
    """Median time of five in milliseconds, on the CPU."""
    run(images)
    times = [costs.seconds(lambda: run(images), images.device) for _ in range(5)]
    return 1e3 * statistics.median(times)


if __name__ == "__main__":
    script.run(main, get_args)

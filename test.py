"""Score a trained discrete network on the test images: top-1, top-5, loss.

    python test.py --model_path eval-EXP-20260101-120000          # a run, after its last epoch
    python test.py --model_path eval-EXP-20260101-120000/checkpoint.pt
    python test.py --model_path weights.pt --arch PC_DARTS_cifar  # weights from elsewhere
    python test.py --model_path weights.pt --arch PC_DARTS_image --set imagenet --data DIR

Beside a run's weights lie its genotype and its flags: those given here count instead.
"""

from torch import nn

import genotypes
import utils
from harness import costs, data, distributed, files, flags, imagenet, loops, script
from model import build
from operations import OPS
from tas import found

PUBLISHED = "PCDARTS"  # the published script's default
# Flags of the run that made the weights: the defaults of this one.
INHERITED = ("data", "set", "input_size", "init_channels", "layers", "stem", "auxiliary")


def get_args():
    parser = flags.Parser(__doc__)
    flags.add_common_arguments(parser, batch_size=96, more_sets=", or imagenet")
    add = parser.add_argument
    add("--model_path", required=True, help="run folder, checkpoint or weights file")
    add(
        "--arch",
        help="name, genotype.json, run folder or text; None: beside the weights, else PCDARTS",
    )
    add("--init_channels", type=flags.count, default=36, help="channels C of the first cell")
    add("--layers", type=flags.depth, default=20, help="cells")
    flags.add_stem_argument(parser)
    add("--auxiliary", action="store_true", help="the weights have an auxiliary head")
    add("--workers", type=flags.natural, default=4, help="processes that read ImageNet's images")
    given = parser.parse_args()
    folder = files.run_folder(given.model_path)
    about = files.read_args(folder)
    check_script(about, given.model_path, folder)  # before its flags are read
    run = about.get("args", {})
    if about.get("script") == "train_imagenet":
        run |= {"set": "imagenet", "data": run.get("tmp_data_dir")}
    elif given.set == "imagenet":
        parser.set_defaults(init_channels=48, layers=14)
    run = {name: run[name] for name in INHERITED if run.get(name) is not None}
    # As text, so that argparse checks them as it checks a user's.
    parser.set_defaults(**{name: str(value) for name, value in run.items()})
    parser.set_defaults(auxiliary=run.get("auxiliary") is True)
    return parser.parse_args()


def check_script(about, path, folder):
    """UserError, with what to do, where the run is none of those that this script tests."""
    if str(about.get("script")).startswith("train_search"):
        trained_by = about["script"].replace("_search", "")
        hint = f"train what it found, python {trained_by}.py --arch {folder}"
        raise utils.UserError(f"{path} is of a search: {hint}")
    if about.get("script") == "train_reid":
        raise utils.UserError(f"{path} is of Auto-ReID: python train_reid.py --test {folder}")


def is_colour(value):
    numbers = isinstance(value, list) and all(isinstance(v, float) for v in value)
    return numbers and len(value) == 3


def main(args):
    folder, path = files.run_folder(args.model_path), files.weights_of(args.model_path)
    about = files.read_args(folder)
    state, network = files.load(path), None
    if about.get("script") == "train_tas":
        if args.arch is not None:
            raise utils.UserError(f"{path} is of a network of TAS, which is in its run: no --arch")
        network = found.load(str(folder)).network()
    device = distributed.alone(args)
    log = files.start_log()
    log.info(flags.describe(device))
    if network is None:
        of_run = (folder / "genotype.json").exists()
        if args.arch is None and not of_run:
            log.info(
                "no genotype.json lies beside %s: taking %s; else give --arch", path, PUBLISHED
            )
        with utils.user_errors(genotypes.GenotypeError):
            genotype = genotypes.load(args.arch or (folder if of_run else PUBLISHED), OPS)
    test, classes, size = test_images(args, about, device)
    if about.get("classes", classes) != classes:
        raise utils.UserError(f"{args.data} has other classes than {folder} learned: give its data")
    stem = "imagenet" if args.set == "imagenet" else args.stem
    outputs = about.get("args", {}).get("classes") or len(classes)
    if type(outputs) is not int or outputs < 1:
        raise utils.UserError(f"{folder}/args.json is damaged, in classes")
    with utils.user_errors(ValueError):
        model = network or build(
            genotype, args.init_channels, outputs, args.layers, stem, args.auxiliary
        )
        costs.check_size(model.eval(), size)
    files.load_weights(model, state, path)
    figures = loops.evaluate(test, model.to(device), nn.CrossEntropyLoss(), args, log)
    print(
        f"{path}: top-1 {figures['top1']:.2f} %, top-5 {figures['top5']:.2f} %, "
        f"loss {figures['loss']:.4f} on {figures['images']} test images"
    )


def test_images(args, about, device):
    """(loader, classes, side in pixels) of the test images, ImageNet's validation images."""
    if args.set == "imagenet":
        size, (_, images) = args.input_size or 224, imagenet.load(args.data)
        batch_size, transform = min(args.batch_size, len(images)), imagenet.test_transform(size)
        loader = imagenet.Loader(images.transformed(transform), batch_size, device, args.workers)
        return loader, images.classes, size
    dataset = data.load(args.set, args.data, args.input_size, args.mean, args.std)
    if "mean" in about:  # the network learned on images normalized so
        mean, std = about["mean"], about.get("std")
        if not (is_colour(mean) and is_colour(std) and min(std) > 0):
            raise utils.UserError("args.json is damaged: mean or std is no three numbers")
        dataset = dataset._replace(
            mean=dataset.mean if args.mean else mean, std=dataset.std if args.std else std
        )
    batch_size = min(args.batch_size, len(dataset.test.labels))
    loader = data.Batches(dataset.test, dataset, batch_size, device)
    return loader, dataset.classes, dataset.test.images.shape[1]


if __name__ == "__main__":
    script.run(main, get_args)

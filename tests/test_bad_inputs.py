"""Input that is wrong: every script ends with one line and exit code 2, and leaves nothing behind.

One table of commands, run in a folder that holds finished runs and data, good and broken.
"""

import ctypes
import importlib
import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from harness import costs, runs, script
from harness.script import _out_of_memory
from helpers import warm_python
from test_imagenet import fill

ROOT = Path(__file__).parents[1]
COSTS = {  # what these two run where they are run themselves
    "model.py": (costs.main_discrete, costs.get_args_discrete),
    "model_search.py": (costs.main_supernet, costs.get_args_supernet),
}
CELL = "reduce=[('skip_connect', 0), ('skip_connect', 1)], reduce_concat=[2])"


class Hostile:
    """Unpickled, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def genotype(*edges, concat="[2]"):
    return f"Genotype(normal={list(edges)}, normal_concat={concat}, {CELL}"


GOOD = genotype(("sep_conv_3x3", 0), ("skip_connect", 1))
OTHER = genotype(("sep_conv_3x3", 1), ("skip_connect", 0))  # with weights of the same shapes


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with finished runs (search, eval, eval_imagenet) and images, and broken copies."""
    place = tmp_path_factory.mktemp("place")

    def run(name, script, *flags):
        flags = [*flags, "--epochs", "2", "--layers", "3", "--save", name]
        subprocess.run([*warm_python(), ROOT / script, *flags], cwd=place, check=True)
        [folder] = place.glob(f"*-{name}-*")
        folder.rename(place / name)

    digits = "--set digits --input_size 8 --batch_size 300 --init_channels".split()
    run("search", "train_search.py", *digits, "8", "--begin", "1")
    run("eval", "train.py", *digits, "4", "--arch", GOOD)
    for part, n in (("train", 4), ("val", 2)):
        fill(place / "photos" / "imagenet" / part, {"cat": n, "dog": n})
    shutil.copytree(place / "photos", place / "one_broken")
    for path in (place / "one_broken" / "imagenet" / "train").rglob("*.*"):
        path.write_bytes(path.read_bytes()[:100])

    def images(name, change):
        folder = place / name
        for part in ("train", "test"):
            for kind in ("a", "b"):
                (folder / part / kind).mkdir(parents=True)
                for i in range(3):
                    colours = np.full((9, 9, 3), 40 * i, dtype=np.uint8)
                    Image.fromarray(colours).save(folder / part / kind / f"{i}.png")
        change(folder)

    images("no_test", lambda folder: shutil.rmtree(folder / "test"))
    images("one_class", lambda folder: shutil.rmtree(folder / "train" / "b"))
    images("more_classes", lambda folder: (folder / "test" / "c").mkdir())
    images("empty_class", lambda folder: [p.unlink() for p in (folder / "train/a").iterdir()])
    images("text_image", lambda folder: (folder / "train/a/0.png").write_text("no image"))
    images("cut_image", lambda folder: (folder / "test/b/1.png").write_bytes(b"\x89PNG\r\n\x1a\n"))
    images("two_images", lambda folder: [p.unlink() for p in folder.glob("train/*/[12].png")])
    images("looped", lambda folder: (folder / "train/a/up").symlink_to(folder))
    images(
        "two_loops",
        lambda folder: [
            (folder / f"train/{a}/{b}").symlink_to(folder / f"train/{b}") for a, b in ("ab", "ba")
        ],
    )
    images("pipe", lambda folder: os.mkfifo(folder / "train/a/4.png"))
    images("floats", lambda folder: Image.fromarray(np.ones((9, 9), np.float32)).save(
        folder / "train/b/4.tif"))  # fmt: skip
    images("fine", lambda folder: None)
    (place / "empty").mkdir()
    (place / "a_file").write_text("text")

    # Broken genotypes.
    (place / "cut.json").write_text('{"normal": [')
    (place / "list.json").write_text("[1, 2]")
    (place / "huge.json").write_text(" " * 1_000_001)
    (place / "half.json").write_text('{"normal": [], "reduce": []}')
    (place / "binary.txt").write_bytes(b"\xff\xfe\x00")

    # Weights.
    (place / "text.pt").write_text("no weights")
    torch.save({"x": torch.zeros(1)}, place / "other.pt")
    torch.save([1, 2], place / "list.pt")
    torch.save({1: torch.zeros(1)}, place / "number.pt")
    torch.save(Hostile(place / "hacked"), place / "hostile.pt")
    shutil.copy(place / "eval" / "args.json", place)

    # Broken run folders: to be resumed, so unfinished.
    def broken(name, change):
        folder = place / name
        shutil.copytree(place / "eval", folder)
        (folder / "weights.pt").unlink()
        change(folder)

    def arguments(**values):
        def change(folder):
            about = json.loads((folder / "args.json").read_text())
            for key, value in values.items():
                (about if key in about else about["args"])[key] = value
            (folder / "args.json").write_text(json.dumps(about))

        return change

    def checkpoint(function):
        def change(folder):
            for name in (runs.CHECKPOINT, runs.PREVIOUS):
                function(folder / name)

        return change

    def state(**values):
        def change(path):
            torch.save(torch.load(path, weights_only=True) | values, path)

        return checkpoint(change)

    broken("unfinished", lambda folder: None)
    broken("no_args", lambda folder: (folder / "args.json").unlink())
    broken("cut_args", lambda folder: (folder / "args.json").write_text('{"form'))
    broken("newer_args", arguments(format=99))
    broken("flag_gone", arguments(gone=1))
    broken("wrong_type", arguments(auxiliary="yes"))
    broken("wrong_value", arguments(layers="many"))
    broken("other_classes", arguments(classes=["a", "b"]))
    broken("other_images", arguments(images="0"))
    broken("no_choice", arguments(layout="round"))
    shutil.copytree(place / "search", place / "other_space")
    arguments(primitives=["none", "skip_connect"])(place / "other_space")
    broken("newer", state(format=99))
    broken("foreign", state(script="train_search"))
    broken("no_epoch", state(epoch=None))
    broken("late_epoch", state(epoch=3))
    broken("other_parts", state(model={}))
    broken("other_optimizer", state(optimizer={"state": 1}))
    broken("other_numbers", state(generators=[{}]))
    broken("a_list", checkpoint(lambda path: torch.save([1], path)))
    broken("text", checkpoint(lambda path: path.write_text("text")))
    broken("empty_files", checkpoint(lambda path: path.write_bytes(b"")))
    broken("cut", checkpoint(lambda path: path.write_bytes(path.read_bytes()[:1000])))
    broken("folders", checkpoint(lambda path: (path.unlink(), path.mkdir())))
    broken("hostile", checkpoint(lambda path: torch.save(Hostile(place / "hacked"), path)))
    broken("other_genotype", lambda folder: runs.genotypes.save(
        runs.genotypes.parse(OTHER), folder / "genotype.json"))  # fmt: skip
    broken("cut_metrics", lambda folder: (folder / "metrics.csv").write_text("epoch\nmany\n"))
    broken("cut_genotype", lambda folder: (folder / "genotype.json").write_text("{"))
    broken("log_is_a_folder", lambda folder: (
        (folder / "log.txt").unlink(), (folder / "log.txt").mkdir()))  # fmt: skip
    for name, change in (
        ("mean_of_one", arguments(mean=[1])),
        ("std_of_zero", arguments(std=[0.0] * 3)),
        ("args_a_list", arguments(args=[])),
        ("layers_a_list", arguments(layers=[1])),
        ("channels_a_float", arguments(init_channels=8.0)),
        ("odd_size", arguments(input_size=33)),
        ("no_stem", arguments(stem="tree")),
    ):
        broken(name, change)
    (place / "lonely").mkdir()
    shutil.copy(place / "eval" / "weights.pt", place / "lonely")
    return place


@pytest.fixture
def fail(place, monkeypatch, capsys):
    """Runs a script in this process in `place`; returns the one line that it ends with."""
    monkeypatch.chdir(place)

    def fail(name, *flags):
        before = set(place.rglob("*"))
        monkeypatch.setattr(sys, "argv", [name, *flags])
        parts = COSTS.get(name)
        if parts is None:
            module = importlib.import_module(name.removesuffix(".py"))
            parts = module.main, module.get_args
        begun = time.monotonic()
        with pytest.raises(SystemExit) as exit:
            script.run(*parts)
        assert time.monotonic() - begun < 120
        err = capsys.readouterr().err
        assert exit.value.code == 2
        assert err.count("\n") == 1 and err.startswith(f"{name}: error: ")
        assert "Traceback" not in err
        assert set(place.rglob("*")) == before
        assert script.unsaved_runs == [] or not any(map(Path.exists, script.unsaved_runs))
        return err

    return fail


SEARCH = "train_search.py --set digits"
SEARCH_FOLDER = "train_search.py --set folder --batch_size 2 --data"
TRAIN_FOLDER = "train.py --set folder --batch_size 2 --layers 3 --init_channels 4 --data"
PHOTOS = "--tmp_data_dir photos --batch_size 1 --workers 0"
SEARCH_IMAGENET, TRAIN_IMAGENET = (
    f"train_search_imagenet.py {PHOTOS}",
    f"train_imagenet.py {PHOTOS}",
)
TEST = "test.py --set digits --arch eval --model_path"

FLAGS = [  # of the wrong type or range, unknown, or against each other
    (f"{SEARCH} --epochs 0", "--epochs", "at least 1"),
    (f"{SEARCH} --epochs two", "--epochs", "two"),
    (f"{SEARCH} --epochs", "--epochs", "expected one argument"),
    (f"{SEARCH} --learning_rate nan", "--learning_rate", "nan"),
    (f"{SEARCH} --learning_rate 1e300", "--learning_rate", "1e300"),
    (f"{SEARCH} --learning_rate -0.1", "--learning_rate", "more than 0"),
    (f"{SEARCH} --weight_decay 1e400", "--weight_decay", "1e400"),
    (f"{SEARCH} --momentum 1.5", "--momentum", "at most 1"),
    (f"{SEARCH} --layers 99999999", "--layers", "at most 1000"),
    (f"{SEARCH} --layers 0", "--layers", "at least 1"),
    (f"{SEARCH} --layer 8", "--layer"),  # no abbreviations
    (f"{SEARCH} --laers 8", "--laers"),
    (f"{SEARCH} --seed 18446744073709551616", "--seed", "at most"),
    (f"{SEARCH} --seed -1", "--seed"),
    (f"{SEARCH} --init_channels 10", "10 / 4"),
    (f"{SEARCH} --init_channels 4", "4 / 4", "even"),
    (f"{SEARCH} --k 3", "16 / 3"),
    (f"{SEARCH} --k 0", "--k"),
    (f"{SEARCH} --batch_size 0", "--batch_size"),
    (f"{SEARCH} --batch_size 1000", "1000", "718", "half"),
    (f"{SEARCH} --train_portion 0", "train_portion"),
    (f"{SEARCH} --train_portion 1", "train_portion"),
    (f"{SEARCH} --input_size 18", "even"),
    (f"{SEARCH} --input_size 4", "input_size 4"),
    (f"{SEARCH} --set imagenet", "imagenet", "digits"),
    (f"{SEARCH} --save_every 0", "--save_every", "more than 0"),
    (f"{SEARCH} --save_every often", "--save_every"),
    (f"{SEARCH} --learning_rate_min 0.2", "--learning_rate_min 0.2", "--learning_rate 0.1"),
    (f"{SEARCH} --device cuda:0 --gpu 1", "--device cuda:0", "--gpu 1"),
    (f"{SEARCH} --device cuda:99", "cuda:99", "--device cpu"),
    (f"{SEARCH} --device cpu:3", "cpu:3"),
    (f"{SEARCH} --device tpu", "tpu", "cpu"),
    (f"{SEARCH} --gpu 99", "cuda:99"),
    (f"{SEARCH} --gpu -1", "--gpu"),
    ("train.py --set digits --auxiliary", "auxiliary", "32"),
    ("train.py --set digits --layers 0", "--layers"),
    ("train.py --set digits --drop_path_prob 2", "--drop_path_prob"),
    ("train.py --set digits --batch_size 5000", "5000", "1437"),
    (f"{SEARCH_IMAGENET} --batch_size 100", "100", "use --batch_size"),
    (f"{SEARCH_IMAGENET} --input_size 65", "even"),
    (f"{SEARCH_IMAGENET} --layers 0", "--layers"),
    (f"{SEARCH_IMAGENET} --learning_rate_min 1", "--learning_rate_min 1"),
    (f"{TRAIN_IMAGENET} --batch_size 100", "100", "use --batch_size"),
    (f"{TRAIN_IMAGENET} --input_size 65", "even"),
    (f"{TRAIN_IMAGENET} --layers 0", "--layers"),
    (f"{TRAIN_IMAGENET} --workers -1", "--workers"),
    (f"{TRAIN_IMAGENET} --set cifar10", "--set"),
    (f"{TRAIN_IMAGENET} --classes 1", "--classes 1", "2 class folders"),
    (f"{TRAIN_IMAGENET} --auxiliary --input_size 64", "auxiliary", "224"),
    (f"{TRAIN_IMAGENET} --lr_scheduler step", "step", "linear"),
    (f"{TRAIN_IMAGENET} --label_smooth 2", "--label_smooth"),
    ("test.py", "--model_path"),
    ("test.py --model_path eval --seed 1", "--seed"),
    ("test.py --model_path eval --layers 4", "cells.3"),
    ("test.py --model_path eval --init_channels 8", "size mismatch"),
    ("benchmark.py everything", "everything"),
    ("benchmark.py supernet --repeats 0", "--repeats"),
    ("benchmark.py supernet --layers 0", "--layers"),
    ("visualize.py", "what"),
    ("visualize.py PCDARTS --format jpg", "jpg", "svg"),
    ("visualize.py PCDARTS eval", "PCDARTS is no run folder"),
    ("visualize.py eval search --dot", "--dot"),
    ("visualize.py PCDARTS --animate", "--animate takes the folder of a search: give one"),
    (f"{SEARCH} --primitives ''", "unknown operation ''"),
    ("train.py --set digits --input_size 8 --cutout", "blanks the whole", "give 2 to 15"),
    ("train.py --set digits --cutout --cutout_length 1", "cuts nothing out"),
    (f"{SEARCH} --save new/folder/{'x' * 260}", "cannot be made"),
    (f"{SEARCH} --cutout_length 8", "--cutout_length does nothing without --cutout"),
    ("train.py --set digits --auxiliary_weight 0.3", "without --auxiliary"),
    ("train_tas.py --set digits --distillation 0.5", "--distillation", "without --teacher"),
    ("visualize.py PCDARTS --animate --dot", "--animate", "leave --dot out"),
    ("visualize.py PCDARTS DARTS --dot", "PCDARTS is no run folder"),
    ("visualize.py eval --animate", "--animate takes a search"),
    ("visualize.py eval search --animate", "--animate takes one run"),
    (f"{SEARCH} --report 0", "--report", "at least 1"),
    (f"{SEARCH} --primitives none,sep_conv_9x9", "sep_conv_9x9"),
    (f"{SEARCH} --primitives none", "--primitives"),
    (f"{SEARCH} --primitives none,none,skip_connect", "--primitives"),
    (f"{SEARCH} --sampling some", "some", "shuffle"),
    (f"{SEARCH} --eigenvalue 0", "--eigenvalue"),
    (f"{SEARCH} --max_skip -1", "--max_skip"),
    (f"{SEARCH} --mean 0.5", "--mean"),
    (f"{SEARCH} --mean a,b,c", "--mean"),
    (f"{SEARCH} --std 0,1,1", "--std"),
    (f"{SEARCH} --stem imagenet --input_size 8", "8 x 8", "--input_size 32"),
    (f"{SEARCH} --steps 0", "--steps"),
    ("train.py --set digits --stem imagenet --input_size 16", "16 x 16", "--input_size 32"),
    ("train.py --set digits --input_size 32 --auxiliary --batch_size 359", "a step of 1 image"),
    (f"{SEARCH} --stem imagenet --input_size 32 --batch_size 239", "a step of 1 image"),
    (f"{SEARCH} --stem imagenet --input_size 32 --batch_size 239 --plain", "a step of 1 image"),
    ("model.py --arch nowhere", "nowhere"),
    ("model.py --set digits", "digits"),
    ("model.py --layers 0", "--layers"),
    ("model.py --input_size 2", "2 x 2", "--input_size 4"),
    ("model.py --auxiliary --input_size 8", "auxiliary", "--input_size 32"),
    ("model_search.py --layers 0", "--layers"),
    ("model_search.py --steps 0", "--steps"),
    ("model_search.py --init_channels 3", "3 / 1", "even"),
    ("model_search.py --input_size 3", "3"),
    ("export.py", "run"),
    ("export.py eval --batch_size 0", "--batch_size"),
]
GENOTYPES = [
    (["PC_DARTS_cifer"], "PC_DARTS_cifer", "PC_DARTS_cifar"),
    (["nowhere/genotype.json"], "nowhere"),
    (["empty"], "empty", "is the search finished"),
    (["cut.json"], "cut.json", "no JSON object"),
    (["list.json"], "list.json", "no JSON object"),
    (["huge.json"], "huge.json", "1 MB"),
    (["half.json"], "half.json", "normal_concat"),
    (["binary.txt"], "binary.txt", "not text"),
    (["cut_genotype"], "cut_genotype", "no JSON object"),
    ([genotype(("sep_conv_9x9", 0), ("skip_connect", 1))], "sep_conv_9x9", "sep_conv_"),
    ([genotype(("sep_conv_3x3", 0), ("skip_connect", 2))], "normal[1]", "2"),
    ([genotype(("sep_conv_3x3", 0))], "1 edges"),
    ([genotype(("sep_conv_3x3", 0), ("skip_connect", 1), concat="[3]")], "normal_concat", "3"),
    ([genotype(("sep_conv_3x3", 0), ("skip_connect", 1), concat="[]")], "normal_concat"),
    (["Genotype(__import__('os').system('touch hacked'))"], "cannot read"),
    (["Genotype("], "cannot read"),
    ([""], "unknown architecture"),
]
PLACES = [  # folders and images
    (f"{SEARCH} --save ..", "--save"),
    (f"{SEARCH} --save ~nobody-of-this-name/x", "~nobody-of-this-name"),
    (f"{SEARCH} --save /proc/nothing/x", "/proc/nothing"),
    (f"{SEARCH} --save a_file/x", "a_file is a file"),
    (f"{SEARCH_IMAGENET} --save ''", "--save"),
    (f"{TRAIN_IMAGENET} --save ''", "--save"),
    (f"{SEARCH_FOLDER} nowhere", "nowhere"),
    (f"{SEARCH_FOLDER} a_file", "a_file"),
    (f"{SEARCH_FOLDER} empty", "no train"),
    (f"{SEARCH_FOLDER} text_image", "0.png"),
    (f"{TRAIN_FOLDER} no_test", "no test or val"),
    (f"{TRAIN_FOLDER} one_class", "1 class folders"),
    (f"{TRAIN_FOLDER} more_classes", "'c'"),
    (f"{TRAIN_FOLDER} empty_class", "train/a", "no images"),
    (f"{TRAIN_FOLDER} cut_image", "1.png"),
    (f"{TRAIN_FOLDER} looped", "train/a/up is a link to a folder that it lies in"),
    (f"{TRAIN_FOLDER} two_loops", "train/a/b/a is a link to a folder that it lies in"),
    (f"{TRAIN_FOLDER} pipe", "4.png is no intact image"),
    (f"{TRAIN_FOLDER} floats", "4.tif", "floating point"),
    (f"{TRAIN_FOLDER} two_images --batch_size 3", "batch_size 3"),
    (f"{TRAIN_FOLDER} fine --input_size 4", "input_size 4"),
    ("train_imagenet.py --tmp_data_dir nowhere", "nowhere", "--tmp_data_dir"),
    ("train_imagenet.py --tmp_data_dir empty", "empty", "imagenet/train"),
    ("train_search_imagenet.py --tmp_data_dir empty", "empty", "imagenet/train"),
    (f"{TRAIN_IMAGENET} --tmp_data_dir one_broken --batch_size 2", ".jpg is no intact image"),
    (f"{SEARCH_IMAGENET} --tmp_data_dir one_broken --batch_size 2", ".jpg is no intact image"),
    (f"{SEARCH_IMAGENET} --split nowhere", "--split nowhere"),
    (f"{SEARCH_IMAGENET} --split empty", "split_train.txt"),
    ("benchmark.py files --images nowhere", "nowhere"),
    ("visualize.py nowhere", "nowhere"),
    ("visualize.py empty", "empty"),
    ("visualize.py cut.json", "cut.json"),
    ("visualize.py cut_args", "args.json is damaged"),
    ("visualize.py newer_args", "newer version"),
    ("visualize.py cut_metrics", "cut_metrics is damaged"),
    ("visualize.py PCDARTS --out a_file", "a_file"),
    ("visualize.py PCDARTS --out /proc/nothing", "/proc/nothing"),
    ("visualize.py search --out a_file/x", "a_file"),
    ("visualize.py search eval --out /proc/nothing", "/proc/nothing"),
    ("benchmark.py supernet --json nowhere/x.json", "nowhere"),
    ("export.py nowhere", "no run of train.py"),
    ("export.py search", "no run of train.py"),
    ("export.py cut_args", "args.json is damaged"),
    ("export.py cut_genotype", "no JSON object"),
    ("export.py layers_a_list", "layers"),
    ("export.py unfinished", "weights.pt"),
    ("export.py eval --out a_file", "a_file"),
    ("export.py eval --out /proc/nothing", "/proc/nothing"),
]
WEIGHTS = [
    (f"{TEST} nowhere.pt", "nowhere"),
    (f"{TEST} text.pt", "text.pt"),
    (f"{TEST} list.pt", "list.pt"),
    (f"{TEST} number.pt", "number.pt"),
    (f"{TEST} hostile.pt", "hostile.pt"),
    (f"{TEST} other.pt", "stem.0.weight"),
    (f"{TEST} empty", "empty"),
    ("test.py --model_path search", "train.py --arch"),
    ("test.py --model_path lonely/weights.pt --set digits", "of another network"),
    # More of these four in test_tas_scripts.py and test_reid_scripts.py.
    ("train_search_tas.py --set digits --depth 21", "6n + 2"),
    ("train_tas.py --set digits --arch nowhere", "cannot read 'nowhere'"),
    ("train_search_reid.py --data nowhere", "nowhere is no folder"),
    ("train_reid.py --data nowhere --arch REID_SEARCH", "nowhere is no folder"),
    ("test.py --model_path newer_args", "newer version"),
    ("test.py --model_path other_classes", "other classes"),
    ("test.py --model_path mean_of_one", "mean or std"),
    ("test.py --model_path std_of_zero", "mean or std"),
    ("test.py --model_path args_a_list", "args.json is damaged"),
    ("test.py --model_path layers_a_list", "--layers"),
    ("test.py --model_path channels_a_float", "--init_channels"),
    ("test.py --model_path odd_size", "33"),
    ("test.py --model_path no_stem", "--stem: 'tree' is none of cifar, imagenet"),
]
RESUMES = [
    ("nowhere", "nowhere", "folder of a run"),
    ("empty", "no args.json"),
    ("a_file", "a_file"),
    ("eval --epochs 9", "--epochs 9", "2"),
    ("eval --arch PC_DARTS_cifar", "--arch PC_DARTS_cifar", "sep_conv_3x3"),
    ("eval --auxiliary", "--auxiliary", "False"),
    ("eval --set cifar10", "--set cifar10", "digits"),
    ("search", "train_search.py"),
    ("no_args", "no args.json"),
    ("cut_args", "args.json is damaged"),
    ("newer_args", "newer version"),
    ("flag_gone", "another version"),
    ("wrong_type", "auxiliary"),
    ("wrong_value", "--layers", "many"),
    ("other_classes", "other classes"),
    ("other_images", "other images"),
    ("no_choice", "--layout: 'round' is none of auto"),
    ("newer", "another version"),
    ("foreign", "no checkpoint of train.py"),
    ("no_epoch", "does not fit"),
    ("late_epoch", "does not fit"),
    ("other_parts", "does not fit"),
    ("other_optimizer", "does not fit"),
    ("other_numbers", "does not fit"),
    ("a_list", "no checkpoint of train.py"),
    ("text", "no checkpoint in text can be used"),
    ("empty_files", "no checkpoint in empty_files can be used"),
    ("cut", "no checkpoint in cut can be used"),
    ("folders", "no checkpoint in folders can be used"),
    ("hostile", "no checkpoint in hostile can be used"),
    ("other_genotype", "('sep_conv_3x3', 0)", "('sep_conv_3x3', 1)"),
    ("cut_genotype", "no JSON object"),
    ("log_is_a_folder", "log.txt"),
    ("unfinished --device cuda:99", "cuda:99"),
    ("unfinished --workers 2", "--workers"),
]
COMMANDS = (
    FLAGS + PLACES + WEIGHTS + [(f"train.py --resume {run}", *words) for run, *words in RESUMES]
)
COMMANDS += [
    ("train_search.py --resume eval", "train.py"),
    ("train_search.py --resume search --k 2", "--k 2", "4"),
    ("train_search.py --resume other_space", "restore PRIMITIVES in genotypes.py"),
    ("train_search_imagenet.py --resume search", "train_search.py"),
    ("train_imagenet.py --resume search", "train_search.py"),
    ("train_imagenet.py --resume nowhere", "folder of a run"),
]
CASES = [(shlex.split(command), *words) for command, *words in COMMANDS]
CASES += [(["train.py", "--set", "digits", "--arch", *arch], *words) for arch, *words in GENOTYPES]


def test_the_table_covers_every_script():
    scripts = {path.name for path in ROOT.glob("*.py") if "script.run(" in path.read_text()}
    assert {command[0] for command, *_ in CASES} == scripts


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(case[0])[:80])
def test_wrong_input(fail, place, case):
    command, *words = case
    line = fail(*command)
    assert all(word in line for word in words), line
    assert not (place / "hacked").exists()


@pytest.mark.parametrize("package, command", [
    ("matplotlib", "visualize.py PCDARTS"),
    ("matplotlib", f"{SEARCH} --report 1"),
    ("tensorboard", "train.py --set digits --tensorboard"),
    ("onnx", "export.py eval"),
    ("onnxruntime", "export.py eval"),
])  # fmt: skip
def test_a_missing_package(fail, monkeypatch, package, command):
    for name in [name for name in sys.modules if "tensorboard" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    line = fail(*command.split())
    assert f"pip install {package}, or all of requirements-" in line


@pytest.mark.skipif(sys.platform != "linux", reason="takes prctl")
@pytest.mark.parametrize(
    "script, flags", [("train.py", ["--set", "digits"]), ("train.py", ["--resume", "unfinished"])]
)
def test_a_read_only_folder(place, script, flags):
    """As the owner without the rights of root."""

    def drop():
        ctypes.CDLL(None).prctl(24, 1)  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE: root's way past modes

    resume = "--resume" in flags
    folder = place / "unfinished" if resume else place
    before = set(place.rglob("*"))
    files = [folder, *(folder.iterdir() if resume else ())]
    modes = [path.stat().st_mode for path in files]
    try:
        for path in files:
            path.chmod(0o555 if path.is_dir() else 0o444)
        done = subprocess.run(
            [sys.executable, ROOT / script, *flags], cwd=place, capture_output=True, text=True,
            preexec_fn=drop, timeout=120,
        )  # fmt: skip
    finally:
        for path, mode in zip(files, modes, strict=True):
            path.chmod(mode)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "Permission denied" in done.stderr
    assert set(place.rglob("*")) == before


@pytest.mark.parametrize("script, flags, words", [
    ("train_search", SEARCH, ["with batch_size ", "lower --batch_size or --init_channels or"]),
    ("train_tas", "train_tas.py --set digits", ["lower --batch_size or --input_size", "--amp"]),
    ("train_reid", "train_reid.py --set digits", ["with identities 10, instances 8: lower",
                                                  "--identities or --instances or"]),
])  # fmt: skip
def test_what_to_do_about_memory(monkeypatch, script, flags, words):
    """The flags that the script has."""
    monkeypatch.setattr(sys, "argv", flags.split())
    args = importlib.import_module(script).get_args()
    hint = _out_of_memory(args)
    assert all(word in hint for word in words), hint
    assert all(hasattr(args, name) for name in re.findall(r"--(\w+)", hint))


@pytest.mark.parametrize("command", [SEARCH, "train.py --set digits", "test.py --model_path eval"])
def test_torchrun_of_a_script_that_is_one_process(fail, monkeypatch, command):
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert "start it with python, not with torchrun" in fail(*command.split())


@pytest.mark.skipif(sys.platform != "linux", reason="the limit does not bind elsewhere")
def test_too_little_memory(place):
    """By a limit on the memory of the process."""

    def limit():
        resource.setrlimit(resource.RLIMIT_DATA, (2 * 2**30,) * 2)

    flags = "--set digits --device cpu --batch_size 700 --init_channels 256 --layers 8".split()
    before = set(place.rglob("*"))
    done = subprocess.run(
        [sys.executable, ROOT / "train_search.py", *flags], cwd=place, capture_output=True,
        text=True, preexec_fn=limit, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "out of memory with batch_size 700, k 4" in done.stderr
    assert "--batch_size" in done.stderr and "--recompute" in done.stderr
    assert set(place.rglob("*")) == before

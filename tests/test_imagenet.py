"""Files, splits and batches of ImageNet-size images; the schedules of its scripts."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import transforms as T
from torchvision.datasets import ImageFolder

import genotypes
from harness import costs, imagenet, loops
from model import NetworkImageNet
from utils import UserError

NORMALIZE = T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def photo(seed, size=(80, 60), mode="RGB"):
    """Smooth noise, as a PIL image."""
    noise = np.random.RandomState(seed).randint(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(noise).resize(size, Image.BICUBIC).convert(mode)


def fill(folder, counts, suffix="jpg"):
    """Photos folder/CLASS/N.jpg; counts: {class: number of photos}."""
    for c, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            photo(1000 * c + i).save(folder / name / f"{i}.{suffix}")


@pytest.fixture
def root(tmp_path):
    """Three classes of 43, 20 and 2 training images and 3 validation images each."""
    fill(tmp_path / "imagenet" / "train", {"cat": 43, "dog": 20, "owl": 2})
    fill(tmp_path / "imagenet" / "val", {"cat": 3, "dog": 3, "owl": 3})
    return tmp_path


def error(call, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def names(files):
    return [os.fsdecode(path) for path in files.paths]


def loader(files, transform, size=4, **kwargs):
    return imagenet.Loader(files.transformed(transform), size, "cpu", **{"workers": 0, **kwargs})


# --- files ---


def test_files_are_those_of_torchvision_s_image_folder(root):
    train, val = imagenet.load(root)
    theirs = ImageFolder(root / "imagenet" / "train")
    assert train.classes == theirs.classes == ["cat", "dog", "owl"]
    paths = [str(Path(train.folder) / name) for name in names(train)]
    assert list(zip(paths, train.labels.tolist(), strict=True)) == theirs.samples
    assert len(val) == 9


def test_the_folder_itself_may_be_given(root):
    assert names(imagenet.load(root / "imagenet")[0]) == names(imagenet.load(root)[0])


def test_evaluation_equals_the_torchvision_transforms(root):
    _, val = imagenet.load(root)
    reference = ImageFolder(
        root / "imagenet" / "val",
        T.Compose([T.Resize(256), T.CenterCrop(224), T.ToTensor(), NORMALIZE]),
    )
    batches = list(loader(val, imagenet.test_transform(224)))
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert y.tolist() == reference.targets
    assert torch.equal(x, torch.stack([image for image, _ in reference]))
    assert [len(y) for _, y in batches] == [4, 4, 1]
    assert x[:4].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("jitter", [False, True])
def test_training_equals_the_torchvision_transforms_with_the_same_draws(root, jitter):
    train, _ = imagenet.load(root)
    steps = [T.RandomResizedCrop(32), T.RandomHorizontalFlip()]
    steps += [T.ColorJitter(0.4, 0.4, 0.4, 0.2)] * jitter
    reference = T.Compose([*steps, T.ToTensor(), NORMALIZE])
    files = train.transformed(imagenet.train_transform(32, jitter))
    image, label = files[7, 123]
    torch.manual_seed(123)
    expected = reference(Image.open(Path(train.folder) / names(train)[7]))
    mine = loader(train, imagenet.test_transform(32))  # for its mean and std
    got = imagenet.data.normalized(image[None], mine.mean, mine.std)[0]
    assert torch.equal(got, expected) and label == train.labels[7]


def test_reading_leaves_the_random_numbers_of_the_run_alone(root):
    train, _ = imagenet.load(root)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    next(iter(loader(train, imagenet.train_transform(32, True), shuffle=True)))
    assert torch.equal(torch.rand(3), expected)


def epochs(loader, n):
    return [list(loader) for _ in range(n)]


def same(one, two):
    pairs = zip(one, two, strict=True)
    return all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in pairs)


def test_workers_change_no_bit_and_epochs_differ(root):
    train, _ = imagenet.load(root)

    def make(**more):
        return loader(train, imagenet.train_transform(32, True), 16, shuffle=True, **more)

    first, second = epochs(make(), 2)
    for workers in (1, 2):
        again = epochs(make(workers=workers), 2)
        assert same(first, again[0]) and same(second, again[1])
    labels = [torch.cat([y for _, y in epoch]) for epoch in (first, second)]
    assert not torch.equal(*labels)
    assert all(torch.bincount(y).tolist() == [43, 20, 2] for y in labels)  # every image once
    assert [len(y) for _, y in first] == [16, 16, 16, 16, 1]
    assert not same(first, epochs(make(seed=1), 1)[0])


@pytest.mark.parametrize("taken", [0, 1, 4, 5, 7])
def test_a_loaded_state_goes_on_with_the_same_batches(root, taken):
    train, _ = imagenet.load(root)

    def make():
        return loader(train, imagenet.train_transform(16, False), 16, shuffle=True)

    whole = [batch for epoch in epochs(make(), 3) for batch in epoch]
    begun = make()
    endless = begun.forever()
    for _ in range(taken):
        next(endless)
    resumed = make()
    resumed.load_state_dict(json.loads(json.dumps(begun.state_dict())))
    endless = resumed.forever()
    rest = [next(endless) for _ in range(15 - taken)]
    assert same(whole[taken:], rest)


def test_a_state_of_other_data_is_refused(root):
    train, val = imagenet.load(root)
    state = loader(val, None).state_dict()
    assert "9 images" in error(loader(train, None).load_state_dict, state)


def test_batch_size_must_fit(root):
    _, val = imagenet.load(root)
    message = error(loader, val, None, 10, what="validation images")
    assert "the number of validation images, 9" in message and "--batch_size 9" in message


def test_no_more_workers_than_cores_and_the_smallest_step(root):
    train, _ = imagenet.load(root)
    many = loader(train, None, 16, workers=1000, shuffle=True)
    assert many.loader.num_workers <= os.cpu_count()
    assert many.smallest() == 1 and loader(train, None, 13).smallest() == 13


# --- odd images ---


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_file_is_named(root, workers):
    path = root / "imagenet" / "val" / "dog" / "1.jpg"
    path.write_bytes(path.read_bytes()[:200])
    _, val = imagenet.load(root)
    message = error(list, loader(val, imagenet.test_transform(32), workers=workers))
    assert str(path) in message and "mend or remove" in message and "Traceback" not in message


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "P", "LA", "1", "I;16"])
def test_any_mode_becomes_three_channels(root, mode):
    suffix = "jpg" if mode in ("L", "CMYK") else "png"
    path = root / "imagenet" / "val" / "cat" / f"odd.{suffix}"
    if mode == "I;16":
        grey = np.asarray(photo(1, mode="L")).astype(np.uint16) * 257
        Image.fromarray(grey).save(path)
    else:
        photo(1, mode=mode).save(path)
    _, val = imagenet.load(root)
    i = names(val).index(f"cat{os.sep}{path.name}")
    image, _ = val.transformed(imagenet.test_transform(32))[i, 0]
    assert image.shape == (32, 32, 3) and image.dtype == torch.uint8 and image.float().std() > 1


def test_rotation_in_exif_is_left_alone(root):
    path = root / "imagenet" / "val" / "cat" / "0.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned
    Image.open(path).save(path, exif=exif)
    files = imagenet.load(root)[1].transformed(lambda image: image)
    assert np.array_equal(files[0, 0][0].numpy(), np.asarray(Image.open(path)))


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (20, 10)])
def test_images_smaller_than_the_crop(root, size):
    photo(3, size).save(root / "imagenet" / "val" / "cat" / "0.jpg")
    _, val = imagenet.load(root)
    for transform in (imagenet.test_transform(64), imagenet.train_transform(64, True)):
        assert val.transformed(transform)[0, 1][0].shape == (64, 64, 3)


def test_folders_that_do_not_fit(root):
    folder = root / "imagenet"
    (folder / "train" / "emu").mkdir()
    message = error(imagenet.load, root)
    assert "'emu'" in message and "val has not" in message
    (folder / "val" / "emu").mkdir()
    assert "emu has no images" in error(imagenet.load, root)
    (folder / "val").rename(folder / "test")
    assert "no val folder" in error(imagenet.load, root)
    assert "no imagenet/train" in error(imagenet.load, root / "nowhere")


# --- the split of a search ---


def test_the_split_has_its_shares_of_every_class(root):
    weights, arch = imagenet.load_search(root, seed=2)
    assert np.bincount(weights.labels).tolist() == [4, 2, 1]  # 10 % rounded down, but one
    assert np.bincount(arch.labels).tolist() == [1, 1, 1]
    assert not set(names(weights)) & set(names(arch))
    assert imagenet.counts(weights) == (1, 4)


def test_the_published_counts():
    """10 % and 2.5 % of ImageNet's classes of 732 to 1,300 images."""
    sizes = [732, 1000, 1300]
    members = [f"{c}/{i}" for c, n in enumerate(sizes) for i in range(n)]
    labels = [c for c, n in enumerate(sizes) for _ in range(n)]
    parts = imagenet.draw_split(members, labels, "abc", seed=0)
    counts = [np.bincount([int(name[0]) for name in part]).tolist() for part in parts]
    assert counts == [[73, 100, 130], [18, 25, 32]]
    assert len({*parts[0], *parts[1]}) == len(parts[0]) + len(parts[1])


def test_the_split_is_the_same_everywhere_and_follows_the_seed():
    members, labels = [f"a/{i}" for i in range(40)] + ["b/x", "b/y"], [0] * 40 + [1] * 2
    split = imagenet.draw_split(members, labels, "ab", seed=2)
    # As `printf 2/a/38 | sha256sum` and the others, sorted, say on any machine.
    assert split == (["a/38", "a/28", "a/29", "a/24", "b/y"], ["a/22", "b/x"])
    backwards = imagenet.draw_split(members[::-1], labels[::-1], "ab", seed=2)
    assert [sorted(part) for part in backwards] == [sorted(part) for part in split]
    assert imagenet.draw_split(members, labels, "ab", seed=3) != split


def test_a_written_split_is_read_again(root, tmp_path):
    parts = imagenet.load_search(root, seed=2)
    imagenet.write_split(parts, tmp_path)
    lines = (tmp_path / "split_train.txt").read_text().splitlines()
    assert len(lines) == 7 and all((root / "imagenet" / "train" / line).is_file() for line in lines)
    for path in (tmp_path, tmp_path / "split_train.txt", tmp_path / "split_val.txt"):
        again = imagenet.load_search(root, path, seed=9)
        assert [names(part) for part in again] == [names(part) for part in parts]
        assert [part.labels.tolist() for part in again] == [part.labels.tolist() for part in parts]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda train, val: (train + ["cat/99.jpg"], val), ["cat/99.jpg", "another data set"]),
        (lambda train, val: (train + val[:1], val), ["listed twice", "disjoint"]),
        (lambda train, val: (train + train[:1], val), ["listed twice"]),
        (lambda train, val: (train, val[:-1]), ["split_val.txt", "'owl'"]),
        (lambda train, val: ([], val), ["split_train.txt", "'cat'"]),
    ],
)
def test_splits_that_do_not_fit(root, tmp_path, change, words):
    imagenet.write_split(imagenet.load_search(root), tmp_path)
    files = [tmp_path / name for name in imagenet.SPLIT]
    lists = change(*(file.read_text().splitlines() for file in files))
    for file, lines in zip(files, lists, strict=True):
        file.write_text("\n".join(lines))
    message = error(imagenet.load_search, root, tmp_path)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("name", [b"\xff\xfe.jpg", "caf\u2028\u00e9 1.jpg".encode(), b"a\x0bb.jpg"])
def test_odd_names_are_written_and_read(root, tmp_path, name):
    folder = os.fsencode(root / "imagenet" / "train" / "owl")
    try:
        for i in range(2):
            os.rename(os.path.join(folder, b"%d.jpg" % i), os.path.join(folder, b"%d" % i + name))
    except OSError:
        pytest.skip("this file system takes no such name")
    parts = imagenet.load_search(root)
    imagenet.write_split(parts, tmp_path)
    lists = [tmp_path / name for name in imagenet.SPLIT]
    lists[0].write_bytes(b"\xef\xbb\xbf" + lists[0].read_bytes().replace(b"\n", b"\r\n"))
    again = imagenet.load_search(root, tmp_path)
    assert [names(part) for part in again] == [names(part) for part in parts]
    os.rename(os.path.join(folder, b"0" + name), os.path.join(folder, b"line\nbreak.jpg"))
    assert "line break" in error(imagenet.load_search, root)


def test_splits_that_are_none(root, tmp_path):
    assert "cannot read" in error(imagenet.load_search, root, tmp_path)
    (tmp_path / "list.txt").write_text("cat/0.jpg")
    assert "split_train.txt of an earlier search" in error(
        imagenet.load_search, root, tmp_path / "list.txt"
    )
    (root / "imagenet" / "train" / "owl" / "0.jpg").unlink()
    assert "'owl' has one image" in error(imagenet.load_search, root)


def test_the_published_layout_comes_first(root):
    fill(root / "imagenet_search" / "train", {"cat": 3, "dog": 2})
    fill(root / "imagenet_search" / "val", {"cat": 1, "dog": 2})
    weights, arch = imagenet.load_search(root)
    assert (len(weights), len(arch)) == (5, 3) and weights.classes == ["cat", "dog"]


# --- schedules, loss, counts ---


@pytest.mark.parametrize("E", [1, 3, 5, 6, 20, 250])
@pytest.mark.parametrize("warm_up", [False, True])
def test_linear_schedule(E, warm_up):
    for e in range(E):
        if warm_up and e < 5:
            expected = 0.5 * (e + 1) / 5
        elif E <= 5:
            expected = 0.5 * (E - e) / E
        elif E - e > 5:
            expected = 0.5 * (E - 5 - e) / (E - 5)
        else:
            expected = 0.5 * (E - e) / ((E - 5) * 5)
        rate = loops.learning_rate(e, E, 0.5, "linear", warm_up)
        assert rate == pytest.approx(expected, rel=1e-12) and rate > 0


@pytest.mark.parametrize("E", [1, 5, 50, 250])
@pytest.mark.parametrize("last", [0.0, 0.01])
def test_cosine_schedule_is_pytorch_s(E, last):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.5)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, E, last)
    for e in range(E):
        rate = loops.learning_rate(e, E, 0.5, "cosine", False, last)
        assert rate == pytest.approx(scheduler.get_last_lr()[0], rel=1e-9)
        assert rate == pytest.approx(last + (0.5 - last) * (1 + math.cos(math.pi * e / E)) / 2)
        warm = loops.learning_rate(e, E, 0.5, "cosine", True, last)
        assert warm == (0.5 * (e + 1) / 5 if e < 5 else rate)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("arch", "macs", "paper"),
    [("PC_DARTS_cifar", 571_137_408, 586.36), ("PC_DARTS_image", 581_627_328, 597.21)],
)
def test_multiply_adds_in_both_conventions(arch, macs, paper):
    network = NetworkImageNet(48, 1000, 14, True, getattr(genotypes, arch))
    assert costs.multiply_adds(network, 224) == macs
    assert round(costs.multiply_adds(network, 224, paper=True) / 1e6, 2) == paper


def test_importing_prints_nothing():
    code = "from harness import imagenet, distributed; import train_imagenet, train_search_imagenet"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=Path(__file__).parents[1],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout == "", done.stderr

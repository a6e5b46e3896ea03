"""Sets, halves and batches: equality with torchvision, distributions, user errors."""

import hashlib
import io
import pickle
import socket
import tarfile
import urllib.error
import urllib.request
import warnings
from http.client import IncompleteRead
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from torchvision.datasets import CIFAR10

from harness import data
from harness.data import Batches, DataSet, Images, halves, load
from utils import UserError

MEAN, STD = data.STATISTICS["cifar10"]


def noise(total, size=16, seed=0):
    random = np.random.RandomState(seed)
    images = random.randint(0, 256, (total, size, size, 3)).astype(np.uint8)
    return Images(torch.from_numpy(images), torch.arange(total))


def batches(images, *args, mean=MEAN, std=STD, flip=True, **kwargs):
    return Batches(images, DataSet(images, images, [], mean, std, flip), *args, **kwargs)


def same(image, total):
    """`total` times the one image (H, W, 3), without a copy."""
    return Images(image.expand(total, *image.shape), torch.arange(total))


def chi_square(cells, total):
    """Pearson's statistic of cell numbers against equal shares of `total` cells."""
    counts = torch.bincount(cells, minlength=total).double()
    assert len(counts) == total
    expected = len(cells) / total
    return ((counts - expected) ** 2 / expected).sum().item()


def error(match, call, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert match in message and "\n" not in message, message
    return message


# Batches


@pytest.mark.parametrize("flip", [True, False])
def test_a_batch_equals_the_torchvision_transforms(flip):
    size, pad, length, total = 32, 4, 16, 40
    images = noise(total, size)
    loader = batches(images, total, "cpu", True, True, length, seed=3, flip=flip)
    x, y = next(iter(loader))
    generator = torch.Generator().manual_seed(3)
    order = torch.randperm(total, generator=generator)
    dy, dx, mirrored, cy, cx = (
        torch.randint(high, (total,), generator=generator).tolist()
        for high in (2 * pad + 1, 2 * pad + 1, 2, size, size)
    )
    assert y.tolist() == order.tolist() and y.dtype == torch.int64 and x.dtype == torch.float32
    assert 0 < sum(mirrored) < total
    for i in range(total):
        image = Image.fromarray(images.images[order[i]].numpy())
        image = TF.crop(TF.pad(image, pad), dy[i], dx[i], size, size)
        image = TF.hflip(image) if flip and mirrored[i] else image
        image = TF.normalize(TF.to_tensor(image), MEAN, STD)
        top, bottom, left, right = (
            min(max(edge, 0), size)
            for c in (cy[i], cx[i])
            for edge in (c - length // 2, c + length // 2)
        )
        image[:, top:bottom, left:right] = 0
        torch.testing.assert_close(x[i], image, rtol=0, atol=1e-6)


def test_without_augmentation_images_are_only_normalized():
    images = noise(10)
    x, y = next(iter(batches(images, 10, "cpu", cutout_length=8)))
    for i in range(10):
        expected = TF.normalize(TF.to_tensor(images.images[i].numpy()), MEAN, STD)
        torch.testing.assert_close(x[i], expected, rtol=0, atol=1e-6)
    assert y.tolist() == list(range(10))


def test_every_offset_and_flip_is_equally_likely_and_independent():
    total, size, pad = 10_000, 16, 2
    position = torch.zeros(size, size, 3, dtype=torch.uint8)
    position[..., 0] = torch.arange(1, size + 1)[:, None]
    position[..., 1] = torch.arange(1, size + 1)
    images = same(position, total)
    loader = batches(images, total, "cpu", True, mean=(0, 0, 0), std=(1 / 255,) * 3, seed=1)
    x = next(iter(loader))[0].round().long()  # values are rows + 1 and columns + 1 of the source
    assert x.min() == 0  # the padding
    flip = (x[:, 1, 8, 8] < x[:, 1, 8, 7]).long()
    dy = x[:, 0, 8, 8] - 9 + pad
    dx = torch.where(flip.bool(), x[:, 1, 8, 7], x[:, 1, 8, 8]) - 9 + pad
    # 50 cells of (dy, dx, flip): mean 49, standard deviation 10
    assert chi_square((dy * 5 + dx) * 2 + flip, 50) < 49 + 4 * 10
    assert chi_square(flip, 2) < 9
    neighbours = (dy * 5 + dx)[:-1] * 25 + (dy * 5 + dx)[1:]  # 625 cells: not shared in a batch
    assert chi_square(neighbours, 625) < 624 + 4 * 36


def test_cutout_squares_have_uniform_centres_and_are_clipped_at_the_border():
    total, size, half = 25_600, 16, 3
    white = same(torch.full((size, size, 3), 255, dtype=torch.uint8), total)
    loader = batches(
        white, total, "cpu", True, mean=(0.5,) * 3, std=(0.5,) * 3, cutout_length=2 * half, seed=2
    )
    x, _ = next(iter(loader))
    zero = (x == 0).all(1)  # (N, H, W); the image is 1 and the padding -1
    rows, columns = zero.any(2), zero.any(1)
    assert torch.equal(zero, rows[:, :, None] & columns[:, None, :])  # rectangles
    centres = []
    for line in (rows, columns):
        first = line.int().argmax(1)
        last = size - line.flip(1).int().argmax(1)
        centre = torch.where(first > 0, first + half, last - half)
        assert torch.equal(first, (centre - half).clamp(0, size))
        assert torch.equal(last, (centre + half).clamp(0, size))
        assert torch.equal(line.sum(1), last - first)  # without gaps
        centres.append(centre)
    # 256 cells: mean 255, standard deviation 23
    assert chi_square(centres[0] * size + centres[1], size * size) < 255 + 4 * 23


def test_randomness_is_not_shared_between_images_or_epochs():
    images = same(noise(1).images[0], 64)
    loader = batches(images, 64, "cpu", True, cutout_length=8)
    x, again = (next(iter(loader))[0] for _ in range(2))
    assert len(x.flatten(1).unique(dim=0)) > 60
    assert not torch.equal(x, again)


def test_an_epoch_has_every_image_once_and_a_short_last_batch():
    loader = batches(noise(23), 5, "cpu", shuffle=True)
    epochs = [[y for _, y in loader] for _ in range(2)]
    for epoch in epochs:
        assert [len(y) for y in epoch] == [5, 5, 5, 5, 3] and len(loader) == 5
        assert sorted(torch.cat(epoch).tolist()) == list(range(23))
    assert torch.cat(epochs[0]).tolist() != torch.cat(epochs[1]).tolist()
    assert torch.cat([y for _, y in batches(noise(23), 5, "cpu")]).tolist() == list(range(23))
    assert len(batches(noise(20), 5, "cpu")) == 4


def test_an_iteration_that_was_left_does_not_shorten_the_next():
    loader = batches(noise(23), 5, "cpu")
    next(iter(loader))
    assert torch.cat([y for _, y in loader]).tolist() == list(range(23))


def test_forever_shuffles_anew_when_it_is_through():
    stream = batches(noise(23), 5, "cpu", shuffle=True).forever()
    epochs = [torch.cat([next(stream)[1] for _ in range(5)]).tolist() for _ in range(3)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_seed_decides_and_the_global_generator_does_not():
    def epoch(seed):
        loader = batches(noise(20), 8, "cpu", True, True, 8, seed)
        return torch.cat([x for x, _ in loader])

    torch.manual_seed(1)
    one = epoch(5)
    torch.manual_seed(2)
    assert torch.equal(one, epoch(5)) and not torch.equal(one, epoch(6))


@pytest.mark.parametrize("taken", [0, 2, 4, 5, 6, 9])  # 5 batches an epoch
@pytest.mark.parametrize("shuffle", [True, False])
def test_a_loaded_state_goes_on_with_the_same_batches(taken, shuffle):
    def loader(seed):
        return batches(noise(23), 5, "cpu", True, shuffle, 8, seed)

    first, second = loader(1), loader(2)
    stream = first.forever()
    for _ in range(taken):
        next(stream)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    expected = [next(stream) for _ in range(11)]
    next(iter(second))
    second.load_state_dict(torch.load(file, weights_only=True))
    rest = list(second)  # what is left of the epoch
    assert len(rest) == 5 - taken % 5
    resumed = second.forever()
    rest += [next(resumed) for _ in range(11 - len(rest))]
    for (x, y), (x_expected, y_expected) in zip(rest, expected, strict=True):
        assert torch.equal(x, x_expected) and torch.equal(y, y_expected)


def test_a_state_of_other_data_is_refused():
    state = batches(noise(23), 5, "cpu").state_dict()
    error("23", batches(noise(24), 5, "cpu").load_state_dict, state)


@pytest.mark.parametrize("augment", [True, False])
def test_batches_are_channels_last(augment):
    x, _ = next(iter(batches(noise(6), 6, "cpu", augment, True, 8)))
    assert x.shape == (6, 3, 16, 16) and x.is_contiguous(memory_format=torch.channels_last)


def test_batch_size_must_fit():
    message = error("179", batches, noise(179, 8), 256, "cpu", what="training half")
    assert "batch_size 256" in message and "training half" in message
    error("batch_size 0", batches, noise(4), 0, "cpu")
    assert len(batches(noise(4), 4, "cpu")) == 1


def test_halves_are_the_first_images_and_the_rest():
    first, rest = halves(noise(7), 0.5)
    assert first.labels.tolist() == [0, 1, 2] and rest.labels.tolist() == [3, 4, 5, 6]
    assert torch.equal(torch.cat([first.images, rest.images]), noise(7).images)
    for portion in (0.1, 0.0, 1.0, 1.5, -0.5, float("nan")):
        error(f"train_portion {portion}", halves, noise(7), portion)


# Sets


def test_unknown_sets_and_small_sizes_are_refused(tmp_path):
    message = error("imagenet", load, "imagenet", tmp_path)
    assert all(name in message for name in data.SETS)
    for name in data.SETS:
        for size in (7, 0, -1):
            error(f"input_size {size}", load, name, tmp_path, size)


def test_digits_facts():
    path = Path(data.__file__).with_name("digits.npz")
    assert path.stat().st_size < 100_000
    with np.load(path, allow_pickle=False) as file:
        assert "CC BY" in str(file["licence"]) and "10.24432/C50P49" in str(file["source"])
        raw, labels, test = file["images"], file["labels"], file["test"]
    digits = load("digits", None)
    assert len(digits.classes) == 10 and not digits.flip
    assert digits.train.images.shape == (1437, 16, 16, 3)
    assert digits.test.images.shape == (360, 16, 16, 3)
    for part, share in ((digits.train, 0.8), (digits.test, 0.2)):
        assert part.images.dtype == torch.uint8 and part.labels.dtype == torch.int64
        counts = torch.bincount(part.labels, minlength=10)
        assert (counts - torch.from_numpy(np.bincount(labels)) * share).abs().max() <= 1
    assert len(set(test.tolist())) == 360

    plain = load("digits", None, 8)  # not enlarged: 0..16 becomes 0..255
    scaled = np.rint(raw * (255 / 16)).astype(np.uint8)
    for channel in plain.test.images.unbind(-1):
        assert np.array_equal(channel.numpy(), scaled[test])
    both = [
        (tuple(image[..., 0].flatten().tolist()), label)
        for part in (plain.train, plain.test)
        for image, label in zip(part.images, part.labels.tolist(), strict=True)
    ]
    pixels = map(tuple, scaled.reshape(1797, 64).tolist())
    assert sorted(both) == sorted(zip(pixels, labels.tolist(), strict=True))
    assert digits.train.images.max() > 240 and digits.train.images.min() == 0
    small = digits.test.images.float().mean() - plain.test.images.float().mean()
    assert abs(small) < 3  # enlarging keeps the brightness
    assert load("digits", None, 24).test.images.shape == (360, 24, 24, 3)


def test_digits_are_in_one_fixed_random_order():
    one, two = load("digits", None).train, load("digits", None).train
    assert torch.equal(one.images, two.images)
    with np.load(Path(data.__file__).with_name("digits.npz")) as file:
        kept = np.delete(file["labels"], file["test"])
    assert one.labels.tolist() != kept.tolist() and sorted(one.labels) == sorted(kept)


def test_mean_and_std_are_those_of_the_training_images():
    images = load("digits", None).train.images.double() / 255
    digits = load("digits", None)
    torch.testing.assert_close(torch.tensor(digits.mean).double(), images.mean((0, 1, 2)))
    torch.testing.assert_close(
        torch.tensor(digits.std).double(), images.flatten(0, 2).std(0, correction=0)
    )


def write(path, array, mode=None, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **kwargs)


@pytest.fixture
def folder(tmp_path):
    """Two classes with three images each in train, and one each in test."""
    for split, count in (("train", 3), ("test", 1)):
        for name in ("cat", "dog"):
            pixels = noise(count, 32, len(split) + len(name) + ord(name[0])).images.numpy()
            for i in range(count):
                write(tmp_path / split / name / f"{i}.png", pixels[i])
    return tmp_path


def test_folder_reads_images_of_the_size_bit_for_bit(folder):
    result = load("folder", folder)
    assert result.classes == ["cat", "dog"] and result.flip
    assert result.train.images.shape == (6, 32, 32, 3) and result.train.labels.dtype == torch.int64
    stored = {
        np.asarray(Image.open(path)).tobytes(): result.classes.index(path.parent.name)
        for path in (folder / "train").rglob("*.png")
    }
    for image, label in zip(*result.train, strict=True):
        assert stored.pop(image.numpy().tobytes()) == label
    assert not stored
    for image, name in zip(result.test.images, result.classes, strict=True):
        assert np.array_equal(image, Image.open(folder / "test" / name / "0.png"))
    pixels = result.train.images.double().flatten(0, 2) / 255
    torch.testing.assert_close(torch.tensor(result.mean).double(), pixels.mean(0))
    torch.testing.assert_close(torch.tensor(result.std).double(), pixels.std(0, correction=0))


def test_folder_training_images_are_in_one_fixed_random_order(folder):
    for i in range(120):
        write(
            folder / "train" / ("cat", "dog")[i % 2] / f"{i // 2}.png",
            np.full((32, 32, 3), i, "u1"),
        )
    one, two = load("folder", folder).train, load("folder", folder).train
    assert torch.equal(one.images, two.images) and torch.equal(one.labels, two.labels)
    values = one.images[:, 0, 0, 0]
    assert torch.equal(values % 2, one.labels) and sorted(values) == list(range(120))
    for half in halves(one, 0.5):
        assert 15 < half.labels.sum() < 45  # both classes, mixed


def test_folder_takes_val_where_there_is_no_test(folder):
    white = np.full((32, 32, 3), 255, np.uint8)
    for name in ("cat", "dog"):
        write(folder / "val" / name / "0.png", white)
    assert load("folder", folder).test.images.min() < 255  # test wins
    (folder / "test").rename(folder / "other")
    assert load("folder", folder).test.images.min() == 255


def test_folder_converts_what_is_not_rgb(folder):
    grey = np.tile(np.arange(32, dtype=np.uint8) * 8, (32, 1))
    red = np.zeros((32, 32, 3), np.uint8)
    red[..., 0] = 204  # in the web palette
    cat = folder / "test" / "cat"
    expected = {"0.png": np.asarray(Image.open(cat / "0.png"))}
    for mode in ("L", "LA"):
        write(cat / f"{mode}.png", grey, mode)
        expected[f"{mode}.png"] = np.stack([grey] * 3, -1)
    write(cat / "sixteen.png", grey.astype(np.uint16) * 257)
    expected["sixteen.png"] = np.stack([grey] * 3, -1)
    for name, mode, more in (
        ("palette.png", "P", {"transparency": bytes([0, 128])}),
        ("palette.gif", "P", {}),
        ("rgba.PNG", "RGBA", {}),
        ("cmyk.tif", "CMYK", {}),
        ("cmyk.jpeg", "CMYK", {"quality": 95}),
        ("rgb.bmp", None, {}),
        ("rgb.webp", None, {"lossless": True}),
        ("rgb.ppm", None, {}),
    ):
        write(cat / name, red, mode, **more)
        expected[name] = red
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        test = load("folder", folder).test
    assert (test.labels == 0).sum() == len(expected) == 12
    for image, name in zip(test.images[:12], sorted(expected), strict=True):
        difference = np.abs(image.numpy().astype(int) - expected[name]).max()
        assert difference <= (6 if "jpeg" in name else 0), name


def test_folder_resizes_the_short_side_and_crops_the_centre(folder):
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = (10, 120, 250)
    tall = np.asarray(noise(1, 100).images[0])[:, 30:80]
    write(folder / "test" / "cat" / "0.png", wide)
    write(folder / "test" / "dog" / "0.png", tall)
    cat, dog = load("folder", folder).test.images
    assert (cat[:, 3:29] == torch.tensor([10, 120, 250])).all()
    assert cat[:, 0].float().mean() < wide[:, 20].mean()  # the edge blends with black
    reference = TF.resize(torch.from_numpy(tall.copy()).permute(2, 0, 1), 32, antialias=True)
    reference = TF.center_crop(reference, 32).permute(1, 2, 0)
    assert (dog.int() - reference.int()).abs().max() <= 1
    assert load("folder", folder, 24).train.images.shape == (6, 24, 24, 3)


def test_folder_ignores_hidden_files_and_other_files(folder):
    before = load("folder", folder)
    for name in ("notes.txt", ".hidden.png", "._0.png", ".cache/0.png"):
        path = folder / "train" / "cat" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"no image")
    (folder / "train" / ".cache").mkdir()
    (folder / "train" / "list.csv").touch()
    after = load("folder", folder)
    assert torch.equal(before.train.images, after.train.images) and after.classes == before.classes


def test_a_constant_channel_has_a_std_above_zero(folder):
    for path in (folder / "train").rglob("*.png"):
        write(path, np.full((32, 32, 3), 100, np.uint8))
    result = load("folder", folder)
    assert result.std == (1 / 255,) * 3 and abs(result.mean[0] - 100 / 255) < 1e-12
    assert next(iter(Batches(result.train, result, 6, "cpu")))[0].abs().max() < 1e-4


def test_folder_errors_name_what_is_wrong(folder):
    train, test = folder / "train", folder / "test"
    error("nowhere does not exist", load, "folder", folder / "nowhere")
    error("0.png is a file", load, "folder", test / "cat" / "0.png")
    error("0.png", load, "folder", test / "cat" / "0.png" / "deeper")

    train.rename(folder / "away")
    error("train", load, "folder", folder)
    (folder / "away").rename(train)
    test.rename(folder / "away")
    error("test or val", load, "folder", folder)
    (folder / "away").rename(test)

    (test / "bird").mkdir()
    error("'bird'", load, "folder", folder)
    (test / "bird").rename(train / "bird")
    error("'bird'", load, "folder", folder)
    (test / "bird").mkdir()
    error(str(train / "bird"), load, "folder", folder)
    write(train / "bird" / "0.png", np.zeros((8, 8, 3), np.uint8))
    error(str(test / "bird"), load, "folder", folder)


@pytest.mark.parametrize("count", [0, 1])
def test_folder_needs_two_classes(folder, count):
    for split in ("train", "test"):
        (folder / split / "dog").rename(folder / f"dog-{split}")
        if not count:
            (folder / split / "cat").rename(folder / f"cat-{split}")
    error(f"{count} class", load, "folder", folder)


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "tif", "webp", "ppm"])
def test_broken_images_are_named(folder, suffix):
    path = folder / "train" / "dog" / f"broken.{suffix}"
    write(path, noise(1, 64).images[0].numpy())
    whole = path.read_bytes()
    for content in (b"", b"no image\n", whole[: len(whole) // 2]):
        path.write_bytes(content)
        error(str(path), load, "folder", folder)


# CIFAR: a small archive with its own md5 sums


def md5(content):
    return hashlib.md5(content).hexdigest()


@pytest.fixture
def archive(monkeypatch):
    """cifar-10-python.tar.gz as bytes, with 10 images in each of its six files."""
    random = np.random.RandomState(0)
    files = {"batches.meta": {"label_names": [f"class {i}" for i in range(10)]}}
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        pixels = random.randint(0, 256, (10, 3072)).astype(np.uint8)
        files[name] = {"data": pixels, "labels": random.randint(0, 10, 10).tolist()}
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for name, entry in files.items():
            content = files[name] = pickle.dumps(entry)
            info = tarfile.TarInfo(f"{CIFAR10.base_folder}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    sums = [[name, md5(content)] for name, content in files.items()]
    monkeypatch.setattr(CIFAR10, "train_list", sums[1:6])
    monkeypatch.setattr(CIFAR10, "test_list", sums[6:])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums[0][1]})
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(file.getvalue()))
    return file.getvalue()


@pytest.fixture
def network(monkeypatch):
    """What a download answers: bytes, or an error; None has no network. Counts the requests."""

    class Network:
        answer, requests, timeouts = None, 0, set()

    class Response(io.BytesIO):
        url, length = None, None

        def read(self, size=-1):
            content = super().read(size)
            if not content and isinstance(Network.answer, tuple):
                raise Network.answer[1]  # breaks off after the first part
            return content

    def urlopen(request, *args, **kwargs):
        Network.requests += 1
        Network.timeouts.add(socket.getdefaulttimeout())
        if Network.answer is None:
            raise urllib.error.URLError("no route to host")
        return Response(Network.answer[0] if isinstance(Network.answer, tuple) else Network.answer)

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return Network


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_without_data_and_network_is_one_line_and_leaves_nothing(
    tmp_path, network, capsys, name
):
    root = tmp_path / "not" / "there"
    before = socket.getdefaulttimeout()
    message = error(str(root), load, name, root)
    assert "--set digits" in message and "--set folder" in message and "no route" in message
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out == ""
    assert network.timeouts == {data.TIMEOUT} and socket.getdefaulttimeout() == before


@pytest.mark.parametrize("breaks", ["short", TimeoutError("timed out"), IncompleteRead(b"")])
def test_cifar_half_downloaded_leaves_nothing(tmp_path, network, archive, breaks):
    half = archive[: len(archive) // 2]
    network.answer = half if breaks == "short" else (half, breaks)
    error("--set digits", load, "cifar10", tmp_path)
    assert not list(tmp_path.iterdir())
    network.answer = archive
    assert len(load("cifar10", tmp_path).train.labels) == 50


def test_cifar_is_downloaded_once_and_read_in_its_order(tmp_path, network, archive, capsys):
    network.answer = archive
    root = tmp_path / "data"
    result = load("cifar10", root)
    assert [path.name for path in root.iterdir()] == [CIFAR10.base_folder]
    assert [path.name for path in tmp_path.iterdir()] == ["data"] and capsys.readouterr().out == ""
    requests, network.answer = network.requests, None
    assert torch.equal(load("cifar10", root).train.images, result.train.images)
    assert network.requests == requests > 0

    assert result.train.images.shape == (50, 32, 32, 3) and len(result.test.labels) == 10
    assert result.train.images.dtype == torch.uint8 and result.train.labels.dtype == torch.int64
    assert (result.mean, result.std, result.flip) == (MEAN, STD, True)
    assert result.classes == [f"class {i}" for i in range(10)]
    for i, (name, _) in enumerate(CIFAR10.train_list):
        file = pickle.loads((root / CIFAR10.base_folder / name).read_bytes())
        images, labels = (tensor[10 * i : 10 * i + 10] for tensor in result.train)
        assert np.array_equal(images.permute(0, 3, 1, 2).flatten(1), file["data"])
        assert labels.tolist() == file["labels"]
    smaller = load("cifar10", root, 16)
    assert smaller.train.images.shape == (50, 16, 16, 3)
    assert smaller.test.images.shape == (10, 16, 16, 3)


def test_cifar_archive_is_unpacked_without_a_network(tmp_path, network, archive):
    (tmp_path / CIFAR10.filename).write_bytes(archive)
    assert len(load("cifar10", tmp_path).train.labels) == 50 and network.requests == 0
    names = {CIFAR10.filename, CIFAR10.base_folder}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_cifar_broken_archive_is_downloaded_anew(tmp_path, network, archive):
    (tmp_path / CIFAR10.filename).write_bytes(archive[:500])
    error("--set digits", load, "cifar10", tmp_path)
    network.answer = archive
    assert len(load("cifar10", tmp_path).train.labels) == 50


def test_cifar_corrupted_is_told_and_mended(tmp_path, network, archive):
    network.answer = archive
    load("cifar10", tmp_path)
    broken = tmp_path / CIFAR10.base_folder / "data_batch_3"
    broken.write_bytes(broken.read_bytes()[:100])
    network.answer = None
    error(str(tmp_path), load, "cifar10", tmp_path)
    assert len(broken.read_bytes()) == 100
    network.answer = archive
    assert len(load("cifar10", tmp_path).train.labels) == 50


def test_cifar_root_that_cannot_be_written(tmp_path, network, archive, monkeypatch):
    network.answer = archive
    file = tmp_path / "file"
    file.touch()
    error("file is a file", load, "cifar10", file)
    error("--set digits", load, "cifar10", file / "deeper")

    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(data.tempfile, "TemporaryDirectory", denied)
    error("Permission denied", load, "cifar10", tmp_path)
    assert network.requests == 0

"""The examples' images: CIFAR-10's two formats and image folders, in small files that the tests write."""

import functools
import json
import os
import pickle
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from launchers import launch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import datasets

EACH = 6  # images in a file


@pytest.fixture
def batches():
    """Return (3072,)-pixel uint8 images and labels of five batches and the test batch, by the names of their files."""
    random = np.random.default_rng(0)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    return {n: (random.integers(0, 256, (EACH, 3072), np.uint8), random.integers(0, 10, EACH)) for n in names}


def text(characters):
    """Return the opcode that pushes a str of Python 2."""
    content = characters.encode("latin-1")
    return (
        b"U" + bytes([len(content)]) + content
        if len(content) < 256
        else b"T" + struct.pack("<I", len(content)) + content
    )


def integer(number):
    return b"J" + struct.pack("<i", number)


UINT8 = b"cnumpy\ndtype\n" + text("u1") + b"K\x00K\x01\x87R(K\x03" + text("|") + b"NNN" + 2 * integer(-1) + b"K\x00tb"
RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\n"


def array(pixels, shape, dtype=UINT8, by_columns=b"\x89", reconstruct=RECONSTRUCT):
    """Return the opcodes of a numpy array; `pixels` are those of its bytes."""
    shape = b"".join(map(integer, shape))
    return (
        reconstruct
        + b"cnumpy\nndarray\nK\x00\x85"
        + text("b")
        + b"\x87R(K\x01("
        + shape
        + b"t"
        + dtype
        + by_columns
        + pixels
        + b"tb"
    )


def python2(data, labels):
    """Return a batch as Python 2 pickled it: protocol 2, str, an array in state, all in the memo."""
    head = b"\x80\x02}q\x01(" + text("batch_label") + b"q\x02" + text("training batch 1 of 5") + b"q\x03"
    names = text("filenames") + b"]q\x0f(" + text("leptodactylus_s_000004.png") + b"r\x10\x01\x00\x00e"
    return head + text("labels") + b"q\x04" + labels + text("data") + b"q\x06" + data + names + b"u."


def numbers(labels):
    return b"]q\x05(" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"


def by_python2(pixels, labels, **options):
    return python2(array(text(pixels.tobytes().decode("latin-1")), pixels.shape, **options), numbers(labels))


def by_columns(pixels, labels):
    return python2(
        array(text(pixels.tobytes("F").decode("latin-1")), pixels.shape, by_columns=b"\x88"), numbers(labels)
    )


def by_python3(protocol):
    """Return what pickles by this Python and this numpy."""
    return lambda pixels, labels: pickle.dumps(
        {b"batch_label": b"small", b"labels": labels.tolist(), b"data": pixels, b"filenames": [b"a.png"] * EACH},
        protocol=protocol,
    )


PICKLED = {
    "python 2": by_python2,
    "numpy 2": functools.partial(by_python2, reconstruct=RECONSTRUCT.replace(b"core", b"_core")),
    "by columns": by_columns,
    **{f"python 3, protocol {protocol}": by_python3(protocol) for protocol in (2, 3, 4)},
}


def write_pickles(folder, batches, pickled=by_python2):
    for name, (pixels, labels) in batches.items():
        (folder / name).write_bytes(pickled(pixels, labels))


def write_binary(folder, batches):
    for name, (pixels, labels) in batches.items():
        (folder / f"{name}.bin").write_bytes(np.column_stack([labels.astype(np.uint8), pixels]).tobytes())


def test_digits_are_those_that_scikit_learn_loads():
    from sklearn.datasets import load_digits

    parts = datasets.digits()
    images, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0)).numpy()
    assert np.array_equal(images.squeeze(1).numpy() * 16, bunch.images[order])
    assert np.array_equal(labels.numpy(), bunch.target[order])
    assert [len(tensor) for part in parts for tensor in part] == [1500, 1500, 297, 297]


def test_digits_are_read_without_scikit_learn(monkeypatch):
    monkeypatch.setattr(sys, "modules", {n: m for n, m in sys.modules.items() if n.partition(".")[0] != "sklearn"})
    datasets.digits()
    assert "sklearn" not in sys.modules


def test_digits_need_scikit_learn(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install scikit-learn"):
        datasets.digits()


@pytest.mark.parametrize(
    "write",
    [*(functools.partial(write_pickles, pickled=p) for p in PICKLED.values()), write_binary],
    ids=[*PICKLED, "bin"],
)
def test_cifar(write, batches, tmp_path):
    write(tmp_path, batches)
    (images, labels), (test_images, test_labels) = datasets.load(tmp_path)
    assert images.shape == (5 * EACH, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    assert labels.tolist() == [label for _, labels in list(batches.values())[:5] for label in labels]
    assert test_labels.tolist() == batches["test_batch"][1].tolist()
    pixels = batches["test_batch"][0]
    assert test_images[2, 1, 3, 4] == pixels[2, 1024 + 3 * 32 + 4]  # green, row 3, column 4
    assert np.array_equal(test_images.flatten(1), pixels)


def test_what_is_written_as_by_python_2_is_what_pickle_reads(batches):
    """The opcodes of these tests are those of a pickle."""
    pixels, labels = batches["test_batch"]
    for pickled in by_python2, by_columns:
        batch = pickle.loads(pickled(pixels, labels), encoding="bytes")
        assert np.array_equal(batch[b"data"], pixels)
        assert batch[b"labels"] == labels.tolist()


def test_cifar_needs_its_test_batch(batches, tmp_path):
    batches.pop("test_batch")
    write_binary(tmp_path, batches)
    with pytest.raises(FileNotFoundError, match=r"test_batch\.bin"):
        datasets.load(tmp_path)


def test_binary_of_a_wrong_length(batches, tmp_path):
    write_binary(tmp_path, batches)
    with (tmp_path / "data_batch_3.bin").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match=f"expected images of 3073 bytes, got {3073 * EACH + 1} bytes: .*data_batch_3"):
        datasets.load(tmp_path)


ONE = text("\1" * 3072)  # the pixels of one image
IMAGE, LABEL = array(ONE, (1, 3072)), numbers([1])
BACKWARDS = 2 * integer(-1) + b"\x86"  # strides
NO_STATE = RECONSTRUCT + b"cnumpy\nndarray\nK\x00\x85" + text("b") + b"\x87R"
OBJECT = b"cnumpy\ndtype\n" + text("O8") + b"K\x00K\x01\x87R"
FIELDS = UINT8.replace(b"NNN", b"N(" + text("a") + b"t}")
POINTERS = (  # a dtype of 8 bytes that its state makes a pointer to an object
    b"cnumpy\ndtype\n" + text("V8") + b"K\x00K\x01\x87R(K\x03" + text("|") + b"N(" + text("a") + b"t}" + text("a")
    + OBJECT + b"K\x00\x86sK\x08K\x01K\x01tb"
)  # fmt: skip
SYSTEM = b"cos\nsystem\n" + text("touch owned") + b"\x85R"
DEPTH = 60_000
ENCODED = b"c_codecs\nencode\nq\x20X" + struct.pack("<I", 10**6) + b"a" * 10**6 + b"X\6\0\0\0latin1\x86q\x21R"
ARRAY, LENGTH, LABELS = (
    "expected a numpy array",
    "as long as its shape says",
    "expected labels to be a list of integers",
)
NO_BATCH, BROKEN, MORE = (
    "expected a dictionary with data and labels",
    "got a broken one",
    "expected a pickle of plain data",
)
MALICIOUS = {  # what a file holds, and what is said of it
    "pointers in the dtype's state": (python2(array(text("A" * 8), (1,), POINTERS), LABEL), "array of uint8"),
    "objects": (python2(array(b"](" + SYSTEM + b"e", (1,), OBJECT), LABEL), "array of uint8"),
    "a dtype with fields": (python2(array(ONE, (1, 3072), FIELDS), LABEL), "array of uint8"),
    "a dtype that is none": (python2(array(ONE, (1, 3072), text("u1")), LABEL), "array of uint8"),
    "a huge shape": (python2(array(ONE, (2**31 - 1, 3072)), LABEL), LENGTH),
    "a negative shape": (python2(array(ONE, (-1, -3072)), LABEL), LENGTH),
    "a shape of nothing": (python2(array(text(""), (0, 2**31 - 1)), LABEL), LENGTH),
    "a shape of no axes": (python2(array(text("a"), ()), LABEL), LENGTH),
    "a hundred thousand axes": (python2(array(ONE, [1] * 100_000), LABEL), LENGTH),
    "too few bytes": (python2(array(text("a" * 3071), (1, 3072)), LABEL), LENGTH),
    "too many bytes": (python2(array(text("a" * 3073), (1, 3072)), LABEL), LENGTH),
    "a list for bytes": (python2(array(numbers([1]), (1, 3072)), LABEL), LENGTH),
    "another shape": (python2(array(text("a" * 5), (1, 5)), LABEL), r"expected (1, 3072) uint8, got (1, 5)"),
    "negative strides": (
        python2(b"cnumpy\nndarray\n(K\x01M\x00\x0c\x86" + text("u1") + ONE + b"K\x00" + BACKWARDS + b"tR", LABEL),
        ARRAY,
    ),
    "no state": (python2(NO_STATE, LABEL), "array with its state"),
    "a subclass": (python2(IMAGE.replace(b"cnumpy\nndarray", b"cnumpy\nmatrix"), LABEL), ARRAY),
    "a call": (python2(SYSTEM, LABEL), f"{ARRAY}, got a call of 'os.system'"),
    "a call within an array": (python2(array(SYSTEM, (1, 3072)), LABEL), LENGTH),
    "a call for a batch": (b"\x80\x02" + SYSTEM + b".", NO_BATCH),
    "a class for a batch": (pickle.dumps(eval), NO_BATCH),
    "calls of calls": (python2(b"cos\nsystem\n" + b")R" * DEPTH, LABEL), f"{ARRAY}, got a call of a Call"),
    "states of states": (python2(b"cos\nsystem\n)R" + b"cos\nsystem\n)R" * DEPTH + b"b" * DEPTH, LABEL), ARRAY),
    "tuples in tuples": (python2(b")" + b"\x85" * DEPTH, LABEL), f"{ARRAY}, got a tuple"),
    "tuples called": (python2(b")" + b"\x85" * DEPTH + b")R", LABEL), f"{ARRAY}, got a call of a tuple"),
    "lists in lists for labels": (python2(IMAGE, b"]" * DEPTH + b"a" * (DEPTH - 1)), LABELS),
    "a list in itself": (python2(IMAGE, b"]q\x09h\x09a"), LABELS),
    "a state in itself": (python2(b"cos\nsystem\n)Rq\x09h\x09b", LABEL), ARRAY),
    "a tuple for a key": (b"\x80\x02}" + b")" + b"\x85" * DEPTH + b"Ns.", BROKEN),
    "half of an item": (b"\x80\x02}(Nu.", BROKEN),
    "a huge place in the memo": (python2(IMAGE, b"]r\xfe\xff\xff\xff(K\x0ae"), "expected labels from 0 to 9, got 10"),
    "a place in the memo that is empty": (python2(IMAGE, b"h\x77"), BROKEN),
    "an empty stack": (b"\x80\x02\x86.", BROKEN),
    "a length beyond the end": (python2(b"T\xff\xff\xff\x7f", LABEL), "expected 2147483647 bytes"),
    "a frame beyond the end": (b"\x80\x04\x95" + b"\xff" * 7 + b"\x7f}.", NO_BATCH),
    "one text encoded often": (python2(ENCODED + b"0h\x20h\x21R" * 1000, LABEL), MORE),
    "one text encoded twice": (python2(IMAGE, b"](" + ENCODED + b"h\x20h\x21Re"), BROKEN),
    "millions of dictionaries": (b"\x80\x02" + b"}" * 1_000_000 + b".", "at most 300000 opcodes"),
    "gigabytes": (None, "expected at most 67108864 bytes, got 8589934592"),  # of which none is written
    "an instance": (b"\x80\x02(ios\nsystem\n.", f"{MORE}, got the opcode INST"),
    "a persistent id": (b"\x80\x02NQ.", f"{MORE}, got the opcode BINPERSID"),
    "no pickle": (b"hello", BROKEN),
    "nothing": (b"", "pickle exhausted"),
    "no end": (python2(IMAGE, LABEL)[:-1], "pickle exhausted"),
    "no labels": (pickle.dumps({b"data": np.zeros((1, 3072), np.uint8)}, protocol=2), NO_BATCH),
    "an empty batch": (python2(array(text(""), (0, 0)), numbers([])), "expected (N, 3072) uint8, got (0, 0)"),
    "more labels than images": (python2(IMAGE, numbers([1, 2])), "expected (2, 3072) uint8, got (1, 3072)"),
    "a label beyond the classes": (python2(IMAGE, numbers([10])), "expected labels from 0 to 9, got 10"),
    "a negative label": (python2(IMAGE, b"](" + integer(-1) + b"e"), "expected labels from 0 to 9, got -1"),
    "a huge label": (python2(IMAGE, b"](\x8a\xfa" + b"\x7f" * 250 + b"e"), "expected labels from 0 to 9, got 57181"),
    "None for a label": (python2(IMAGE, b"](Ne"), LABELS),
    "a bool for a label": (python2(IMAGE, b"](\x88e"), LABELS),
    "text for a label": (python2(IMAGE, b"](" + text("1") + b"e"), LABELS),
    "a tuple for labels": (python2(IMAGE, b"K\x01\x85"), LABELS),
    "an array for labels": (python2(IMAGE, array(text("1"), (1,))), LABELS),
}  # fmt: skip
READ_ALL = """
    import json, resource, sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    import datasets

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 500_000_000,) * 2)
    for folder in sorted(Path().glob("[0-9]*")):
        try:
            datasets.load(folder)
            outcome = "loaded"
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
        print(json.dumps([folder.name, outcome]), flush=True)
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Return the folder of malicious files, what came of reading each, and how that ended: in one process."""
    folder = tmp_path_factory.mktemp("malicious")
    for number, (content, _) in enumerate(MALICIOUS.values()):
        path = folder / f"{number:03d}" / "data_batch_1"
        path.parent.mkdir()
        path.write_bytes(content or b"")
        if content is None:
            os.truncate(path, 2**33)
    (folder / "read.py").write_text(textwrap.dedent(READ_ALL))
    command = [sys.executable, "read.py", Path(datasets.__file__).parent]
    job = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=100, check=False)
    lines = dict(json.loads(line) for line in job.stdout.splitlines())
    return folder, [lines.get(f"{number:03d}") for number in range(len(MALICIOUS))], job


def test_malicious_files_run_nothing_and_break_nothing(outcomes):
    folder, _, job = outcomes
    assert (job.returncode, job.stderr) == (0, "")
    assert not (folder / "owned").exists()


@pytest.mark.parametrize("name", MALICIOUS)
def test_a_malicious_file_is_refused_in_one_line_that_names_it(name, outcomes):
    _, said, job = outcomes
    number = list(MALICIOUS).index(name)
    assert said[number] is not None, f"ended with {job.returncode} before it: {job.stderr[-500:]}"
    assert said[number].startswith("ValueError: ")
    assert MALICIOUS[name][1] in said[number]
    assert said[number].endswith(f": {number:03d}/data_batch_1")
    assert said[number].isprintable()
    assert len(said[number]) < 400


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_a_batch_that_is_no_file_is_refused(make, tmp_path):
    make(tmp_path / "data_batch_1")
    with pytest.raises(ValueError, match=r"expected a file, got something else: .*data_batch_1"):
        datasets.load(tmp_path)


def test_binary_labels_beyond_the_classes_are_refused(batches, tmp_path):
    """As those of CIFAR-100 would be, and pixels that are taken for labels."""
    write_binary(tmp_path, batches)
    with (tmp_path / "data_batch_2.bin").open("r+b") as file:
        file.write(b"\x63")
    with pytest.raises(ValueError, match=r"expected labels from 0 to 9, got 99: .*data_batch_2"):
        datasets.load(tmp_path)


def write_images(folder, colours, count, size=(40, 36)):
    for name, colour in colours.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", size, colour).save(folder / name / f"{i}.png")


COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255)}


def test_image_folder_without_a_test_part(tmp_path):
    write_images(tmp_path, COLOURS, 10)
    (tmp_path / "red" / "notes.txt").write_text("no image")
    (images, labels), (test_images, test_labels) = datasets.load(tmp_path)
    assert images.shape == (16, 3, 32, 32)
    assert test_images.shape == (4, 3, 32, 32)
    assert labels.tolist() == [0] * 8 + [1] * 8  # blue, red
    assert test_labels.tolist() == [0, 0, 1, 1]
    assert torch.equal(images[0, :, 7, 7], torch.tensor(COLOURS["blue"], dtype=torch.uint8))
    assert torch.equal(test_images[-1, :, 7, 7], torch.tensor(COLOURS["red"], dtype=torch.uint8))


def test_image_folder_with_train_and_test(tmp_path):
    write_images(tmp_path / "train", COLOURS, 3)
    write_images(tmp_path / "test", COLOURS, 1)
    (images, labels), (test_images, test_labels) = datasets.load(tmp_path)
    assert (len(images), labels.tolist()) == (6, [0, 0, 0, 1, 1, 1])
    assert (len(test_images), test_labels.tolist()) == (2, [0, 1])


def test_image_folder_with_other_classes_in_test(tmp_path):
    write_images(tmp_path / "train", COLOURS, 3)
    write_images(tmp_path / "test", {"red": COLOURS["red"]}, 1)
    with pytest.raises(ValueError, match=r"expected the same classes .* got \['blue', 'red'\] and \['red'\]"):
        datasets.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"])
def test_a_broken_image_is_named(content, tmp_path):
    write_images(tmp_path, COLOURS, 5)
    (tmp_path / "red" / "3.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"expected an image that Pillow can read, got \w+: .*/red/3\.png$"):
        datasets.load(tmp_path)


def test_image_folder_needs_pillow(tmp_path, monkeypatch):
    write_images(tmp_path, COLOURS, 5)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(RuntimeError, match="pip install pillow"):
        datasets.load(tmp_path)


def test_a_folder_of_nothing(tmp_path):
    with pytest.raises(ValueError, match="expected CIFAR-10's files or a sub-folder of images per class, got neither"):
        datasets.load(tmp_path)


def test_a_folder_that_is_not_there_ends_the_cnn_in_one_line(tmp_path):
    missing = tmp_path / "nothing"
    job = launch("alone", 1, Path(datasets.__file__).with_name("cnn.py"), "--data", missing)
    assert job.returncode == 1
    assert job.stderr == f"--data: expected a folder, got none there: {missing}\n"


def test_a_cifar_folder_without_its_test_batch_ends_the_cnn_in_one_line(batches, tmp_path):
    batches.pop("test_batch")
    write_binary(tmp_path, batches)
    job = launch("alone", 1, Path(datasets.__file__).with_name("cnn.py"), "--data", tmp_path)
    assert job.returncode == 1
    assert job.stderr.startswith("--data: [Errno 2] No such file")
    assert job.stderr.count("\n") == 1


def test_the_cnn_trains_on_a_folder(tmp_path):
    write_images(tmp_path / "images", COLOURS, 10)
    options = ["--data", tmp_path / "images", "--norm", "gn", "--batch-per-rank", 4, "--steps", 12]
    cnn = Path(datasets.__file__).with_name("cnn.py")
    job = launch("alone", 1, cnn, *options, "--out", tmp_path / "record.json", NO_COLOR="1")
    assert job.returncode == 0, job.stderr
    record = json.loads((tmp_path / "record.json").read_text())
    assert (record["data"], record["test_images"], record["test_accuracy"]) == ("images", 4, 1.0)
    assert record["communication_seconds_per_step"] == 0


def test_digits():
    (images, labels), (test_images, test_labels) = datasets.load()
    assert images.shape == (1500, 1, 8, 8)
    assert images.dtype == torch.float32
    assert (images.min(), images.max()) == (0, 1)
    assert (len(labels), len(test_images), len(test_labels)) == (1500, 297, 297)

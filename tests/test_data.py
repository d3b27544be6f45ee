"""Data sets: what is in them, how they are split and transformed, and every way to a file or an error."""

import contextlib
import gzip
import hashlib
import io
import os
import re
import threading
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pooch
import pytest
import scipy.io
import scipy.sparse
import torch
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.model_selection import train_test_split
from sklearn.naive_bayes import BernoulliNB
from sklearn.preprocessing import StandardScaler

from ppl_models import data
from ppl_models.data import loaders, sets
from ppl_models.data.files import IDX, SHA256, SIZES, UPSTREAM

REAL = os.environ.get("PPL_MODELS_DATA", "")
FILES = {"mnist", "fashion_mnist", "binarized_mnist", "omniglot", "xwindows", "news20_w100", "sms_spam", "sms_text"}
needs_files = pytest.mark.skipif(not REAL, reason="PPL_MODELS_DATA is not set")


class Pages(ThreadingHTTPServer):
    """Serves bytes by path: of a path in ``halves`` only the first half, and what it lacks is a 404.

    What is in ``endless`` it sends over and over, up to 256 MB; what is in ``compressed`` it says to have compressed.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), PagesHandler)
        self.pages: dict[str, bytes] = {}
        self.halves: set[str] = set()
        self.endless: set[str] = set()
        self.compressed: set[str] = set()
        self.sent = 0
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class PagesHandler(BaseHTTPRequestHandler):
    server: Pages

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        body = self.server.pages.get(self.path)
        if body is None:
            self.send_error(404)
            return
        self.send_response(200)
        if self.path in self.server.endless:
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                while self.server.sent < 2**28:
                    self.wfile.write(body)
                    self.server.sent += len(body)
            return
        if self.path in self.server.compressed:
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if self.path in self.server.halves else body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Pages]:
    with Pages() as pages:
        thread = threading.Thread(target=pages.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield pages
        pages.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no other place to look in."""
    monkeypatch.delenv("PPL_MODELS_DATA", raising=False)
    monkeypatch.delenv("PPL_MODELS_MIRROR", raising=False)
    monkeypatch.setattr(pooch, "os_cache", lambda name: tmp_path / name)
    return tmp_path / "ppl-models"


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, bytes]], None]:
    """Declares files by their path in the layout, with the hashes and the sizes of the bytes given."""

    def declare(files: dict[str, bytes]) -> None:
        for path, content in files.items():
            monkeypatch.setitem(SHA256, path, hashlib.sha256(content).hexdigest())
            monkeypatch.setitem(SIZES, path, len(content))

    return declare


def files_under(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def idx(values: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes()
    return gzip.compress(header + values.tobytes(), mtime=0)


def tiny_mnist(rows: int = 6) -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    images, labels = (
        rng.integers(0, 256, (2, rows, 28, 28), np.uint8),
        np.arange(2 * rows, dtype=np.uint8) % 10,
    )
    parts = (images[0], labels[:rows], images[1], labels[rows:])
    return {f"mnist/{file}": idx(part) for file, part in zip(IDX, parts, strict=True)}


def mirrored(
    server: Pages, table: Callable[[dict[str, bytes]], None], monkeypatch: pytest.MonkeyPatch
) -> dict[str, bytes]:
    """The files of a tiny MNIST, which the mirror alone has."""
    files = tiny_mnist()
    table(files)
    server.pages = {f"/{path}": content for path, content in files.items()}
    monkeypatch.setenv("PPL_MODELS_MIRROR", server.url)
    for path in files:
        monkeypatch.setitem(UPSTREAM, path, ())
    return files


def cells(words: list[str], nested: bool = False) -> np.ndarray:
    column = np.empty((len(words), 1), object)
    for row, word in enumerate(words):
        column[row, 0] = cells([word]) if nested else word
    return column


def matlab(**variables: object) -> bytes:
    file = io.BytesIO()
    scipy.io.savemat(file, variables, do_compression=True)
    return file.getvalue()


def xwindows_mat(arrays: dict[str, np.ndarray], vocab: list[str]) -> bytes:
    """As upstream: sparse documents, labels from 1, and every word in a cell of a cell."""
    x = {f"x{s}": scipy.sparse.csc_matrix(arrays[f"x{s}"].astype(float)) for s in ("train", "test")}
    y = {f"y{s}": arrays[f"y{s}"].reshape(-1, 1) + 1.0 for s in ("train", "test")}
    return matlab(**x, **y, vocab=cells(vocab, nested=True))


def news_mat(x: np.ndarray, y: np.ndarray, words: list[str], groups: list[str]) -> bytes:
    """As upstream: words by documents, labels from 1 in a row, and cells in a row."""
    return matlab(
        documents=scipy.sparse.csc_matrix(x.T.astype(float)),
        newsgroups=y[None].astype(np.uint8) + 1,
        wordlist=cells(words).T,
        groupnames=cells(groups).T,
    )


def amat(bits: np.ndarray) -> bytes:
    text = np.full((len(bits), 2 * bits.shape[1]), ord(" "), np.uint8)
    text[:, ::2] = bits + ord("0")
    text[:, -1] = ord("\n")
    return text.tobytes()


# scikit-learn's sets


@pytest.mark.parametrize(
    ("name", "train", "test", "features", "classes"),
    [
        ("breast_cancer", 398, 171, 30, 2),
        ("wine", 124, 54, 13, 3),
        ("iris", 105, 45, 4, 3),
        ("digits", 1257, 540, 64, 10),
    ],
)
def test_sets_of_scikit_learn(name: str, train: int, test: int, features: int, classes: int) -> None:
    got = data.load(name)
    assert got.name == name and got.valid is None
    for split, rows in ((got.train, train), (got.test, test)):
        assert split["x"].shape == (rows, features) and split["x"].dtype == torch.float32
        assert split["y"].shape == (rows,) and split["y"].dtype == torch.int64
        assert split["y"].unique().tolist() == list(range(classes))
    assert len(got.features) == features and len(got.classes) == classes
    assert all(isinstance(word, str) for word in got.features + got.classes)


def test_split_is_stratified_and_always_the_same() -> None:
    got = data.load("breast_cancer", dtype=torch.float64)
    x, y = load_breast_cancer(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=0.3, stratify=y, random_state=0)
    for split, expected in ((got.train, (x_train, y_train)), (got.test, (x_test, y_test))):
        np.testing.assert_array_equal(split["x"], expected[0])
        np.testing.assert_array_equal(split["y"], expected[1])
    assert got.train["y"].double().mean() == pytest.approx(y.mean(), abs=0.002)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_standardise_knows_the_training_split_alone(dtype: torch.dtype, tolerance: float) -> None:
    raw, got = data.load("digits", dtype=torch.float64), data.load("digits", standardise=True, dtype=dtype)
    scaler = StandardScaler().fit(raw.train["x"].numpy())
    for split in ("train", "test"):
        expected = scaler.transform(getattr(raw, split)["x"].numpy())
        np.testing.assert_allclose(getattr(got, split)["x"].numpy(), expected, atol=tolerance, rtol=tolerance)
        assert getattr(got, split)["x"].dtype == dtype
    assert got.train["x"].mean(0).abs().max() < tolerance < got.test["x"].mean(0).abs().max()


def test_standardise_only_centres_a_constant_column(monkeypatch: pytest.MonkeyPatch) -> None:
    x = {"train": np.full((1000, 1), 0.1), "test": np.array([[0.1], [2.1]])}
    monkeypatch.setitem(loaders.LOADERS, "constant", lambda: loaders.Raw(x, {}, ("constant",)))
    got = data.load("constant", standardise=True)
    assert (got.train["x"] == 0).all()
    torch.testing.assert_close(got.test["x"], torch.tensor([[0.0], [2.0]]))
    assert set(got.train) == {"x"}


def test_binarise_at_the_middle_of_the_training_range_or_of_the_scale() -> None:
    raw, got = data.load("iris"), data.load("iris", binarise=True)
    middle = (raw.train["x"].min(0).values + raw.train["x"].max(0).values) / 2
    assert torch.equal(got.test["x"], (raw.test["x"] > middle).float())
    raw, got = data.load("digits"), data.load("digits", binarise=True)
    assert torch.equal(got.train["x"], (raw.train["x"] > 8).float())
    assert raw.train["x"].max() == load_digits().data.max() == 16


def test_half_precision_is_rounded_last() -> None:
    wide, half = (data.load("wine", standardise=True, dtype=d).train["x"] for d in (torch.float32, torch.float16))
    assert torch.equal(wide.half(), half)


# Real files


@needs_files
@pytest.mark.parametrize(
    ("name", "train", "test"),
    [
        (
            "mnist",
            [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949],
            [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009],
        ),
        ("fashion_mnist", [6000] * 10, [1000] * 10),
    ],
)
def test_images_with_labels(name: str, train: list[int], test: list[int]) -> None:
    got = data.load(name)
    for split, counts in ((got.train, train), (got.test, test)):
        assert split["x"].shape == (sum(counts), 784) and split["y"].bincount().tolist() == counts
        assert split["x"].min() == 0 and split["x"].max() == 1
        levels = split["x"] * 255
        assert torch.equal(levels, levels.round())
    assert got.features[29] == "row_1_column_1" and len(got.features) == 784
    assert (got.classes[0], got.classes[9]) == {"mnist": ("0", "9")}.get(name, ("T-shirt/top", "Ankle boot"))
    binary = data.load(name, binarise=True)
    assert torch.equal(binary.test["x"], (got.test["x"] > 0.5).float())


@needs_files
def test_images_without_labels() -> None:
    got = data.load("binarized_mnist")
    assert got.valid is not None and got.classes == ()
    assert [tuple(s["x"].shape) for s in (got.train, got.valid, got.test)] == [(50000, 784)] + [(10000, 784)] * 2
    for split in (got.train, got.valid, got.test):
        assert set(split) == {"x"} and bool(((split["x"] == 0) | (split["x"] == 1)).all())
        assert 0 < float(split["x"].mean()) < 1
    # A static binarization has the grey images' mean, and the test images are those of MNIST, by digit.
    grey = data.load("mnist").test
    sorted_grey = grey["x"][grey["y"].sort(stable=True).indices]
    assert (got.test["x"] - sorted_grey).mean().abs() < 1e-3
    assert got.test["x"][sorted_grey == 0].sum() == 0

    omniglot = data.load("omniglot")
    assert omniglot.train["x"].shape == (19280, 784) and omniglot.test["x"].shape == (13180, 784)
    assert set(omniglot.train) == {"x"} and omniglot.classes == () and omniglot.valid is None
    assert omniglot.train["x"].min() == 0 and omniglot.train["x"].max() == 1
    # A page is mostly paper.
    assert 0.02 < omniglot.train["x"].mean() < 0.2


@needs_files
def test_xwindows_gives_the_known_accuracies() -> None:
    got = data.load("xwindows")
    assert got.train["x"].shape == got.test["x"].shape == (900, 600)
    assert got.train["y"].bincount().tolist() == got.test["y"].bincount().tolist() == [450, 450]
    bayes = BernoulliNB().fit(got.train["x"].numpy(), got.train["y"].numpy())
    scores = [bayes.score(s["x"].numpy(), s["y"].numpy()) for s in (got.train, got.test)]
    assert scores == pytest.approx([0.9167, 0.8133], abs=5e-5)
    motif = got.train["x"][:, got.features.index("motif")]
    assert motif[got.train["y"] == got.classes.index("X-windows")].sum() > 10 * motif[got.train["y"] == 1].sum()
    assert torch.equal(data.load("xwindows", binarise=True).train["x"], got.train["x"])


@needs_files
def test_news20_w100() -> None:
    got = data.load("news20_w100")
    assert got.train["x"].shape == (11369, 100) and got.test["x"].shape == (4873, 100)
    assert (got.train["y"].bincount() + got.test["y"].bincount()).tolist() == [4605, 3519, 2657, 5461]
    assert got.classes == ("comp.*", "rec.*", "sci.*", "talk.*")
    team = got.train["x"][:, got.features.index("team")]
    assert team[got.train["y"] == 1].mean() > 10 * team[got.train["y"] == 0].mean()


@needs_files
def test_sms_spam_counts_words_of_the_training_split() -> None:
    got = data.load("sms_spam")
    counts = got.train["y"].bincount() + got.test["y"].bincount()
    assert counts.tolist() == [4827, 747] and got.classes == ("ham", "spam")
    assert len(got.train["y"]) == 3924 and len(got.features) == got.train["x"].shape[1] == got.test["x"].shape[1]
    assert (got.train["x"] > 0).sum(0).min() == 2 and got.train["x"].max() > 2
    free = got.train["x"][:, got.features.index("free")]
    assert free[got.train["y"] == 1].mean() > 5 * free[got.train["y"] == 0].mean()
    assert torch.equal(data.load("sms_spam", binarise=True).test["x"], (got.test["x"] > 0).float())


@needs_files
def test_sms_text_has_the_letters_of_the_same_messages() -> None:
    got, words = data.load("sms_text"), data.load("sms_spam")
    assert got.train["x"].shape == (3924, 160) and got.classes == words.classes
    assert torch.equal(got.train["y"], words.train["y"])
    code = {c: k for k, c in enumerate(got.symbols)}
    letters = (*got.symbols[: code["other"]], "_", "_")
    free = "".join(letters[k] for k in got.train["x"].flatten().long().tolist()).count("free")
    assert free > 0.9 * words.train["x"][:, words.features.index("free")].sum()


@needs_files
def test_files_of_upstream_give_the_same_sets(
    cache: Path, table: Callable[[dict[str, bytes]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Upstream's files written back from the real ones have the hashes of the table, and load as equals."""
    sets = ("binarized_mnist", "sms_spam", "xwindows", "news20_w100")
    monkeypatch.setenv("PPL_MODELS_DATA", REAL)
    expected = {name: data.load(name) for name in sets}
    for folder in ("text", "binarized_mnist"):
        (cache / folder).mkdir(parents=True)
    sms = gzip.decompress((Path(REAL) / "text/SMSSpamCollection.gz").read_bytes())
    (cache / "text/SMSSpamCollection").write_bytes(sms)
    for split in ("train", "valid", "test"):
        bits = getattr(expected["binarized_mnist"], split)["x"].numpy().astype(np.uint8)
        (cache / f"binarized_mnist/binarized_mnist_{split}.amat").write_bytes(amat(bits))
    x = expected["xwindows"]
    arrays = {f"{k}{s}": getattr(x, s)[k].numpy() for k in "xy" for s in ("train", "test")}
    (cache / "text/XwindowsDocData.mat").write_bytes(xwindows_mat(arrays, list(x.features)))
    with np.load(Path(REAL) / "text/news20_w100.npz") as z:
        bits, y, words, groups = np.unpackbits(z["x"], axis=1, count=100), z["y"], z["words"], z["groups"]
    (cache / "text/20news_w100.mat").write_bytes(news_mat(bits, y, words.tolist(), groups.tolist()))
    # Upstream's two files, which another program wrote, hold the same numbers.
    table({f"text/{file.name}": file.read_bytes() for file in (cache / "text").glob("*.mat")})
    monkeypatch.delenv("PPL_MODELS_DATA")
    for name in sets:
        got = data.load(name)
        for split in ("train", "test"):
            for key, values in getattr(expected[name], split).items():
                assert torch.equal(getattr(got, split)[key], values), (name, split, key)
        assert (got.features, got.classes) == (expected[name].features, expected[name].classes)


# Downloads


@pytest.mark.parametrize("fault", ["half", "wrong", "missing"])
@pytest.mark.parametrize("source", ["mirror", "upstream"])
def test_failed_download_leaves_nothing_and_the_next_one_succeeds(
    fault: str,
    source: str,
    server: Pages,
    cache: Path,
    table: Callable[[dict[str, bytes]], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    files = tiny_mnist()
    table(files)
    server.pages = {f"/base/{path}": content for path, content in files.items()}
    for path in files:
        urls = (f"{server.url}/base/{path}",) if source == "upstream" else ()
        monkeypatch.setitem(UPSTREAM, path, urls)
    if source == "mirror":
        monkeypatch.setenv("PPL_MODELS_MIRROR", f"{server.url}/base/")

    monkeypatch.setattr(pooch.get_logger(), "handlers", [caplog.handler])
    first = f"/base/mnist/{IDX[0]}"
    good = server.pages[first]
    if fault == "half":
        server.halves = {first}
    elif fault == "wrong":
        server.pages[first] = good[::-1]
    else:
        del server.pages[first]
    reason = {"half": "Error: ", "wrong": "does not match the known hash", "missing": "404 Client Error"}[fault]
    message = f"^mnist/{IDX[0]}: not in .* not downloaded .*{server.url}{first}: .*{reason}"
    with pytest.raises(FileNotFoundError, match=message) as caught:
        data.load("mnist")
    assert "\n" not in str(caught.value)
    assert files_under(cache) == []

    server.pages[first], server.halves = good, set()
    got = data.load("mnist")
    assert got.train["x"].shape == got.test["x"].shape == (6, 784)
    assert got.test["y"].tolist() == [6, 7, 8, 9, 0, 1]
    assert files_under(cache) == sorted(IDX)

    server.pages, asked = {}, len(server.asked)
    assert torch.equal(data.load("mnist").train["x"], got.train["x"])
    assert len(server.asked) == asked
    assert capfd.readouterr() == ("", "") and not caplog.records


def test_mirror_comes_before_upstream_and_upstream_after_a_broken_mirror(
    server: Pages,
    cache: Path,
    table: Callable[[dict[str, bytes]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = tiny_mnist()
    table(files)
    broken, *whole = files
    server.pages = {f"/mirror/{path}": files[path] for path in whole}
    server.pages |= {f"/upstream/{path}": content for path, content in files.items()}
    for path in files:
        monkeypatch.setitem(UPSTREAM, path, (f"{server.url}/upstream/{path}",))
    monkeypatch.setenv("PPL_MODELS_MIRROR", f"{server.url}/mirror")
    data.load("mnist")
    assert server.asked == [
        f"/mirror/{broken}",
        f"/upstream/{broken}",
        *(f"/mirror/{path}" for path in whole),
    ]


def test_damaged_file_in_the_cache_is_fetched_anew(
    server: Pages,
    cache: Path,
    table: Callable[[dict[str, bytes]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = tiny_mnist()
    table(files)
    server.pages = {f"/{path}": content for path, content in files.items()}
    monkeypatch.setenv("PPL_MODELS_MIRROR", server.url)
    data.load("mnist")
    path = cache / "mnist" / IDX[0]
    path.write_bytes(b"damaged")
    assert data.load("mnist").train["x"].shape == (6, 784)
    assert path.read_bytes() == files[f"mnist/{IDX[0]}"]


def test_texts_of_the_static_binarization(
    server: Pages,
    cache: Path,
    table: Callable[[dict[str, bytes]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(0)
    bits = {s: rng.integers(0, 2, (n, 784), np.uint8) for s, n in (("train", 5), ("valid", 3), ("test", 2))}
    files = {f"binarized_mnist/binarized_mnist_{split}.amat": amat(rows) for split, rows in bits.items()}
    table(files)
    server.pages = {f"/{path}": content for path, content in files.items()}
    urls = tuple(f"{server.url}/{path}" for path in files)
    monkeypatch.setitem(UPSTREAM, "binarized_mnist/binarized_mnist.npz", urls)
    got = data.load("binarized_mnist")
    assert got.valid is not None
    for split, expected in bits.items():
        np.testing.assert_array_equal(getattr(got, split)["x"], expected)


def test_a_matlab_file_is_read_after_its_hash_was_checked(
    server: Pages, cache: Path, table: Callable[[dict[str, bytes]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 2, (40, 12), np.uint8), np.arange(40) % 2
    words = [f"word{column}" for column in range(12)]
    good = news_mat(x, y, words, ["a.*", "b.*"])
    other = news_mat(1 - x, y, words, ["a.*", "b.*"])
    table({"text/20news_w100.mat": good})
    monkeypatch.setitem(UPSTREAM, "text/news20_w100.npz", (f"{server.url}/20news_w100.mat",))
    read, loadmat = [], scipy.io.loadmat
    monkeypatch.setattr(scipy.io, "loadmat", lambda path: read.append(path) or loadmat(path))
    for bad in (other[: len(good)], good[: len(good) // 2], b"not a matlab file"):
        server.pages = {"/20news_w100.mat": bad}
        with pytest.raises(FileNotFoundError, match=r"text/news20_w100.npz: .*does not match the known hash"):
            data.load("news20_w100")
        assert files_under(cache) == [] and read == []
    server.pages = {"/20news_w100.mat": good}
    got = data.load("news20_w100")
    assert got.classes == ("a.*", "b.*") and got.features == tuple(words)
    x_train, x_test, y_train, _ = train_test_split(x, y, test_size=0.3, stratify=y, random_state=0)
    np.testing.assert_array_equal(got.train["x"], x_train)
    np.testing.assert_array_equal(got.test["x"], x_test)
    np.testing.assert_array_equal(got.train["y"], y_train)


def test_matlab_file_with_a_split(
    server: Pages, cache: Path, table: Callable[[dict[str, bytes]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    arrays = {f"x{split}": rng.integers(0, 2, (6, 12), np.uint8) for split in ("train", "test")}
    arrays |= {f"y{split}": rng.integers(0, 2, 6, np.uint8) for split in ("train", "test")}
    content = xwindows_mat(arrays, [f"word{column}" for column in range(12)])
    table({"text/XwindowsDocData.mat": content})
    server.pages = {"/XwindowsDocData.mat": content}
    monkeypatch.setitem(UPSTREAM, "text/xwindows.npz", (f"{server.url}/XwindowsDocData.mat",))
    got = data.load("xwindows")
    assert got.features[11] == "word11"
    np.testing.assert_array_equal(got.test["x"], arrays["xtest"])
    np.testing.assert_array_equal(got.train["y"], arrays["ytrain"])


def test_a_download_that_is_longer_than_its_file_is_broken_off(
    server: Pages, cache: Path, table: Callable[[dict[str, bytes]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = mirrored(server, table, monkeypatch)
    first = f"/mnist/{IDX[0]}"
    server.endless = {first}
    size = len(files[f"mnist/{IDX[0]}"])
    with pytest.raises(FileNotFoundError, match=f"{server.url}{first}: ValueError: expected {size} bytes, got more"):
        data.load("mnist")
    # What the sockets hold, and no more.
    assert server.sent < 2**25 and files_under(cache) == []


def test_a_download_that_grows_when_unpacked_is_not_unpacked(
    server: Pages, cache: Path, table: Callable[[dict[str, bytes]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = mirrored(server, table, monkeypatch)
    path = f"mnist/{IDX[0]}"
    bomb = gzip.compress(bytes(2**26), mtime=0)
    server.pages = {f"/{path}": bomb}
    server.compressed = {f"/{path}"}
    monkeypatch.setitem(SIZES, path, 2**20)
    tracemalloc.start()
    with pytest.raises(FileNotFoundError, match="does not match the known hash"):
        data.load("mnist")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(bomb) < 2**17 and peak < 2**23 and files_under(cache) == []
    # A server that sends a compressed file as such, and says so, is understood.
    server.pages = {f"/{name}": content for name, content in files.items()}
    assert data.load("mnist").train["x"].shape == (6, 784)


def test_bag_of_words_from_the_plain_file(
    server: Pages,
    cache: Path,
    table: Callable[[dict[str, bytes]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = [f"ham\tsee you at home\u2028{word}" for word in ("six", "seven", "eight", "nine", "ten")]
    lines += [line.replace("home", "work") for line in lines]
    lines += [f"spam\t{win} a prize {word}" for win in ("win win win", "win") for word in ("six", "seven", "eight")]
    content = "".join(f"{line}\n" for line in lines).encode()
    table({"text/SMSSpamCollection": content})
    server.pages = {"/SMSSpamCollection": content}
    monkeypatch.setitem(UPSTREAM, "text/SMSSpamCollection.gz", (f"{server.url}/SMSSpamCollection",))
    got = data.load("sms_spam")
    assert Counter(torch.cat([got.train["y"], got.test["y"]]).tolist()) == {0: 10, 1: 6}
    win = got.train["x"][:, got.features.index("win")]
    assert set(win[got.train["y"] == 1].tolist()) == {1.0, 3.0} and win[got.train["y"] == 0].sum() == 0


# Errors


def test_descriptions_are_lines_of_prose_letter_by_letter() -> None:
    got = data.load("descriptions")
    x, symbols = got.train["x"], got.symbols
    assert x.shape == (len(x), 80) and len(got.features) == 80 and len(x) > 2 * len(got.test["x"]) > 80
    assert symbols[:3] == (" ", "a", "b") and symbols[-2:] == ("other", "end") and len(set(symbols)) == len(symbols)
    lines = ["".join(symbols[int(k)] for k in row if k < len(symbols) - 1) for row in x]
    assert any("wine" in line for line in lines)
    # Once a line has ended it stays so.
    ended = x == len(symbols) - 1
    assert bool((ended[:, 1:] >= ended[:, :-1]).all())


def test_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"^name: expected one of breast_cancer, .*, got 'minst' \(nearest: mnist"):
        data.load("minst")
    with pytest.raises(ValueError, match=r"got 'qqq' \(nearest: none\)$"):
        data.load("qqq")
    assert data.names() == tuple(loaders.LOADERS) and len(data.names()) == 22


def test_arguments_that_cannot_be() -> None:
    said = r"^standardise, binarise, unit: expected at most one .* got standardise, binarise$"
    with pytest.raises(ValueError, match=said):
        data.load("iris", standardise=True, binarise=True)
    with pytest.raises(ValueError, match="^unit: expected images, got iris$"):
        data.load("iris", unit=True)
    with pytest.raises(ValueError, match=r"^dtype: expected a floating point type, got torch.int64$"):
        data.load("iris", dtype=torch.int64)


def test_missing_file_says_where_it_was_looked_for(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    omniglot = r"^omniglot/omniglot_28x28.npz: not in PPL_MODELS_DATA \(%s\), not in the cache \(.*ppl-models\) and "
    omniglot += r"not downloaded \(no URL is known for it\): set PPL_MODELS_DATA to .* or PPL_MODELS_MIRROR to .*$"
    with pytest.raises(FileNotFoundError, match=omniglot % "not set"):
        data.load("omniglot")
    monkeypatch.setenv("PPL_MODELS_DATA", "/no/such/folder")
    with pytest.raises(FileNotFoundError, match=omniglot % "/no/such/folder"):
        data.load("omniglot")


def test_missing_file_names_the_url_that_did_not_answer(
    server: Pages, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{server.url}/SMSSpamCollection"
    monkeypatch.setitem(UPSTREAM, "text/SMSSpamCollection.gz", (url,))
    with pytest.raises(FileNotFoundError, match=rf"not downloaded \({url}: HTTPError: 404 .*\): set PPL_MODELS"):
        data.load("sms_spam")


def test_damaged_file_in_the_directory_is_named(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "files" / "text" / "xwindows.npz"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"damaged")
    monkeypatch.setenv("PPL_MODELS_DATA", str(tmp_path / "files"))
    known, got = SHA256["text/xwindows.npz"], hashlib.sha256(b"damaged").hexdigest()
    with pytest.raises(ValueError, match=f"^.*xwindows.npz: expected a file with sha256 {known}, got {got}$"):
        data.load("xwindows")
    assert path.read_bytes() == b"damaged"


# Simulated rows


@pytest.mark.parametrize("classes", [2, 3])
def test_simulated_rows_have_the_moments_of_their_truth(classes: int) -> None:
    rows = 200_000
    sample, truth = data.simulate_naive_bayes(rows, 5, classes, dtype=torch.float64)
    assert sample["x"].shape == (rows, 5) and sample["y"].shape == (rows,) and sample["y"].dtype == torch.int64
    assert truth["weights"].sum() == pytest.approx(1)
    for label in range(classes):
        x = sample["x"][sample["y"] == label]
        variance = truth["variances"][label]
        errors = {
            "weights": (len(x) / rows - truth["weights"][label]) * (rows**0.5) / 0.5,
            "means": (x.mean(0) - truth["means"][label]) / (variance / len(x)).sqrt(),
            "variances": (x.var(0) / variance - 1) / (2 / len(x)) ** 0.5,
        }
        assert all(error.abs().max() < 4.5 for error in errors.values()), errors


def test_simulated_rows_depend_on_their_seed_alone() -> None:
    state = torch.get_rng_state()
    first, again, other = (data.simulate_naive_bayes(100, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first["x"], again["x"]) and torch.equal(first["y"], again["y"])
    assert not torch.equal(first["x"], other["x"])
    assert torch.equal(state, torch.get_rng_state())
    assert first["x"].shape == (100, 30) and first["x"].dtype == torch.float32


def test_simulation_refuses_nothing_to_simulate() -> None:
    with pytest.raises(ValueError, match=r"^rows: expected an integer of at least 1, got 0$"):
        data.simulate_naive_bayes(0)
    with pytest.raises(ValueError, match=r"^dtype: expected a floating point type, got torch.int32$"):
        data.simulate_naive_bayes(3, dtype=torch.int32)


@pytest.mark.parametrize(("name", "count", "spread"), [("ring", 8, 0.01), ("grid", 25, 0.05)])
def test_modes_are_where_they_are_said_to_be(name: str, count: int, spread: float) -> None:
    x, centres, deviation = data.simulate_modes(name, 20_000, seed=3)
    assert x.shape == (20_000, 2) and centres.shape == (count, 2) and deviation == spread
    distance, nearest = torch.cdist(x, centres).min(1)
    assert float(distance.max()) < 6 * spread
    # The mean square of a distance in the plane is twice the variance.
    assert float(distance.square().mean()) == pytest.approx(2 * spread**2, rel=0.03)
    assert int(nearest.bincount().min()) > 0.85 * 20_000 / count
    assert torch.equal(data.simulate_modes(name, 20_000, seed=3)[0], x)


def test_modes_of_another_name_are_refused() -> None:
    with pytest.raises(ValueError, match="name: expected ring or grid, got 'square'"):
        data.simulate_modes("square", 10)


def test_pixels_in_the_unit_interval() -> None:
    whole, unit = data.load("digits"), data.load("digits", unit=True)
    assert float(whole.train["x"].max()) == 16 and float(unit.train["x"].max()) == 1
    assert torch.equal(16 * unit.test["x"], whole.test["x"])


def test_turned_digits_are_two_domains_of_other_rows() -> None:
    whole, got = data.load("digits", unit=True), data.load("turned_digits", unit=True)
    for split, digits in ((got.train, whole.train["x"]), (got.test, whole.test["x"])):
        a, b = split["a"], split["b"]
        upright = torch.rot90(1 - b.unflatten(1, (8, 8)), -1, (1, 2)).flatten(1)
        assert a.shape == b.shape == (len(digits) // 2, 64)
        assert torch.equal(a, digits[: len(a)]) and torch.equal(upright, digits[-len(b) :])
    assert got.classes == () and got.shape == (8, 8)


def test_few_labels_are_kept_equally_many_per_class() -> None:
    whole, got = data.load("digits"), data.load("digits", labels=30)
    known = ~got.train["y"].isnan()
    assert got.train["y"].dtype == got.test["y"].dtype == torch.float32
    assert got.train["y"][known].long().bincount().tolist() == [3] * 10
    assert torch.equal(got.train["y"][known].long(), whole.train["y"][known])
    assert torch.equal(got.test["y"].long(), whole.test["y"])
    other = data.hide_labels(whole.train["y"].float(), 30, seed=1)
    assert not torch.equal(other.isnan(), ~known)
    for count in (35, 0, 2000):
        with pytest.raises(ValueError, match=f"labels: expected a multiple of 10 .* got {count}"):
            data.load("digits", labels=count)
    with pytest.raises(ValueError, match="labels: expected a set with labels, got descriptions"):
        data.load("descriptions", labels=10)


@pytest.mark.parametrize(
    ("name", "shape", "levels"), [("digits", (8, 8), 17), ("wine", None, None), ("descriptions", None, None)]
)
def test_images_have_a_shape_and_levels(name: str, shape: tuple[int, int] | None, levels: int | None) -> None:
    got = data.load(name)
    assert got.shape == shape and got.levels == levels
    assert data.load(name, binarise=True).levels == (levels and 2)


@needs_files
def test_pixels_of_files_have_their_levels() -> None:
    for name, levels in (("binarized_mnist", 2), ("mnist", 256)):
        got = data.load(name)
        assert got.shape == (28, 28) and got.levels == levels


@pytest.mark.parametrize("name", data.names())
def test_rows_to_hold_out_that_are_also_rows_to_fit_are_counted_and_said(name: str) -> None:
    if name in FILES and not REAL:
        pytest.skip("PPL_MODELS_DATA is not set")
    got = data.load(name)
    columns = [n for n in got.train if n != "y"]
    groups = [["a"], ["b"]] if "a" in columns else [columns]
    found = 0
    for names in groups if got.test and columns else ():
        # By the values that are not zero, and where they stand.
        train, test = (
            [
                (*np.flatnonzero(row).tolist(), *row[row != 0].tolist())
                for row in np.concatenate([split[n].reshape(len(split[n]), -1).numpy() for n in names], 1)
            ]
            for split in (got.train, got.test)
        )
        known = set(train)
        found += sum(row in known for row in test)
    count = len(got.test[columns[0]]) if found else 0
    said = re.findall(rf"(\d+) of (\d+)\s+in\s+``{name}``", sets.__doc__ or "")
    assert got.repeated == found
    assert said == ([(str(found), str(count))] if found else [])


def test_copies_of_a_text_are_on_one_side_in_the_same_order_as_without_them() -> None:
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 3, (200, 3))
    labels = (rows.sum(1) > 2).astype(int)
    at = loaders.split_distinct(rows, labels)
    assert sorted([*at["train"], *at["test"]]) == list(range(200))
    assert not {tuple(r) for r in rows[at["train"]]} & {tuple(r) for r in rows[at["test"]]}
    distinct = np.arange(200)[:, None]
    at = loaders.split_distinct(distinct, labels)
    train, test = train_test_split(np.arange(200), test_size=0.3, stratify=labels, random_state=0)
    assert at["train"].tolist() == train.tolist() and at["test"].tolist() == test.tolist()


def test_seeds_are_integers_from_zero_by_name() -> None:
    calls = [
        lambda seed: data.simulate_naive_bayes(10, seed=seed)[0]["x"],
        lambda seed: data.simulate_modes("ring", 10, seed=seed)[0],
        lambda seed: data.hide_labels(torch.tensor([0.0, 1.0] * 5), 4, seed=seed),
    ]
    for call in calls:
        assert torch.equal(call(3).nan_to_num(-1), call(np.int64(3)).nan_to_num(-1))
        for seed in (-1, 1.5, "a", None):
            with pytest.raises(ValueError, match=f"^seed: expected an integer of at least 0, got {seed!r}$"):
                call(seed)

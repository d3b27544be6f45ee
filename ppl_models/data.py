r"""Real data sets by name, and simulated ones with the truth that made them.

:func:`load` returns a :class:`Dataset`: rows to fit and rows to hold out. A set without a split of its
own is split once and for all (30 % held out, stratified by label, seed 0), so that two figures on one
set can be compared. From scikit-learn come ``breast_cancer``, ``wine``, ``iris`` and ``digits``; from files:

- ``mnist`` (LeCun et al. 1998) and ``fashion_mnist`` (Xiao et al. 2017), with their own splits;
- ``binarized_mnist``, the static binarization of Larochelle and Murray (2011), in three splits without
  labels. The test images are MNIST's sorted by digit: they are not shuffled;
- ``omniglot`` (Lake et al. 2015) averaged down to 28 x 28: background is train, evaluation is test. This
  is *not* the 28 x 28 file of Burda et al. (2016), so likelihoods cannot be held against that literature.
  No character is in both splits, so there are no labels;
- ``xwindows`` (Murphy 2012), documents on X-windows or MS-windows as occurrences of 600 words;
- ``news20_w100`` (Roweis), newsgroup postings as occurrences of 100 words;
- ``sms_spam`` (Almeida et al. 2011), messages as counts of the words that at least two of the messages
  in the training split contain.

Each file is looked for in the directory ``PPL_MODELS_DATA`` (an environment variable), then in the cache
``pooch.os_cache("ppl-models")``, then at the URL ``PPL_MODELS_MIRROR``, then upstream. Directory, cache
and mirror share one layout, and every file is held against a known SHA-256.
"""

import difflib
import gzip
import hashlib
import os
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pooch
import torch
from torch import Tensor

Arrays = dict[str, np.ndarray[Any, Any]]

# In the form of `sha256sum`, by the path in the layout. Upstream's own files stand beside those that were
# made of them. The bytes of the two `.mat` files are on no record: their line is the hash of the numbers.
_TABLE = """\
440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609  mnist/train-images-idx3-ubyte.gz
3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c  mnist/train-labels-idx1-ubyte.gz
8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6  mnist/t10k-images-idx3-ubyte.gz
f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6  mnist/t10k-labels-idx1-ubyte.gz
3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84  fashion_mnist/train-images-idx3-ubyte.gz
a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845  fashion_mnist/train-labels-idx1-ubyte.gz
346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073  fashion_mnist/t10k-images-idx3-ubyte.gz
67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5  fashion_mnist/t10k-labels-idx1-ubyte.gz
50de2c8299a5a297789293ab2c30f6fc3cb8c359a15e5e88d5501aa18ebb8fa5  binarized_mnist/binarized_mnist.npz
ad693b29f94c14277b095f5238ddefbbdaaae0939789dd2f4f0205278cee3e4d  binarized_mnist/binarized_mnist_train.amat
1de3d397c40fe8eeb33dafd4099a1f665ec01e96d9be234aaeeac8a34930e2e2  binarized_mnist/binarized_mnist_valid.amat
e6687bfea3f820c174f33b7865140b2a2dd2930ef786f35d45795fc193b5ab2c  binarized_mnist/binarized_mnist_test.amat
2fe18524c0a251017c43a4a790ad8b3b199fe61fa2d06cb0b34dfa87dcef117e  omniglot/omniglot_28x28.npz
a2d76b394a84df0205cfa21c784cb66407d34cd09fbd8b272a15078bcdc00904  text/xwindows.npz
d935d55b143dc6a5cb9c17f75299ac4e1d163d1e9ed215942ad0829a70b51142  text/XwindowsDocData.mat
342dec7cfde24c2332006f52d199d8a22f8c752a5428c95066cf96c74e6c7378  text/news20_w100.npz
693cd8a86fe77ebd01f4b61d1d1ae1be88e59293b21c0e5546068a1b4fd47478  text/20news_w100.mat
8fd20918904042e5104c4d5d22642f1332b0bc670c55df3a8688a1ea7b2e9e8d  text/SMSSpamCollection.gz
7d039a24a6083ed9ef0f806ebad56bbb976e3aeb8de05669173bfdc4996c239d  text/SMSSpamCollection
"""
_SHA256 = {path: sha256 for sha256, path in map(str.split, _TABLE.splitlines())}
_GITHUB = "https://raw.githubusercontent.com"
_MNIST = f"{_GITHUB}/fgnt/mnist/ae608a02b796c9ee908c082585a5f006fe05258e"
_FASHION = f"{_GITHUB}/zalandoresearch/fashion-mnist/b2617bb6d3ffa2e429640350f613e3291e10b141/data/fashion"
_AMAT = "http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/binarized_mnist"
_MAT = f"{_GITHUB}/probml/probml-data/f74e6f00ef1570f5b3843c49818d0bfa6b473069/data"
_SMS = (
    f"{_GITHUB}/learn-co-students/dsc-document-classification-with-naive-bayes-lab-online-ds-pt-051319"
    "/2f98ca443ecd26e1088b369260f1e9782e2e36fc/SMSSpamCollection"
)
_IDX = tuple(
    f"{f}-ubyte.gz" for f in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
)
_UPSTREAM: dict[str, tuple[str, ...]] = {
    **{f"mnist/{file}": (f"{_MNIST}/{file}",) for file in _IDX},
    **{f"fashion_mnist/{file}": (f"{_FASHION}/{file}",) for file in _IDX},
    "binarized_mnist/binarized_mnist.npz": tuple(f"{_AMAT}_{s}.amat" for s in ("train", "valid", "test")),
    "omniglot/omniglot_28x28.npz": (),
    "text/xwindows.npz": (f"{_MAT}/XwindowsDocData.mat",),
    "text/news20_w100.npz": (f"{_MAT}/20news_w100.mat",),
    "text/SMSSpamCollection.gz": (_SMS,),
}
_ALPHABET = " abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'()&/-"
_CLOTHES = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"


@dataclass(frozen=True)
class Dataset:
    """Rows to fit and rows to hold out.

    Attributes:
        name: The name that :func:`load` knows it by.
        train: ``x``, a floating point tensor of shape (rows, features), and where there are labels ``y``,
            int64 of shape (rows,), an index into ``classes``.
        test: The same names.
        features: A name for every column of ``x``.
        classes: A name for every label, ``()`` without labels.
        valid: The same names, where the set has a third split.
        symbols: Of a set of texts, what each code in ``x`` stands for.
    """

    name: str
    train: dict[str, Tensor]
    test: dict[str, Tensor]
    features: tuple[str, ...]
    classes: tuple[str, ...]
    valid: dict[str, Tensor] | None = None
    symbols: tuple[str, ...] = ()


def names() -> tuple[str, ...]:
    """The names that :func:`load` knows."""
    return tuple(_LOADERS)


def load(
    name: str, *, standardise: bool = False, binarise: bool = False, dtype: torch.dtype = torch.float32
) -> Dataset:
    r"""A data set by name, downloaded where it is not at hand.

    Args:
        name: One of :func:`names`.
        standardise: Subtract the mean of every column and divide by its standard deviation (that of the
            population), both of the training split alone. A column that is constant there is centred only.
        binarise: 1 where x lies above a threshold, else 0. The threshold is half of the full scale for
            images (0.5; 8 for ``digits``), 0 for counts, and else, column by column, halfway between the
            smallest and the largest value in the training split. Binary sets stay as they are.
        dtype: Floating point type of ``x``. Pixels are scaled to [0, 1], those of ``digits`` go to 16.

    Raises:
        ValueError: For an unknown name, for both transformations at once, for an integer ``dtype``, and
            for a file in ``PPL_MODELS_DATA`` that has not the SHA-256 that it should have.
        FileNotFoundError: For a file that is nowhere to be had.

    Example:
        >>> wine = load("wine", standardise=True)
        >>> wine.train["x"].shape, wine.test["x"].shape, wine.classes
        (torch.Size([124, 13]), torch.Size([54, 13]), ('class_0', 'class_1', 'class_2'))
    """
    if name not in _LOADERS:
        near = ", ".join(difflib.get_close_matches(str(name), _LOADERS, cutoff=0.4)) or "none"
        raise ValueError(f"name: expected one of {', '.join(_LOADERS)}, got {name!r} (nearest: {near})")
    if standardise and binarise:
        raise ValueError("standardise, binarise: expected at most one of them to be True, got both")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype: expected a floating point type, got {dtype}")
    raw = _LOADERS[name]()
    wide = torch.promote_types(dtype, torch.float32)
    x = {split: torch.tensor(values, dtype=wide).div_(raw.scale) for split, values in raw.x.items()}
    if standardise:
        x = _standardised(x)
    elif binarise:
        threshold = (x["train"].amin(0) + x["train"].amax(0)) / 2 if raw.threshold is None else raw.threshold
        x = {split: values > threshold for split, values in x.items()}
    splits = {split: {"x": values.to(dtype)} for split, values in x.items()}
    for split, labels in raw.y.items():
        splits[split]["y"] = torch.tensor(labels, dtype=torch.int64)
    return Dataset(name, splits["train"], splits["test"], raw.features, raw.classes, splits.get("valid"), raw.symbols)


def simulate_naive_bayes(
    rows: int, features: int = 30, classes: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    r"""Rows of a Gaussian naive Bayes model, and the parameters that made them.

    .. math::
        \pi \sim \mathrm{Dirichlet}(5, \dots, 5), \quad \mu_{kd} \sim N(0, 1), \quad
        \log_4 \sigma^2_{kd} \sim U(-1, 1), \quad
        y_n \sim \mathrm{Categorical}(\pi), \quad x_{nd} \sim N(\mu_{y_n d}, \sigma^2_{y_n d})

    Beside the result no more than a block of rows is held in memory, and torch's global generator is
    left alone.

    Returns:
        The data, ``x`` of shape (rows, features) and ``y`` of shape (rows,), and the truth: ``weights``
        of shape (classes,), ``means`` and ``variances`` of shape (classes, features).

    Raises:
        ValueError: For a count below 1 and for an integer ``dtype``.
    """
    for argument, count in (("rows", rows), ("features", features), ("classes", classes)):
        if count < 1:
            raise ValueError(f"{argument}: expected at least 1, got {count}")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype: expected a floating point type, got {dtype}")
    generator = torch.Generator().manual_seed(seed)
    uniform = partial(torch.rand, generator=generator, dtype=torch.float64)
    # Sums of five exponentials are Gamma(5): torch's own Dirichlet takes no generator.
    gammas = -torch.log1p(-uniform(5, classes)).sum(0)
    truth = {
        "weights": (gammas / gammas.sum()).to(dtype),
        "means": torch.randn(classes, features, generator=generator, dtype=dtype),
        "variances": (4 ** (2 * uniform(classes, features) - 1)).to(dtype),
    }
    y = torch.multinomial(truth["weights"].double(), rows, replacement=True, generator=generator)
    x = torch.randn(rows, features, generator=generator, dtype=dtype)
    deviations = truth["variances"].sqrt()
    for block, labels in zip(torch.split(x, 65536), torch.split(y, 65536), strict=True):
        block.mul_(deviations[labels]).add_(truth["means"][labels])
    return {"x": x, "y": y}, truth


def _standardised(x: dict[str, Tensor]) -> dict[str, Tensor]:
    scale, centre = torch.std_mean(x["train"], 0, correction=0)
    # By its range: rounding gives a constant column a standard deviation that is small but not 0.
    low = x["train"].amin(0)
    constant = low == x["train"].amax(0)
    scale, centre = torch.where(constant, 1.0, scale), torch.where(constant, low, centre)
    return {split: values.sub(centre).div_(scale) for split, values in x.items()}


class _Raw(NamedTuple):
    """A data set as it was read: ``x``, still to be divided by ``scale``, and ``y``, both by split."""

    x: Arrays
    y: Arrays
    features: tuple[str, ...]
    classes: tuple[str, ...] = ()
    scale: float = 1.0
    threshold: float | None = None
    symbols: tuple[str, ...] = ()


def _split(x: Any, y: Any) -> tuple[dict[str, Any], Arrays]:
    from sklearn.model_selection import train_test_split

    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=0.3, stratify=y, random_state=0)
    return {"train": x_train, "test": x_test}, {"train": y_train, "test": y_test}


def _from_sklearn(name: str, threshold: float | None = None) -> _Raw:
    import sklearn.datasets

    bunch = getattr(sklearn.datasets, f"load_{name}")()
    classes = tuple(map(str, bunch.target_names))
    return _Raw(*_split(bunch.data, bunch.target), tuple(map(str, bunch.feature_names)), classes, threshold=threshold)


def _images(splits: Arrays, labels: Arrays | None = None, classes: tuple[str, ...] = (), scale: float = 255) -> _Raw:
    flat = {split: images.reshape(len(images), -1) for split, images in splits.items()}
    features = tuple(f"row_{row}_column_{column}" for row in range(28) for column in range(28))
    return _Raw(flat, labels or {}, features, classes, scale, threshold=0.5)


def _from_idx(name: str, classes: tuple[str, ...]) -> _Raw:
    x_train, y_train, x_test, y_test = (_idx(_obtain(f"{name}/{file}")[0]) for file in _IDX)
    return _images({"train": x_train, "test": x_test}, {"train": y_train, "test": y_test}, classes)


def _binarized_mnist() -> _Raw:
    packed = _arrays("binarized_mnist/binarized_mnist.npz")
    return _images({split: np.unpackbits(packed[split], axis=1) for split in ("train", "test", "valid")}, scale=1)


def _omniglot() -> _Raw:
    arrays = _arrays("omniglot/omniglot_28x28.npz")
    return _images({"train": arrays["background"], "test": arrays["evaluation"]})


def _xwindows() -> _Raw:
    arrays = _arrays("text/xwindows.npz")
    words = tuple(map(str, arrays["vocab"]))
    x = {split: np.unpackbits(arrays[f"x{split}"], axis=1, count=len(words)) for split in ("train", "test")}
    y = {split: arrays[f"y{split}"] for split in ("train", "test")}
    return _Raw(x, y, words, ("X-windows", "MS-windows"), threshold=0.5)


def _news20_w100() -> _Raw:
    arrays = _arrays("text/news20_w100.npz")
    words = tuple(map(str, arrays["words"]))
    x, y = _split(np.unpackbits(arrays["x"], axis=1, count=len(words)), arrays["y"])
    return _Raw(x, y, words, tuple(map(str, arrays["groups"])), threshold=0.5)


def _messages() -> tuple[dict[str, Any], Arrays]:
    lines = _bytes(_obtain("text/SMSSpamCollection.gz")[0]).decode("utf8").split("\n")
    labels, messages = zip(*(line.split("\t", 1) for line in lines if line), strict=True)
    return _split(messages, np.array(labels) == "spam")


def _sms_spam() -> _Raw:
    from sklearn.feature_extraction.text import CountVectorizer

    texts, y = _messages()
    words = CountVectorizer(min_df=2).fit(texts["train"])
    x = {split: words.transform(part).toarray() for split, part in texts.items()}
    return _Raw(x, y, tuple(words.get_feature_names_out()), ("ham", "spam"), threshold=0.0)


def _sms_text() -> _Raw:
    texts, y = _messages()
    return _characters(texts, 160)._replace(y=y, classes=("ham", "spam"))


def _descriptions() -> _Raw:
    """The prose that comes with scikit-learn's data sets, line by line."""
    import sklearn.datasets
    from sklearn.model_selection import train_test_split

    sets = ("breast_cancer", "diabetes", "digits", "iris", "linnerud", "wine")
    text = "\n".join(getattr(sklearn.datasets, f"load_{name}")().DESCR for name in sets)
    lines = [line.strip() for line in text.split("\n") if sum(c.isalpha() for c in line) > 20]
    train, test = train_test_split(lines, test_size=0.3, random_state=0)
    return _characters({"train": train, "test": test}, 80)


def _characters(texts: dict[str, Any], length: int) -> _Raw:
    """Texts as codes of their characters, in lower case, cut or filled up to one length with a symbol for the end."""
    code = {c: k for k, c in enumerate(_ALPHABET)}
    other, end = len(code), len(code) + 1
    x = {}
    for split, part in texts.items():
        rows = np.full((len(part), length), end)
        for row, line in zip(rows, part, strict=True):
            kept = [code.get(c, other) for c in line.lower()[:length]]
            row[: len(kept)] = kept
        x[split] = rows
    places = tuple(f"place_{k}" for k in range(length))
    return _Raw(x, {}, places, symbols=(*_ALPHABET, "other", "end"))


_LOADERS: dict[str, Callable[[], _Raw]] = {
    "breast_cancer": partial(_from_sklearn, "breast_cancer"),
    "wine": partial(_from_sklearn, "wine"),
    "iris": partial(_from_sklearn, "iris"),
    "digits": partial(_from_sklearn, "digits", threshold=8.0),
    "mnist": partial(_from_idx, "mnist", tuple("0123456789")),
    "fashion_mnist": partial(_from_idx, "fashion_mnist", tuple(_CLOTHES.split(","))),
    "binarized_mnist": _binarized_mnist,
    "omniglot": _omniglot,
    "xwindows": _xwindows,
    "news20_w100": _news20_w100,
    "sms_spam": _sms_spam,
    "sms_text": _sms_text,
    "descriptions": _descriptions,
}


def _obtain(file: str) -> tuple[Path, ...]:
    """The file at a path of the layout, or else the files upstream that it was made of."""
    root = os.environ.get("PPL_MODELS_DATA", "")
    local = Path(root).expanduser() / file
    if root and local.is_file():
        if (got := _digest(local)) != _SHA256[file]:
            raise ValueError(f"{local}: expected a file with sha256 {_SHA256[file]}, got {got}")
        return (local,)
    kept = Path(pooch.os_cache("ppl-models"))
    if (kept / file).is_file() and _digest(kept / file) == _SHA256[file]:
        return (kept / file,)
    mirror = os.environ.get("PPL_MODELS_MIRROR", "").rstrip("/")
    failures = []
    for urls in ((f"{mirror}/{file}",) if mirror else (), _UPSTREAM[file]):
        paths: list[Path] = []
        try:
            for url in urls:
                paths.append(_download(url, kept, file.partition("/")[0]))
        except (OSError, ValueError) as error:
            failures.append(f"{url}: {type(error).__name__}: {textwrap.shorten(str(error), 300)}")
        else:
            if paths:
                return tuple(paths)
    raise FileNotFoundError(
        f"{file}: not in PPL_MODELS_DATA ({root or 'not set'}), not in the cache ({kept}) and not "
        f"downloaded ({'; '.join(failures) or 'no URL is known for it'}): set PPL_MODELS_DATA to a directory "
        "that holds it, or PPL_MODELS_MIRROR to a URL that serves it"
    )


def _download(url: str, kept: Path, folder: str) -> Path:
    file = f"{folder}/{url.rpartition('/')[2]}"
    path = kept / file
    if path.is_file() and _digest(path) == _SHA256[file]:
        return path
    path.unlink(missing_ok=True)
    sha256 = None if path.suffix == ".mat" else _SHA256[file]
    with _quiet_pooch():
        pooch.retrieve(url, sha256, path.name, path.parent, progressbar=sys.stderr.isatty())
    if (got := _digest(path)) != _SHA256[file]:
        path.unlink()
        raise ValueError(f"expected numbers with sha256 {_SHA256[file]}, got {got}")
    return path


@contextmanager
def _quiet_pooch() -> Iterator[None]:
    logger = pooch.get_logger()
    level = logger.level
    logger.setLevel("ERROR")
    try:
        yield
    finally:
        logger.setLevel(level)


def _digest(path: Path) -> str:
    """What the table says of a file, once in a process for every state of the file."""
    state = path.stat()
    return _digest_once(path, state.st_size, state.st_mtime_ns)


@cache
def _digest_once(path: Path, size: int, modified: int) -> str:
    if path.suffix != ".mat":
        return str(pooch.file_hash(str(path)))
    try:
        arrays = _matlab(path)
    except Exception as error:  # a broken file fails in any way that the parser happens to take
        return f"{type(error).__name__}: {error}"
    numbers = [arrays[key].tobytes() for key in sorted(arrays) if arrays[key].dtype == np.uint8]
    return hashlib.sha256(b"".join(numbers)).hexdigest()


def _arrays(file: str) -> Arrays:
    """The arrays of an ``.npz`` file, from the file itself or from its origin."""
    paths = _obtain(file)
    if paths[0].suffix == ".npz":
        with np.load(paths[0]) as arrays:
            return dict(arrays)
    if paths[0].suffix == ".mat":
        return _matlab(paths[0])
    # Every line of the text is 784 digits, each with a space or the line's end after it.
    bits = (np.fromfile(path, np.uint8).reshape(-1, 2 * 784)[:, ::2] - ord("0") for path in paths)
    return dict(zip(("train", "valid", "test"), (np.packbits(split, axis=1) for split in bits), strict=True))


def _matlab(path: Path) -> Arrays:
    """A ``.mat`` file in the form of the ``.npz`` file made of it: packed bits, labels from 0."""
    from scipy.io import loadmat

    raw = loadmat(path)
    if "documents" in raw:
        x, y, words = {"x": raw["documents"].T}, {"y": raw["newsgroups"]}, {"words": raw["wordlist"]}
        words["groups"] = raw["groupnames"]
    else:
        x, y = ({f"{kind}{split}": raw[f"{kind}{split}"] for split in ("train", "test")} for kind in "xy")
        words = {"vocab": raw["vocab"]}
    packed = {key: np.packbits(bits.toarray() > 0, axis=1) for key, bits in x.items()}
    labels = {key: (codes.ravel() - 1).astype(np.uint8) for key, codes in y.items()}
    strings = {key: np.array([_text(cell) for cell in cells.ravel()]) for key, cells in words.items()}
    return packed | labels | strings


def _text(cell: Any) -> str:
    # A cell holds an array of one string, or one more cell.
    while not isinstance(cell, str):
        cell = cell.item()
    return cell


def _idx(path: Path) -> np.ndarray[Any, Any]:
    """An idx file: its fourth byte counts the dimensions, whose sizes follow, then come the values."""
    content = _bytes(path)
    shape = np.frombuffer(content, ">i4", content[3], 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def _bytes(path: Path) -> bytes:
    content = path.read_bytes()
    return gzip.decompress(content) if path.suffix == ".gz" else content

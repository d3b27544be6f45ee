"""How each data set is read: its numbers as they are stored, in splits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ppl_models.data import classics, files
from ppl_models.data.files import Arrays
from ppl_models.data.frames import ROWS, Columns, Roles, columns_of
from ppl_models.data.simulate import simulate_returns

_MESSAGE = 160
"""Letters of a text message."""


_ALPHABET = " abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'()&/-"


_CLOTHES = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"


class Raw(NamedTuple):
    """A data set as it was read: ``x``, still to be divided by ``scale``, and ``y``, both by split.

    A set of two domains has the second in ``b``. Further columns, such as the group of a row or a number to regress on,
    are in ``columns``, by name and split; a set of one series has no x. ``names`` are those along further dimensions.
    """

    x: Arrays
    y: Arrays
    features: tuple[str, ...]
    classes: tuple[str, ...] = ()
    scale: float = 1.0
    threshold: float | None = None
    symbols: tuple[str, ...] = ()
    shape: tuple[int, int] | None = None
    levels: int | None = None
    b: Arrays | None = None
    columns: Mapping[str, Arrays] = {}
    names: Mapping[str, tuple[str, ...]] = {}


def read(name: str, roles: Roles = ROWS) -> Raw:
    """The data set of a name, as it was read; of a CSV file by the roles of its columns."""
    return LOADERS[name]() if name in LOADERS else _from_csv(name, roles)


def _from_csv(name: str, roles: Roles) -> Raw:
    columns = columns_of(name, roles)
    if roles.target != "label":
        return _numbers(columns, roles.whole)
    if columns.y is None:
        x, _ = _split(columns.x, None)
        return Raw(x, {}, columns.features)
    return Raw(*_split(columns.x, columns.y), columns.features, columns.classes)


def _split(x: Any, y: Any) -> tuple[dict[str, Any], Arrays]:
    from sklearn.model_selection import train_test_split

    if y is None:
        train, test = train_test_split(x, test_size=0.3, random_state=0)
        return {"train": train, "test": test}, {}
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=0.3, stratify=y, random_state=0)
    return {"train": x_train, "test": x_test}, {"train": y_train, "test": y_test}


def split_distinct(rows: np.ndarray[Any, Any], y: np.ndarray[Any, Any] | None = None) -> dict[str, Any]:
    """Indices of the rows of each split, of which none is equal to a row of the other."""
    from sklearn.model_selection import train_test_split

    copies: dict[bytes, list[int]] = {}
    for k, row in enumerate(rows):
        copies.setdefault(row.tobytes(), []).append(k)
    groups = list(copies.values())
    labels = None if y is None else y[[group[0] for group in groups]]
    train, test = train_test_split(groups, test_size=0.3, stratify=labels, random_state=0)
    return {split: np.concatenate(part) for split, part in (("train", train), ("test", test))}


def _from_sklearn(name: str, **own: Any) -> Raw:
    import sklearn.datasets

    bunch = getattr(sklearn.datasets, f"load_{name}")()
    classes = tuple(map(str, bunch.target_names))
    return Raw(*_split(bunch.data, bunch.target), tuple(map(str, bunch.feature_names)), classes, **own)


def _digits() -> Raw:
    return _from_sklearn("digits", threshold=8.0, shape=(8, 8), levels=17)


def _turned_digits() -> Raw:
    """Digits in two domains without pairs: half of the rows, and the others turned by a quarter and inverted."""
    raw = _digits()
    halves = {split: np.array_split(x.reshape(-1, 8, 8), 2) for split, x in raw.x.items()}
    a = {split: upright.reshape(-1, 64) for split, (upright, _) in halves.items()}
    b = {split: 16 - np.rot90(other, axes=(1, 2)).reshape(-1, 64) for split, (_, other) in halves.items()}
    # Rows of both are read as one table: as many of each.
    a, b = ({split: x[: len(b[split])] for split, x in domain.items()} for domain in (a, b))
    return raw._replace(x=a, b=b, y={}, classes=())


def _images(splits: Arrays, labels: Arrays | None = None, classes: tuple[str, ...] = (), levels: int = 256) -> Raw:
    flat = {split: images.reshape(len(images), -1) for split, images in splits.items()}
    features = tuple(f"row_{row}_column_{column}" for row in range(28) for column in range(28))
    return Raw(flat, labels or {}, features, classes, levels - 1, threshold=0.5, shape=(28, 28), levels=levels)


def _from_idx(name: str, classes: tuple[str, ...]) -> Raw:
    x_train, y_train, x_test, y_test = (files.read_idx(files.obtain(f"{name}/{file}")[0]) for file in files.IDX)
    return _images({"train": x_train, "test": x_test}, {"train": y_train, "test": y_test}, classes)


def _binarized_mnist() -> Raw:
    packed = files.read_arrays("binarized_mnist/binarized_mnist.npz")
    return _images({split: np.unpackbits(packed[split], axis=1) for split in ("train", "test", "valid")}, levels=2)


def _omniglot() -> Raw:
    arrays = files.read_arrays("omniglot/omniglot_28x28.npz")
    return _images({"train": arrays["background"], "test": arrays["evaluation"]})


def _xwindows() -> Raw:
    arrays = files.read_arrays("text/xwindows.npz")
    words = tuple(map(str, arrays["vocab"]))
    x = {split: np.unpackbits(arrays[f"x{split}"], axis=1, count=len(words)) for split in ("train", "test")}
    y = {split: arrays[f"y{split}"] for split in ("train", "test")}
    return Raw(x, y, words, ("X-windows", "MS-windows"), threshold=0.5)


def _news20_w100() -> Raw:
    arrays = files.read_arrays("text/news20_w100.npz")
    words = tuple(map(str, arrays["words"]))
    x, y = _split(np.unpackbits(arrays["x"], axis=1, count=len(words)), arrays["y"])
    return Raw(x, y, words, tuple(map(str, arrays["groups"])), threshold=0.5)


def _messages() -> tuple[dict[str, list[str]], Arrays]:
    lines = files.read_bytes(files.obtain("text/SMSSpamCollection.gz")[0]).decode("utf8").split("\n")
    labels, messages = zip(*(line.split("\t", 1) for line in lines if line), strict=True)
    spam = np.array(labels) == "spam"
    splits = split_distinct(_codes(messages, _MESSAGE), spam)
    return {n: [messages[k] for k in at] for n, at in splits.items()}, {n: spam[at] for n, at in splits.items()}


def _sms_spam() -> Raw:
    from sklearn.feature_extraction.text import CountVectorizer

    texts, y = _messages()
    words = CountVectorizer(min_df=2).fit(texts["train"])
    x = {split: words.transform(part).toarray() for split, part in texts.items()}
    return Raw(x, y, tuple(words.get_feature_names_out()), ("ham", "spam"), threshold=0.0)


def _sms_text() -> Raw:
    texts, y = _messages()
    return _characters(texts, _MESSAGE)._replace(y=y, classes=("ham", "spam"))


def _descriptions() -> Raw:
    """The descriptions that come with scikit-learn's data sets, line by line."""
    import sklearn.datasets

    sets = ("breast_cancer", "diabetes", "digits", "iris", "linnerud", "wine")
    text = "\n".join(getattr(sklearn.datasets, f"load_{name}")().DESCR for name in sets)
    lines = [line.strip() for line in text.split("\n") if sum(c.isalpha() for c in line) > 20]
    splits = split_distinct(_codes(lines, 80))
    return _characters({n: [lines[k] for k in at] for n, at in splits.items()}, 80)


def _characters(texts: dict[str, Any], length: int) -> Raw:
    """Texts letter by letter."""
    x = {split: _codes(part, length) for split, part in texts.items()}
    places = tuple(f"place_{k}" for k in range(length))
    return Raw(x, {}, places, symbols=(*_ALPHABET, "other", "end"))


def _numbers(given: Columns, whole: bool = False) -> Raw:
    """Features and a number for each row, and further columns."""
    from sklearn.model_selection import train_test_split

    assert given.y is not None
    count = np.arange(len(given.y))
    at = (
        {"train": count}
        if whole
        else dict(zip(("train", "test"), train_test_split(count, test_size=0.3, random_state=0), strict=True))
    )
    columns = {n: {s: v[k] for s, k in at.items()} for n, v in {"y": given.y, **given.own}.items()}
    x = {s: given.x[k] for s, k in at.items()} if given.features else {}
    names = {"groups": given.groups} if given.groups else {}
    return Raw(x, {}, given.features, columns=columns, names=names)


def _diabetes() -> Raw:
    import sklearn.datasets

    bunch = sklearn.datasets.load_diabetes(scaled=False)
    return _numbers(Columns(bunch.data, bunch.target.astype(float), tuple(map(str, bunch.feature_names)), ()))


def _linnerud() -> Raw:
    """Chin-ups of twenty men, and their weight, waist and pulse."""
    import sklearn.datasets

    bunch = sklearn.datasets.load_linnerud()
    names = tuple(str(n).lower() for n in bunch.target_names)
    return _numbers(Columns(bunch.target, bunch.data[:, 0].astype(float), names, ()))


def _rats() -> Raw:
    """A row for each rat and day; of each rat one of the five days is held out."""
    weights, days = classics.RATS, np.array(classics.DAYS, float)
    count, times = weights.shape
    held = np.arange(count)[:, None] % times == np.arange(times)
    rat, day = np.broadcast_to(np.arange(count)[:, None], weights.shape), np.broadcast_to(days, weights.shape)
    at = {"train": ~held, "test": held}
    columns = {n: {s: v[k] for s, k in at.items()} for n, v in (("group", rat), ("y", weights))}
    names = {"groups": tuple(f"rat_{k + 1}" for k in range(count))}
    return Raw({s: day[k][:, None] for s, k in at.items()}, {}, ("day",), columns=columns, names=names)


def _eight_schools() -> Raw:
    y, error = np.array(classics.SCHOOLS).T
    return Raw({}, {}, (), columns={"y": {"train": y}, "error": {"train": error}})


def _lsat() -> Raw:
    x, _ = _split(classics.answers(), None)
    return Raw(x, {}, tuple(f"item_{k + 1}" for k in range(5)), threshold=0.5)


def _series(name: str) -> Raw:
    return Raw({}, {}, (), columns={"y": {"train": getattr(classics, name.upper())}})


def _nile() -> Raw:
    years = np.arange(1871, 1871 + len(classics.NILE), dtype=float)[:, None]
    return _series("nile")._replace(x={"train": years}, features=("year",))


def _returns() -> Raw:
    return Raw({}, {}, (), columns={"y": {"train": simulate_returns().numpy()}})


def _codes(texts: Sequence[str], length: int) -> np.ndarray[Any, Any]:
    """Texts as codes of their characters, in lower case, cut or padded to one length with a symbol for the end."""
    code = {c: k for k, c in enumerate(_ALPHABET)}
    other, end = len(code), len(code) + 1
    rows = np.full((len(texts), length), end)
    for row, line in zip(rows, texts, strict=True):
        kept = [code.get(c, other) for c in line.lower()[:length]]
        row[: len(kept)] = kept
    return rows


LOADERS: dict[str, Callable[[], Raw]] = {
    "breast_cancer": partial(_from_sklearn, "breast_cancer"),
    "wine": partial(_from_sklearn, "wine"),
    "iris": partial(_from_sklearn, "iris"),
    "digits": _digits,
    "turned_digits": _turned_digits,
    "mnist": partial(_from_idx, "mnist", tuple("0123456789")),
    "fashion_mnist": partial(_from_idx, "fashion_mnist", tuple(_CLOTHES.split(","))),
    "binarized_mnist": _binarized_mnist,
    "omniglot": _omniglot,
    "xwindows": _xwindows,
    "news20_w100": _news20_w100,
    "sms_spam": _sms_spam,
    "sms_text": _sms_text,
    "descriptions": _descriptions,
    "diabetes": _diabetes,
    "linnerud": _linnerud,
    "eight_schools": _eight_schools,
    "rats": _rats,
    "lsat": _lsat,
    "earthquakes": partial(_series, "earthquakes"),
    "nile": _nile,
    "returns": _returns,
}

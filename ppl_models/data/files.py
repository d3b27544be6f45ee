"""Files of data sets: found or downloaded, checked by their SHA-256, and read.

Each file is searched in the directory ``PPL_MODELS_DATA`` (an environment variable), then in the cache
``pooch.os_cache("ppl-models")``, then at the URL ``PPL_MODELS_MIRROR``, then upstream. Directory, cache and mirror
have the same layout.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
import textwrap
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pooch
import requests
import urllib3
from tqdm.auto import tqdm

Arrays = dict[str, np.ndarray[Any, Any]]


# SHA-256, size in bytes and path in the layout: upstream's files and those made from them.
_TABLE = """\
12ecc6b4d327b92f9225f08faa6405e4274fb8e75943d86a53157d1b1bcfaf74  18594167  sbibm/sbibm-1.1.0-py2.py3-none-any.whl
440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609   9912422  mnist/train-images-idx3-ubyte.gz
3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c     28881  mnist/train-labels-idx1-ubyte.gz
8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6   1648877  mnist/t10k-images-idx3-ubyte.gz
f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6      4542  mnist/t10k-labels-idx1-ubyte.gz
3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84  26421880  fashion_mnist/train-images-idx3-ubyte.gz
a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845     29515  fashion_mnist/train-labels-idx1-ubyte.gz
346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073   4422102  fashion_mnist/t10k-images-idx3-ubyte.gz
67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5      5148  fashion_mnist/t10k-labels-idx1-ubyte.gz
50de2c8299a5a297789293ab2c30f6fc3cb8c359a15e5e88d5501aa18ebb8fa5   2295919  binarized_mnist/binarized_mnist.npz
ad693b29f94c14277b095f5238ddefbbdaaae0939789dd2f4f0205278cee3e4d  78400000  binarized_mnist/binarized_mnist_train.amat
1de3d397c40fe8eeb33dafd4099a1f665ec01e96d9be234aaeeac8a34930e2e2  15680000  binarized_mnist/binarized_mnist_valid.amat
e6687bfea3f820c174f33b7865140b2a2dd2930ef786f35d45795fc193b5ab2c  15680000  binarized_mnist/binarized_mnist_test.amat
2fe18524c0a251017c43a4a790ad8b3b199fe61fa2d06cb0b34dfa87dcef117e   3011506  omniglot/omniglot_28x28.npz
a2d76b394a84df0205cfa21c784cb66407d34cd09fbd8b272a15078bcdc00904     28665  text/xwindows.npz
b78ddcafda5c885795e3c28f48c6003e50308ba6043135fde8d327e89f7dc7d1     50031  text/XwindowsDocData.mat
342dec7cfde24c2332006f52d199d8a22f8c752a5428c95066cf96c74e6c7378     61041  text/news20_w100.npz
6667c5459e22eb544a854bff1443edaaea71735cf1af7b12cc5d986e74af7064    416176  text/20news_w100.mat
8fd20918904042e5104c4d5d22642f1332b0bc670c55df3a8688a1ea7b2e9e8d    206683  text/SMSSpamCollection.gz
7d039a24a6083ed9ef0f806ebad56bbb976e3aeb8de05669173bfdc4996c239d    477907  text/SMSSpamCollection
6de4bfe5263e09b0421b15368da42720b3ddc2559f81b35e178a18ce05e299b9    334970  posteriordb/arma-arma11.draws.json.zip
354e7d7bb05ee08a3deeac45ce1d92ae11964a696b933ba82a3a0cfe134eb45a      2037  posteriordb/arma.data.json.zip
6f35a3d930c3f031cbe44fac75ade1207794b535cdff1641c17fa8592d251330    654952  posteriordb/bball_drive_event_0-hmm_drive_0.draws.json.zip
6bee0a0bb09619784dcaa39ad5c7141626745df03eada28e144d14590f038117      7463  posteriordb/bball_drive_event_0.data.json.zip
d70aad60517d530938f24d6841db87ce66ac1448e9f8d9a5bb5621edf53a4ced    256146  posteriordb/earnings-earn_height.draws.json.zip
06a67aa61a99d59aee057486dae51ffad6b4f887e7f8f17733739cf893af312f      3233  posteriordb/earnings.data.json.zip
df89f5011d9518b06c95a631c258ce03f4818b78deb40ed069cfd1d70074c8bb    246501  posteriordb/gp_pois_regr-gp_regr.draws.json.zip
9aaaa9d5694b74e2aefa6d0bd2f0a48637fcb4d455a74b33985e58154f285da9       321  posteriordb/gp_pois_regr.data.json.zip
cd67e28247da25233d79d09df235075c6603735e45c28fdfa76125e515ece3cf    492129  posteriordb/hmm_example-hmm_example.draws.json.zip
8c346cc7627db1b5614b1eacb81ab9b0926aa63071ba2f3b6d6ec3b492892787      1098  posteriordb/hmm_example.data.json.zip
1d2124d283c104fb8faeb8c65b68e3fa22e39665accdac95979238587f85314b    657949  posteriordb/hudson_lynx_hare-lotka_volterra.draws.json.zip
36d116efc116fee9c9e7286df5545cbf11d08171c4f48b84476740464a4e33ec       409  posteriordb/hudson_lynx_hare.data.json.zip
ba684f6687803c0aac94df2e352e8a7d18c458bc635088be64ccc0e8fb16dfe4    330459  posteriordb/kidiq-kidscore_momhsiq.draws.json.zip
16d341a99ec8178231eab660d8fda084a44145f6a241daf35276d0192d13b92d      4289  posteriordb/kidiq.data.json.zip
741ddf71cad063821af0549ac78987f9f1d834848aeb180ce4edd083b02c8d62    668131  posteriordb/mesquite-logmesquite.draws.json.zip
ec9db3a2e390892473e6172d76386ba9b26c3633a9682532eb34217189dcb0ac       706  posteriordb/mesquite.data.json.zip
4e1f20dc9ccc45e1b05d0b67ee83b9a2ffdd21c90ca576549571940b5c4369e8    431308  posteriordb/sblri-blr.draws.json.zip
e975f6641b5e08d65cb1e3519f1d0370939afbc82bfbeb3c1f5a07e5bbd717a7      5984  posteriordb/sblri.data.json.zip
"""  # noqa: E501


SHA256 = {path: sha256 for sha256, _, path in map(str.split, _TABLE.splitlines())}


SIZES = {path: int(size) for _, size, path in map(str.split, _TABLE.splitlines())}
"""Size in bytes of each file: a download that is longer is broken off."""


POSTERIORS = tuple(p.removesuffix(".draws.json.zip") for p in SHA256 if p.endswith(".draws.json.zip"))
"""Posteriors of posteriordb, by the path of their files without its ending."""


def _with_names_of_upstream(table: dict[str, Any]) -> dict[str, Any]:
    """Data and draws of posteriordb have the same ending there, and folders of their own."""
    return table | {p.replace(".data.json", ".json").replace(".draws.json", ".json"): v for p, v in table.items()}


SHA256, SIZES = _with_names_of_upstream(SHA256), _with_names_of_upstream(SIZES)


_GITHUB = "https://raw.githubusercontent.com"


_MNIST = f"{_GITHUB}/fgnt/mnist/ae608a02b796c9ee908c082585a5f006fe05258e"


_FASHION = f"{_GITHUB}/zalandoresearch/fashion-mnist/b2617bb6d3ffa2e429640350f613e3291e10b141/data/fashion"


_AMAT = "http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/binarized_mnist"


_MAT = f"{_GITHUB}/probml/probml-data/f74e6f00ef1570f5b3843c49818d0bfa6b473069/data"


_SMS = (
    f"{_GITHUB}/learn-co-students/dsc-document-classification-with-naive-bayes-lab-online-ds-pt-051319"
    "/2f98ca443ecd26e1088b369260f1e9782e2e36fc/SMSSpamCollection"
)


SBIBM = "sbibm/sbibm-1.1.0-py2.py3-none-any.whl"
"""The wheel that holds observations and reference draws of simulators, under ``sbibm/tasks``."""


_WHEEL = "6a/3d/ca6a49f7d8ad77f274087b58584eb61e7d13d2c52181386a4fb29caa897f"


IDX = tuple(f"{f}-ubyte.gz" for f in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"))


_POSTERIORDB = f"{_GITHUB}/stan-dev/posteriordb/master/posterior_database"


UPSTREAM: dict[str, tuple[str, ...]] = {
    **{
        f"{p.partition('-')[0]}.data.json.zip": (f"{_POSTERIORDB}/data/data/{Path(p).name.partition('-')[0]}.json.zip",)
        for p in POSTERIORS
    },
    **{
        f"{p}.draws.json.zip": (f"{_POSTERIORDB}/reference_posteriors/draws/draws/{Path(p).name}.json.zip",)
        for p in POSTERIORS
    },
    **{f"mnist/{file}": (f"{_MNIST}/{file}",) for file in IDX},
    **{f"fashion_mnist/{file}": (f"{_FASHION}/{file}",) for file in IDX},
    "binarized_mnist/binarized_mnist.npz": tuple(f"{_AMAT}_{s}.amat" for s in ("train", "valid", "test")),
    "omniglot/omniglot_28x28.npz": (),
    SBIBM: (f"https://files.pythonhosted.org/packages/{_WHEEL}/{Path(SBIBM).name}",),
    "text/xwindows.npz": (f"{_MAT}/XwindowsDocData.mat",),
    "text/news20_w100.npz": (f"{_MAT}/20news_w100.mat",),
    "text/SMSSpamCollection.gz": (_SMS,),
}


def obtain(file: str) -> tuple[Path, ...]:
    """The file at a path of the layout, or the upstream files that it was made from."""
    root = os.environ.get("PPL_MODELS_DATA", "")
    local = Path(root).expanduser() / file
    if root and local.is_file():
        if (got := _digest(local)) != SHA256[file]:
            raise ValueError(f"{local}: expected a file with sha256 {SHA256[file]}, got {got}")
        return (local,)
    kept = Path(pooch.os_cache("ppl-models"))
    if (kept / file).is_file() and _digest(kept / file) == SHA256[file]:
        return (kept / file,)
    mirror = os.environ.get("PPL_MODELS_MIRROR", "").rstrip("/")
    failures = []
    for urls in ((f"{mirror}/{file}",) if mirror else (), UPSTREAM[file]):
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
    if path.is_file() and _digest(path) == SHA256[file]:
        return path
    path.unlink(missing_ok=True)
    with _quiet_pooch():
        pooch.retrieve(url, SHA256[file], path.name, path.parent, downloader=partial(_stream, size=SIZES[file]))
    return path


def _stream(url: str, output: str, _: Any, *, size: int) -> None:
    """Download to a file at most a known number of bytes, as they are: nothing that a server compressed is unpacked."""
    bar = tqdm(total=size, unit="B", unit_scale=True, leave=False, disable=not sys.stderr.isatty())
    asked = {"Accept-Encoding": "identity"}
    with bar, requests.get(url, stream=True, timeout=30, headers=asked) as response, Path(output).open("wb") as file:
        response.raise_for_status()
        try:
            for block in response.raw.stream(2**16, decode_content=False):
                bar.update(len(block))
                if file.tell() + len(block) > size:
                    raise ValueError(f"expected {size} bytes, got more")
                file.write(block)
        except urllib3.exceptions.HTTPError as error:
            raise OSError(str(error)) from None


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
    """The hash of a file in the form of the table, computed once per process and state of the file."""
    state = path.stat()
    return _digest_once(path, state.st_size, state.st_mtime_ns)


@cache
def _digest_once(path: Path, size: int, modified: int) -> str:
    return str(pooch.file_hash(str(path)))


def read_arrays(file: str) -> Arrays:
    """The arrays of an ``.npz`` file, read from it or from the upstream files."""
    paths = obtain(file)
    if paths[0].suffix == ".npz":
        with np.load(paths[0]) as arrays:
            return dict(arrays)
    if paths[0].suffix == ".mat":
        return _matlab(paths[0])
    # Each line of the text has 784 digits, each followed by a space or the end of the line.
    bits = (np.fromfile(path, np.uint8).reshape(-1, 2 * 784)[:, ::2] - ord("0") for path in paths)
    return dict(zip(("train", "valid", "test"), (np.packbits(split, axis=1) for split in bits), strict=True))


def _matlab(path: Path) -> Arrays:
    """A ``.mat`` file in the form of the ``.npz`` file made from it: packed bits, labels from 0."""
    from scipy.io import loadmat

    with warnings.catch_warnings():
        # SciPy 1.18 announces that sparse arrays will come in place of sparse matrices: either will do.
        warnings.simplefilter("ignore", DeprecationWarning)
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
    # A cell holds an array of one string, or another cell.
    while not isinstance(cell, str):
        cell = cell.item()
    return cell


def read_idx(path: Path) -> np.ndarray[Any, Any]:
    """Read an idx file: its fourth byte is the number of dimensions; their sizes and the values follow."""
    content = read_bytes(path)
    shape = np.frombuffer(content, ">i4", content[3], 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def read_posterior(name: str) -> tuple[dict[str, Any], list[dict[str, list[float]]]]:
    """Data by name and the chains of reference draws of a posterior of posteriordb, ``posteriordb/DATA-MODEL``."""
    paths = (obtain(f"{stem}.json.zip")[0] for stem in (f"{name.partition('-')[0]}.data", f"{name}.draws"))
    stored, chains = (json.loads(_only_file(path)) for path in paths)
    return stored, chains


def _only_file(path: Path) -> bytes:
    with zipfile.ZipFile(path) as archive:
        return archive.read(archive.namelist()[0])


def read_bytes(path: Path) -> bytes:
    """The content of a file, decompressed if its name ends in ``.gz``."""
    content = path.read_bytes()
    return gzip.decompress(content) if path.suffix == ".gz" else content

"""Where rows come from: a file, a folder of splits, or the hub, found and opened as one :class:`Table`.

Nothing here knows what a row means. Parquet, saved ``datasets`` and the hub go through ``datasets``:
Arrow files, memory-mapped, or streamed. Text files are read by :mod:`mlxpref.data.readers`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mlxpref.data.readers import READERS, Rows, ending
from mlxpref.errors import DataError, UsageError


@dataclass(frozen=True)
class SourceSpec:
    """What to read and how, as a command line or a config gives it.

    Attributes:
        path: a file, a folder, or a hub id "owner/name".
        format: name of the format; None detects it.
        columns: our column name -> the data's, where they differ: {"prompt": "question"}.
        config, revision: of a hub data set.
        split: "train", "valid", "test" or the data's own name; None takes the training split.
        score: which score is *the* score, where the data have several; None takes the format's.
        weight: rows taken for each row the source has: 1 every row once, 0.5 a random half, 2.5 every
            row twice and a random half a third time.
        streaming: read a hub data set or Parquet row by row and keep no copy in the ``datasets`` cache;
            other files are read row by row anyway.
        limit: examples read at most, dropped ones included.

    Raises:
        UsageError: a weight or limit that is not positive.
    """

    path: str
    format: str | None = None
    columns: Mapping[str, str] | None = None
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    score: str | None = None
    weight: float = 1.0
    streaming: bool = False
    limit: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise UsageError(f"{self.path}: weight {self.weight} is not a positive number")
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"{self.path}: limit {self.limit} is not a positive number")


@dataclass(frozen=True)
class Table:
    """One split, opened.

    Attributes:
        name: short name of the data in messages.
        split: the data's own name of the split that is read; splits: all of them.
        rows: starts over at the first row on every call.
        columns: their names where the file's header tells them, else None.
    """

    name: str
    split: str
    splits: tuple[str, ...]
    rows: Callable[[], Rows]
    columns: tuple[str, ...] | None = None


SPLITS: dict[str, tuple[str, ...]] = {
    "train": ("train", "training", "train_prefs"),
    "valid": ("valid", "validation", "val", "dev", "eval", "evaluation", "valid_prefs", "eval_prefs"),
    "test": ("test", "test_prefs"),
}
"""The three splits and the names data sets give them, in order of preference."""


REACH_SECONDS = 10.0
"""How long the hub may take to answer whether it has a data set."""


def find_split(wanted: str, available: Sequence[str]) -> str | None:
    """The data's name of a split: the same name, else one of the same kind; None if there is none."""
    kinds = [names for kind, names in SPLITS.items() if wanted == kind or wanted in names]
    return next((name for name in (wanted, *(kinds[0] if kinds else ())) if name in available), None)


def open_table(spec: SourceSpec) -> Table:
    """Find the data and open one split of them.

    Raises:
        DataError: nothing there, not readable, no such split, or a hub that cannot be reached.
        UsageError: an option that cannot act on this kind of source.
    """
    path = Path(spec.path).expanduser()
    if path.is_file() or path.is_dir():
        for name in ("config", "revision"):
            if getattr(spec, name) is not None:
                raise UsageError(f"{spec.path} lies on this disk: --data-{name} is for data sets of the hub")
        return _file_table(path, spec) if path.is_file() else _folder_table(path, spec)
    may_be_id = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", spec.path)  # not "./data", "../data"
    if may_be_id and ending(path) not in (*READERS, ".parquet"):
        return _hub_table(spec)
    raise DataError(f"{spec.path}: no such file or folder{_like(path)}")


def _like(path: Path) -> str:
    """ "; did you mean …" with the nearest name that does exist beside it, or nothing."""
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = get_close_matches(path.name, beside, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def pick_split(wanted: str | None, available: Sequence[str], name: str) -> str:
    """The split to read: the one asked for, else the training split, else the only one."""
    found = find_split(wanted or "train", available)
    if found is None and wanted is None and len(available) == 1:
        found = available[0]
    if found is None:
        raise DataError(f"{name}: no split {wanted or 'train'!r}; there are {', '.join(available)} (--split)")
    return found


# --- on this disk --------------------------------------------------------------------------------


def _file_table(file: Path, spec: SourceSpec) -> Table:
    """One file is one split: "train", or what its name says."""
    _check_ending(file)
    own = next((kind for kind, names in SPLITS.items() if _split_of(file) in names), "train")
    if spec.split is not None and find_split(spec.split, ("train", own, _split_of(file))) is None:
        raise DataError(f"{file}: one file is one split; it has no {spec.split!r} (--split)")
    return _files_table([file], file.name, own, (own,), spec)


def _check_ending(file: Path) -> None:
    if ending(file) not in (*READERS, ".parquet"):
        known = ", ".join((*READERS, ".jsonl.gz", ".parquet"))
        raise DataError(f"{file}: cannot tell the kind of file by its name; known endings are {known}")


def _split_of(file: Path) -> str:
    """ "train" of train.jsonl.gz, train-00000-of-00003.parquet, train_0.csv."""
    return re.sub(r"[-_.]\d+(-of-\d+)?$", "", file.name[: -len("".join(file.suffixes))] or file.name).lower()


def _folder_table(folder: Path, spec: SourceSpec) -> Table:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        _check_streaming(spec, "a saved data set")
        return _dataset_table(_saved(folder), folder.name, spec.split)
    splits = _split_files(folder)
    split = pick_split(spec.split, tuple(splits), str(folder))
    files = splits[split]
    if len({ending(file) for file in files}) > 1:
        names = ", ".join(file.name for file in files)
        raise DataError(f"{folder}: several files hold the split {split!r} ({names}); give one as the path")
    return _files_table(files, files[0].name if len(files) == 1 else split, split, tuple(splits), spec)


def _split_files(folder: Path) -> dict[str, list[Path]]:
    """Data files of a folder (or of its ``data/``) by split; a single file of any name is "train"."""
    for place in (folder, folder / "data"):
        if not place.is_dir():
            continue
        files = sorted(f for f in place.iterdir() if f.is_file() and ending(f) in (*READERS, ".parquet"))
        known = {name for names in SPLITS.values() for name in names}
        splits: dict[str, list[Path]] = {}
        for file in files:
            if _split_of(file) in known or _split_of(file).startswith(("train_", "test_")):
                splits.setdefault(_split_of(file), []).append(file)
        if splits:
            return splits
        if len(files) == 1:
            return {"train": files}
        if files:
            names = ", ".join(f.name for f in files[:5])
            raise DataError(
                f"{folder}: no file is named train, valid or test; found {names}. Give one as the path"
            )
    raise DataError(f"{folder}: no data files; looked for {', '.join((*READERS, '.parquet'))}")


def _files_table(
    files: list[Path], name: str, split: str, splits: tuple[str, ...], spec: SourceSpec
) -> Table:
    if ending(files[0]) == ".parquet":
        paths = [str(file) for file in files]
        data = _datasets_load("parquet", data_files=paths, split="train", streaming=spec.streaming)
        return _rows_table(data, name, split, splits)
    _check_streaming(spec, f"a {ending(files[0])} file")

    def rows() -> Rows:
        for file in files:
            yield from READERS[ending(file)](file)

    return Table(name, split, splits, rows)


def _check_streaming(spec: SourceSpec, kind: str) -> None:
    if spec.streaming:
        raise UsageError(f"{spec.path} is {kind}: --streaming is for Parquet and data sets of the hub")


# --- through `datasets` --------------------------------------------------------------------------


def _saved(folder: Path) -> Any:
    import datasets

    try:
        return datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder}: looks like a saved data set, but cannot be opened ({error})") from error


def _hub_table(spec: SourceSpec) -> Table:
    name = spec.path.split("/")[-1]
    options = {"name": spec.config, "revision": spec.revision, "streaming": spec.streaming}
    if spec.split and "[" in spec.split:  # a slice, "train[:1000]", is `datasets`' own to read
        data = _datasets_load(spec.path, split=spec.split, **options)
        return _rows_table(data, name, spec.split, (spec.split,))
    return _dataset_table(_datasets_load(spec.path, **options), name, spec.split)


def _datasets_load(path: str, **options: Any) -> Any:
    """``datasets.load_dataset`` with its many failures told in our words."""
    import datasets
    from datasets.exceptions import DatasetNotFoundError, DatasetsError
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # the latter of the HTTP library it uses

    offline = (
        f"{path}: no such file or folder here, and the hub cannot be reached for a data set of that name. "
        f"On a connected machine run `hf download --repo-type dataset {path} --local-dir FOLDER`, "
        "bring the folder here and give its path."
    )
    files = options.get("data_files")
    where = ", ".join(files) if files else path
    try:
        with _quiet():
            if not files and not _cached(path):
                _reach(path)
            return datasets.load_dataset(path, **options)
    except DatasetNotFoundError as error:
        raise DataError(
            f"{path}: no such file or folder here, and no such data set on the hub ({_first(error)}). "
            "Check the spelling; for a gated data set accept its terms and run `hf auth login`."
        ) from error
    except (DatasetsError, OSError, ValueError, RuntimeError, HTTPError) as error:
        unreached = isinstance(error, HTTPError) and not isinstance(error, HfHubHTTPError)
        if unreached or isinstance(error, ConnectionError | TimeoutError):
            raise DataError(offline) from error
        raise DataError(f"{where}: cannot be opened ({_first(error.__cause__ or error)})") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the log lines of ``datasets`` and the hub's client: what matters in them is raised."""
    import datasets
    import huggingface_hub

    loggers = (datasets.utils.logging, huggingface_hub.utils.logging)
    before = [logger.get_verbosity() for logger in loggers]
    for logger in loggers:
        logger.set_verbosity_error()
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.set_verbosity(level)


def _cached(path: str) -> bool:
    """Whether ``datasets`` keeps some of this data set and could open it without the hub."""
    import datasets
    from datasets.naming import camelcase_to_snakecase

    *owner, name = path.split("/")
    return (Path(datasets.config.HF_DATASETS_CACHE) / "___".join([*owner, camelcase_to_snakecase(name)])).is_dir()


def _reach(path: str) -> None:
    """Ask the hub for the data set once; ``load_dataset`` would try for half a minute. The client's own error if
    there is no connection; what the hub answers is left to ``load_dataset``."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return  # nothing is tried
    try:
        huggingface_hub.HfApi().dataset_info(path, timeout=REACH_SECONDS)
    except HfHubHTTPError:
        return


def _first(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _dataset_table(data: Any, name: str, wanted: str | None) -> Table:
    if not hasattr(data, "keys"):  # a single split, saved by itself
        pick_split(wanted, ("train",), name)
        return _rows_table(data, name, "train", ("train",))
    split = pick_split(wanted, tuple(data), name)
    return _rows_table(data[split], name, split, tuple(data))


def _rows_table(data: Any, name: str, split: str, splits: tuple[str, ...]) -> Table:
    def rows() -> Iterator[tuple[str, Any]]:
        from huggingface_hub.errors import HTTPError

        try:
            for number, row in enumerate(data, 1):
                yield f"{name}:{number}", row
        except (OSError, ValueError, HTTPError) as error:
            raise DataError(f"{name}: reading stopped ({_first(error)})") from error

    columns = data.column_names
    return Table(name, split, splits, rows, tuple(columns) if columns else None)

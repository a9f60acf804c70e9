"""Where a run reads and writes: disks, and the hub."""

from __future__ import annotations

import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from mlxpref.doctor.check import Check

ROOM_FOR_RUN = 2.0
"""GB; a run keeps three checkpoints of adapter and optimiser by default."""

ROOM_FOR_MODEL = 10.0
"""GB; an 8B model in 4 bits is about 5, and a download needs room while it goes on."""

PATIENCE = 5.0
"""Seconds the hub has to answer."""

Reach = Literal["offline", "not looked", "reachable", "unreachable"]

Open = Callable[..., Any]
"""As ``urllib.request.urlopen``."""


def hub_cache() -> Path:
    """Where the hub's client keeps downloads."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def endpoint() -> str:
    """The hub's address: ``HF_ENDPOINT``, or Hugging Face's own."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def is_offline() -> bool:
    """Has the user said that the hub is not to be asked (``HF_HUB_OFFLINE``)?"""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def nearest(path: Path) -> Path:
    """The path itself or its nearest parent that exists."""
    path = path.expanduser().absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def check_disk(name: str, folder: Path, *, enough: float) -> Check:
    """Room on the disk that holds a folder, or will.

    Args:
        enough: GB under which it is worth a warning; a tenth of it fails.
    """
    free = shutil.disk_usage(nearest(folder)).free / 1e9
    said = f"{free:.1f} GB free for {folder}"
    if free >= enough:
        return Check(name, "ok", said)
    remedy = "make room there, or choose a folder on another disk"
    return Check(name, "fail" if free < enough / 10 else "warn", said, remedy)


def check_writable(name: str, folder: Path) -> Check | None:
    """A folder that cannot be made or written to; None when it can."""
    place = nearest(folder)
    if not place.is_dir():
        return Check(name, "fail", f"{place} is a file, not a folder", "choose another folder")
    if not os.access(place, os.W_OK | os.X_OK):
        return Check(name, "fail", f"{place} is not writable", "choose another folder, or ask for the right to write")
    return None


def check_hub(
    address: str, *, offline: bool, network: bool, urlopen: Open = urllib.request.urlopen
) -> tuple[Check, Reach]:
    """Whether the hub answers. One HEAD request without data, and only if ``network``.

    Args:
        address: of the hub.
        offline: the user has switched the hub off; nothing is asked then.
        network: may a connection be opened?
        urlopen: what opens it.
    """
    if offline:
        said = "switched off (HF_HUB_OFFLINE): only models and data on this disk are used"
        return Check("hub", "ok", said), "offline"
    if not network:
        return Check("hub", "ok", "not looked at: no connection was opened"), "not looked"
    if not address.startswith(("http://", "https://")):
        remedy = "set HF_ENDPOINT to an address such as https://huggingface.co, or unset it"
        return Check("hub", "fail", f"HF_ENDPOINT {address!r} is not a web address", remedy), "unreachable"
    problem = _ask(address, urlopen)
    if problem is None:
        return Check("hub", "ok", f"{address} answers (one HEAD request, no data sent)"), "reachable"
    remedy = (
        "check network and proxy (HTTPS_PROXY); or run `hf download OWNER/NAME` on a connected machine and give the "
        "folder's path. Models and data on this disk need no hub (HF_HUB_OFFLINE=1 keeps runs from asking)"
    )
    return Check("hub", "warn", f"{address} does not answer: {problem}", remedy), "unreachable"


def _ask(address: str, urlopen: Open) -> str | None:
    """What keeps the address from answering, None if it does; a refusal is an answer."""
    try:
        with urlopen(urllib.request.Request(address, method="HEAD"), timeout=PATIENCE):
            return None
    except urllib.error.HTTPError as error:
        error.close()
        return f"status {error.code}" if error.code >= 500 or error.code == 407 else None
    except urllib.error.URLError as error:
        return str(error.reason)
    except (OSError, ValueError) as error:
        return str(error) or type(error).__name__

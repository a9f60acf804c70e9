"""What stands between this machine and a run, looked at before one is begun.

Each check is a small function from facts to a :class:`Check`; :func:`examine` goes through them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from mlxpref import backends, blas
from mlxpref.config import Config
from mlxpref.doctor import machine, macos, places, plan
from mlxpref.doctor.check import Check, settled
from mlxpref.errors import MlxprefError

__all__ = ["Check", "examine"]


def examine(config: Path | None = None, *, network: bool, speed: bool = True) -> Iterator[Check]:
    """Every check, one by one, the quick ones first.

    Args:
        config: a run's configuration; with it also its model, data and output folder are looked at.
        network: may the hub be asked whether it answers (one HEAD request, no data)? Nothing else here opens
            a connection.
        speed: measure a matrix product (a second).

    Returns:
        Checks in the order of looking. What is wrong is in them: nothing is raised for it.
    """
    yield from settled("versions", machine.look_at_versions)
    read: Config | None = None
    if config is not None:
        found, read = plan.check_config(config)
        yield found
    yield from settled("device", lambda: _machine(read.model.backend if read is not None else "auto", speed))
    yield from settled("disk, hub cache", _hub_disk)
    if read is None:
        yield from settled("disk, here", _here_disk)
    hub, reach = places.check_hub(places.endpoint(), offline=places.is_offline(), network=network)
    yield hub
    if read is not None:
        chosen = read
        yield from settled("plan", lambda: plan.check_plan(chosen, reach, _free_memory()))


def _machine(name: str, speed: bool) -> Iterator[Check]:
    """What the backend knows; without one, that, and what can be known all the same."""
    room = _backend(name)
    found = machine.facts(None if isinstance(room, Check) else room, speed=speed)
    device = found["device"]
    if isinstance(room, Check):
        yield room
    else:
        kind = str(device.get("kind"))
        yield machine.check_device(device, on_mac=machine.on_mac())
        checks = (machine.check_blas(kind, found["blas"], blas.preload().remedy), machine.check_kernels(device))
        yield from (check for check in checks if check is not None)
    yield machine.check_memory(found["memory_gb"], machine.free_memory())
    if machine.on_mac():
        yield from macos.checks(macos.look(device))


def _backend(name: str) -> ModuleType | Check:
    try:
        return backends.get(name)
    except MlxprefError as error:
        return Check("backend", "fail", str(error), machine.REPAIR)
    except Exception as error:  # a broken library may raise anything while it is loaded
        first = (str(error).strip() or "no message").splitlines()[0]
        return Check("backend", "fail", f"cannot be loaded: {type(error).__name__}: {first}", machine.REPAIR)


def _free_memory() -> float:
    free = machine.free_memory()
    return machine.system_memory() if free is None else free


def _hub_disk() -> Check:
    return places.check_disk("disk, hub cache", places.hub_cache(), enough=places.ROOM_FOR_MODEL)


def _here_disk() -> Check:
    return places.check_disk("disk, here", Path.cwd(), enough=places.ROOM_FOR_RUN)

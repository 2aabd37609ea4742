"""Energy meters of the host, beside the GPU's own: RAPL (CPU package, DRAM) and the rails of a DGX Spark's board.

Their joules are those of another rail than the GPU's: they are reported beside it and never added to it. Sources:
Documentation/power/powercap/powercap.rst and Documentation/hwmon/sysfs-interface.rst of the Linux kernel; for `spbm`
the README and spbm.c of github.com/antheas/spark_hwmon, a driver outside the kernel that must be installed by hand.
"""

import errno
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxchunk.telemetry.device import NotSupported, ReadFailed

# powercap's energy_uj and hwmon's energy*_input are in microjoules, hwmon's power*_input in microwatts.
MICRO = 1e-6

USED_HWMON = "spbm"
# Channels of spbm that look like power and are none: limits and budgets, or in later versions a controller's average.
_SPBM_CONTROL = ("pl1", "pl2", "syspl1", "syspl2", "budget_")
# spbm passes on registers of 32 bits in millijoules (4.3 MJ: 12 hours at 100 W); a fork unwraps them itself.
_SPBM_RANGE_UJ = 2**32 * 1000

# The names of RAPL domains; cores and uncore are part of their package, and psys contains the packages.
_RAPL_SCOPES = {"core": "cpu_cores", "uncore": "cpu_uncore", "dram": "dram", "psys": "psys"}


@dataclass(frozen=True)
class UnusedSensor:
    """A meter of energy or power that was seen and is not read, and why."""

    name: str
    reason: str


class Rail:
    """One meter: `name` and `kind` identify it, `scope` says what it measures.

    Attributes:
      name: where it comes from and its label there, such as `rapl:package-0`, `rapl:package-0/dram`, `spbm:sys_total`.
      scope: `cpu_package`, `cpu_cores`, `cpu_uncore`, `dram`, `psys` (the whole platform) or `board rail`.
      kind: whether `read` returns joules (a counter) or watts.
      range_j: what the counter wraps around at, in J; None where that is not known, and for power. The counter must be
        read at least once in half as many joules (2 minutes for 65 kJ at 270 W): to go back by less than half of the
        range is no wrap-around but a reset, and a second wrap-around is not seen.
    """

    def __init__(
        self, name: str, scope: str, kind: Literal["energy", "power"], path: Path, range_uj: int | None = None
    ):
        self.name = name
        self.scope = scope
        self.kind = kind
        self.range_j = None if range_uj is None else range_uj * MICRO
        self._path = path
        self._range_uj = range_uj
        self._last_uj: int | None = None
        self._wrapped_uj = 0
        self._lost: str | None = None  # why the joules since the first reading are not known any more

    def read(self) -> float:
        """Joules since some origin, which never fall (a counter that wraps around is unwrapped), or watts.

        Raises:
          NotSupported: the driver says that it does not have this quantity.
          ReadFailed: no permission, the file is gone or holds no number, or the counter went backwards other than by
            wrapping around (or where it wraps around is not known): its joules stay unknown from then on.
        """
        value = _read_number(self._path)
        if self.kind == "power":
            return value * MICRO
        if self._lost is None and self._last_uj is not None and value < self._last_uj:
            self._unwrap(self._last_uj, value)
        if self._lost is not None:
            raise ReadFailed(self._lost)
        self._last_uj = value
        return (self._wrapped_uj + value) * MICRO

    def _unwrap(self, last_uj: int, value_uj: int) -> None:
        range_uj = self._range_uj
        if range_uj is None:
            self._lost = f"{self._path} went backwards, and where it wraps around is not known"
        elif last_uj > range_uj or range_uj - last_uj + value_uj > range_uj / 2:
            self._lost = f"{self._path} went backwards far from its wrap-around: it was reset, or read too seldom"
        else:
            self._wrapped_uj += range_uj


def find_rails(sysfs: Path = Path("/sys")) -> list[Rail]:
    """Every meter that is there, whether it may be read or not. Reads names and ranges only.

    Args:
      sysfs: where the kernel's sysfs is mounted.
    """
    rails = [_rapl_rail(zone) for zone in _rapl_zones(sysfs)]
    for device, name in _hwmon_devices(sysfs):
        if name == USED_HWMON:
            for path, label, kind in _hwmon_channels(device):
                if not label.startswith(_SPBM_CONTROL):
                    range_uj = _SPBM_RANGE_UJ if kind == "energy" else None
                    rails.append(Rail(f"{name}:{label}", "board rail", kind, path, range_uj))
    return rails


def find_unused(sysfs: Path = Path("/sys")) -> list[UnusedSensor]:
    """The meters that `find_rails` leaves out: what they measure is not known, or known to be something else."""
    unused = [
        UnusedSensor(f"powercap:{zone.name}", "the counter of a package that intel-rapl shows already")
        for zone in sorted(sysfs.glob("class/powercap/intel-rapl-mmio:*"))
    ]
    for device, name in _hwmon_devices(sysfs):
        for _, label, _ in _hwmon_channels(device):
            if name != USED_HWMON:
                unused.append(UnusedSensor(f"{name}:{label}", f"only the hwmon device {USED_HWMON} is read"))
            elif label.startswith(_SPBM_CONTROL):
                unused.append(UnusedSensor(f"{name}:{label}", "a power limit or its controller, not a rail"))
    return unused


def _rapl_zones(sysfs: Path) -> list[Path]:
    """Every RAPL domain once: the kernel shows a subdomain both beside its package and inside it."""
    zones: dict[str, Path] = {}
    for pattern in ("intel-rapl:*", "intel-rapl:*/intel-rapl:*"):  # AMD's are called intel-rapl too
        for zone in (sysfs / "class/powercap").glob(pattern):
            if (zone / "energy_uj").exists():
                zones.setdefault(zone.name, zone)
    return [zones[name] for name in sorted(zones)]


def _rapl_rail(zone: Path) -> Rail:
    domain = _read_text(zone / "name") or zone.name
    scope = "cpu_package" if domain.startswith("package") else _RAPL_SCOPES.get(domain, domain)
    name = domain
    if zone.name.count(":") > 1:  # intel-rapl:0:1 is a part of intel-rapl:0
        parent = zone.name.rpartition(":")[0]
        package = _read_text(zone.parent / parent / "name") or _read_text(zone.parent / "name") or parent
        name = f"{package}/{domain}"
    try:
        range_uj: int | None = _read_number(zone / "max_energy_range_uj") or None
    except (NotSupported, ReadFailed):
        range_uj = None
    return Rail(f"rapl:{name}", scope, "energy", zone / "energy_uj", range_uj)


def _hwmon_devices(sysfs: Path) -> list[tuple[Path, str]]:
    folders = sorted(sysfs.glob("class/hwmon/hwmon*"), key=lambda folder: _natural(folder.name))
    return [(folder, _read_text(folder / "name") or folder.name) for folder in folders]


def _hwmon_channels(device: Path) -> list[tuple[Path, str, Literal["energy", "power"]]]:
    """The energy counters and powers of one hwmon device: file, label, kind."""
    channels: list[tuple[Path, str, Literal["energy", "power"]]] = []
    kinds: tuple[Literal["energy", "power"], ...] = ("energy", "power")
    for kind in kinds:
        paths = sorted(device.glob(f"{kind}*_input"), key=lambda path: _natural(path.name))
        for path in paths:
            channel = path.name.removesuffix("_input")
            channels.append((path, _read_text(device / f"{channel}_label") or channel, kind))
    return channels


def _natural(name: str) -> tuple[int, str]:
    """Sorts power10_input after power2_input."""
    return len(name), name


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip() or None
    except OSError:
        return None


def _read_number(path: Path) -> int:
    try:
        text = path.read_text(errors="replace").strip()
    except PermissionError as error:
        hint = " (Linux lets only root read it since 2020, CVE-2020-8694)" if path.name == "energy_uj" else ""
        raise ReadFailed(f"permission denied: {path}{hint}") from error
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            raise NotSupported(f"{path}: {error.strerror}") from error
        raise ReadFailed(f"{path}: {error.strerror or error}") from error
    # A number of digits only: int() would take "1_000" too. No counter and no power here is negative.
    if not (text.isascii() and text.isdigit()):
        raise ReadFailed(f"{path} holds {text[:40]!r}, not a number")
    return int(text)

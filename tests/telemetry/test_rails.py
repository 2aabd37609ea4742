"""The host's meters, in a sysfs made of files: what is found, what is read, and what is not known."""

import errno
import itertools
from pathlib import Path

import pytest

from jaxchunk.telemetry import NotSupported, ReadFailed
from jaxchunk.telemetry.rails import find_rails, find_unused


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(f"{content}\n")


@pytest.fixture
def sysfs(tmp_path):
    """A host with one CPU package, its DRAM and the Spark's driver; nvme and a GPU's hwmon are there too."""
    powercap, hwmon = tmp_path / "class/powercap", tmp_path / "class/hwmon"
    write(powercap / "intel-rapl", enabled=1)  # the control type: no counter
    write(powercap / "intel-rapl:0", name="package-0", energy_uj=5_000_000, max_energy_range_uj=262_143_328_850)
    write(powercap / "intel-rapl:0:0", name="dram", energy_uj=1_500_000, max_energy_range_uj=65_712_999_613)
    write(powercap / "intel-rapl:1", name="psys", energy_uj=9_000_000, max_energy_range_uj=262_143_328_850)
    (powercap / "intel-rapl:0/intel-rapl:0:0").symlink_to(powercap / "intel-rapl:0:0")  # as the kernel does
    write(powercap / "intel-rapl-mmio:0", name="package-0", energy_uj=5_000_000, max_energy_range_uj=262_143_328_850)
    write(hwmon / "hwmon0", name="nvme", temp1_input=40_000)
    write(
        hwmon / "hwmon2",
        name="spbm",
        power1_input=25_300_000,
        power1_label="sys_total",
        power2_input=18_000_000,
        power2_label="pl1",
        power10_input=100_000,
        energy1_input=123_456_000,
        energy1_label="pkg",
    )
    write(hwmon / "hwmon10", name="amdgpu", power1_input=30_000_000, power1_label="PPT")
    return tmp_path


def rail(sysfs, name, kind="energy"):
    (found,) = [rail for rail in find_rails(sysfs) if rail.name == name and rail.kind == kind]
    return found


def test_what_is_found_and_its_units(sysfs):
    found = [(rail.name, rail.scope, rail.kind, pytest.approx(rail.read())) for rail in find_rails(sysfs)]
    assert found == [
        ("rapl:package-0", "cpu_package", "energy", 5.0),
        ("rapl:package-0/dram", "dram", "energy", 1.5),
        ("rapl:psys", "psys", "energy", 9.0),
        ("spbm:pkg", "board rail", "energy", 123.456),
        ("spbm:sys_total", "board rail", "power", 25.3),
        ("spbm:power10", "board rail", "power", 0.1),
    ]


def test_what_is_seen_and_not_used(sysfs):
    reasons = {sensor.name: sensor.reason for sensor in find_unused(sysfs)}
    assert set(reasons) == {"powercap:intel-rapl-mmio:0", "spbm:pl1", "amdgpu:PPT"}
    assert "limit" in reasons["spbm:pl1"]
    assert "spbm" in reasons["amdgpu:PPT"]


def test_subdomains_that_are_only_inside_their_package(sysfs):
    inside = sysfs / "class/powercap/intel-rapl:0/intel-rapl:0:0"
    inside.unlink()
    (sysfs / "class/powercap/intel-rapl:0:0").rename(inside)
    assert rail(sysfs, "rapl:package-0/dram").read() == pytest.approx(1.5)


def test_two_sockets_have_names_of_their_own(sysfs):
    powercap = sysfs / "class/powercap"
    write(powercap / "intel-rapl:2", name="package-1", energy_uj=1)
    write(powercap / "intel-rapl:2:0", name="dram", energy_uj=2)
    names = [rail.name for rail in find_rails(sysfs)]
    assert {"rapl:package-0/dram", "rapl:package-1/dram"} < set(names)


def test_a_host_without_meters(tmp_path):
    assert find_rails(tmp_path) == []
    assert find_unused(tmp_path) == []


def test_the_counter_is_unwrapped_each_time(sysfs):
    package = rail(sysfs, "rapl:package-0")
    path, range_uj = sysfs / "class/powercap/intel-rapl:0/energy_uj", 262_143_328_850
    readings_j = []
    for value_uj in (range_uj - 1_000_000, 2_000_000, 3_000_000, range_uj - 4_000_000, 0):
        path.write_text(str(value_uj))
        readings_j.append(package.read())
    assert package.range_j == pytest.approx(range_uj * 1e-6)
    steps_j = [later - earlier for earlier, later in itertools.pairwise(readings_j)]
    assert steps_j == pytest.approx([3.0, 1.0, range_uj * 1e-6 - 7.0, 4.0])


def test_spbm_wraps_at_32_bits_of_millijoules(sysfs):
    package = rail(sysfs, "spbm:pkg")
    path = sysfs / "class/hwmon/hwmon2/energy1_input"
    path.write_text(str((2**32 - 5) * 1000))
    before_j = package.read()
    path.write_text("7000")
    assert package.read() - before_j == pytest.approx(0.012)


@pytest.mark.parametrize("range_uj", [None, "garbage", 0])
def test_backwards_without_a_range_is_unknown_from_then_on(sysfs, range_uj):
    zone = sysfs / "class/powercap/intel-rapl:0"
    (zone / "max_energy_range_uj").unlink()
    if range_uj is not None:
        write(zone, max_energy_range_uj=range_uj)
    package = rail(sysfs, "rapl:package-0")
    assert package.range_j is None
    package.read()
    for value_uj in (4_000_000, 4_500_000, 6_000_000):
        write(zone, energy_uj=value_uj)
        with pytest.raises(ReadFailed, match="went backwards"):
            package.read()


@pytest.mark.parametrize(("before_uj", "after_uj"), [(2**32 * 1000 + 1, 1000), (10**9, 0), (4 * 10**12, 3 * 10**12)])
def test_a_reset_is_not_taken_for_a_wrap_around(sysfs, before_uj, after_uj):
    """A driver that was loaded again: adding 2^32 mJ would be an invention."""
    package = rail(sysfs, "spbm:pkg")
    path = sysfs / "class/hwmon/hwmon2/energy1_input"
    path.write_text(str(before_uj))
    package.read()
    for value_uj in (after_uj, before_uj + 1):
        path.write_text(str(value_uj))
        with pytest.raises(ReadFailed, match="went backwards far from"):
            package.read()


@pytest.mark.parametrize("content", ["", "abc", "12.5", "-3", "1_000", "²"])
def test_garbage_is_no_reading(sysfs, content):
    write(sysfs / "class/powercap/intel-rapl:0", energy_uj=content)
    with pytest.raises(ReadFailed, match=r"energy_uj holds .*, not a number"):
        rail(sysfs, "rapl:package-0").read()


def test_a_file_that_goes_away(sysfs):
    total = rail(sysfs, "spbm:sys_total", "power")
    (sysfs / "class/hwmon/hwmon2/power1_input").unlink()
    with pytest.raises(ReadFailed, match="No such file"):
        total.read()


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (PermissionError(errno.EACCES, "Permission denied"), ReadFailed, r"permission denied: .*only root.*since 2020"),
        (OSError(errno.ENODATA, "No data available"), ReadFailed, "No data available"),
        (OSError(errno.EOPNOTSUPP, "Operation not supported"), NotSupported, "Operation not supported"),
    ],
)
def test_the_kernels_refusals(sysfs, monkeypatch, error, kind, words):
    """As root every file can be read, so the refusal is staged."""
    package = rail(sysfs, "rapl:package-0")
    read_text = Path.read_text

    def refuse(path, *arguments, **options):
        if path.name == "energy_uj":
            raise error
        return read_text(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(kind, match=words):
        package.read()
    assert "rapl:package-0" in [rail.name for rail in find_rails(sysfs)]


def test_names_that_cannot_be_read(sysfs):
    (sysfs / "class/powercap/intel-rapl:0/name").unlink()
    (sysfs / "class/hwmon/hwmon10/name").unlink()
    assert "rapl:intel-rapl:0" in [rail.name for rail in find_rails(sysfs)]
    assert "hwmon10:PPT" in [sensor.name for sensor in find_unused(sysfs)]

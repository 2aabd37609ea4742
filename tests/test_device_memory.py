"""A GPU that shares the host's memory must not be allowed to take most of it at once."""

import pytest

from jaxchunk import device_memory, telemetry


class Gpu:
    def __init__(self, own_memory):
        self.has_own_memory = lambda: own_memory


class Allocator:
    def __init__(self, limit_bytes):
        self.memory_stats = lambda: None if limit_bytes is None else {"bytes_limit": limit_bytes}


@pytest.fixture
def machine(monkeypatch):
    def use(*own_memory):
        monkeypatch.setattr(telemetry, "all_devices", lambda: [Gpu(own) for own in own_memory])

    return use


def test_preallocation_is_off_only_where_memory_is_shared(machine):
    for gpus, expected in (((False,), "false"), ((True,), None), ((True, False), "false"), ((), None)):
        machine(*gpus)
        environment = {}
        device_memory.allocate_as_needed(environment)
        assert environment.get("XLA_PYTHON_CLIENT_PREALLOCATE") == expected


def test_the_users_choice_stands(machine):
    machine(False)
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "true"}
    device_memory.allocate_as_needed(environment)
    assert environment == {"XLA_PYTHON_CLIENT_PREALLOCATE": "true"}


def test_beside_another_library_jax_keeps_to_half(machine):
    for unified, off in ((True, {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}), (False, {})):
        machine(not unified)
        environment = {}
        device_memory.allocate_as_needed(environment, beside_others=True)
        assert environment == off | {"XLA_CLIENT_MEM_FRACTION": "0.5"}
    for choice in ({"XLA_CLIENT_MEM_FRACTION": "0.3"}, {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.3"}):
        environment = choice | {"XLA_PYTHON_CLIENT_PREALLOCATE": "true"}
        device_memory.allocate_as_needed(environment, beside_others=True)
        assert environment == choice | {"XLA_PYTHON_CLIENT_PREALLOCATE": "true"}


def test_the_limit_is_what_the_host_can_spare(machine, monkeypatch):
    monkeypatch.setattr(device_memory, "available_bytes", lambda: 50 * 10**9)
    machine(False)
    assert device_memory.limit_bytes(Allocator(96 * 10**9)) == 45 * 10**9
    assert device_memory.limit_bytes(Allocator(30 * 10**9)) == 30 * 10**9
    machine(True)
    assert device_memory.limit_bytes(Allocator(96 * 10**9)) == 96 * 10**9
    assert device_memory.limit_bytes(Allocator(None)) is None


def test_available_bytes_reads_linuxs_figure(tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       131072000 kB\nMemFree:         1000 kB\nMemAvailable:   64000000 kB\n")
    assert device_memory.available_bytes(meminfo) == 64_000_000 * 1024

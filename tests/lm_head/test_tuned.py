"""The table of tuned tiles: which entry is chosen, what is refused, what is said."""

import dataclasses
import json
import logging

import pytest

from jaxchunk.lm_head.kernels import tiles, triton_gemm, tuned
from jaxchunk.lm_head.kernels.tiles import MosaicConfig
from jaxchunk.lm_head.kernels.triton_gemm import TritonTiles
from jaxchunk.lm_head.kernels.tuned import Entry, config_of, read_table

TYPES = {"mosaic": MosaicConfig, "triton_gemm": TritonTiles}


def entry(**changes):
    plain = Entry("mosaic", "GPU A", 4096, 1024, 65536, {"stages": 3}, 2.0, 1.1, "0.11.2", "2026-01-31")
    return dataclasses.asdict(dataclasses.replace(plain, **changes))


@pytest.fixture
def own_table(tmp_path, monkeypatch):
    """Writes a table of the user's own."""

    def write(*records, text=None):
        path = tmp_path / "own.json"
        path.write_text(json.dumps(records) if text is None else text)
        monkeypatch.setenv(tuned.VARIABLE, str(path))
        for cached in (tuned._choose, tuned._usable, tuned._read_once):
            cached.cache_clear()
        return path

    return write


def mosaic(C, D, V, device="GPU A"):
    return tuned.choose("mosaic", MosaicConfig, C, D, V, device, any_device=True)


def test_the_table_of_the_package_can_be_used_whole():
    table = read_table(tuned.SHIPPED)
    assert table.entries and not table.complaints
    for one in table.entries:
        config = config_of(TYPES[one.kernel], one.config)  # raises where it does not fit
        assert dataclasses.asdict(config) == one.config
    cases = [(one.kernel, one.device, one.C, one.D, one.V) for one in table.entries]
    assert len(set(cases)) == len(cases)


def test_the_width_counts_more_than_the_number_of_tiles(own_table):
    own_table(entry(C=8192, D=896, V=151936, config={"stages": 2}), entry(D=4096, V=128256, config={"stages": 3}))
    for C in (1024, 8192, 65536):
        for V in (32000, 151936, 256000):
            for D in (896, 1536):
                assert mosaic(C, D, V).stages == 2
            for D in (3584, 8192):
                assert mosaic(C, D, V).stages == 3


def test_the_nearest_entry_of_the_device_is_chosen(own_table):
    own_table(
        entry(config={"stages": 2}),
        entry(D=4096, config={"stages": 3}),
        entry(V=8192, config={"stages": 4}),
        entry(C=512, device="GPU B", D=2048, V=10000, config={"grid_width": 5}),
    )
    assert mosaic(4096, 1024, 65536).stages == 2
    assert mosaic(100, 1000, 70000).stages == 2
    assert mosaic(4096, 3000, 65536).stages == 3
    assert mosaic(4096, 900, 9000).stages == 4
    assert mosaic(512, 2048, 10000).grid_width != 5  # another device's, however near
    assert mosaic(512, 2048, 10000, "GPU B").grid_width == 5
    assert mosaic(512, 2048, 10000, "GPU C").grid_width == 5  # none of its own: any device's


def test_a_device_without_entries_takes_those_of_the_package(monkeypatch):
    monkeypatch.delenv(tuned.VARIABLE, raising=False)
    entries = [one for one in read_table(tuned.SHIPPED).entries if one.kernel == "mosaic"]
    for here in entries:
        same = [one.config for one in entries if (one.C, one.D, one.V) == (here.C, here.D, here.V)]
        assert dataclasses.asdict(tiles.choose_config(here.C, here.D, here.V)) in same


def test_of_equals_the_user_s_goes_first(own_table):
    shipped = read_table(tuned.SHIPPED).entries[0]
    own_table(entry(device=shipped.device, C=shipped.C, D=shipped.D, V=shipped.V, config={"grid_width": 7}))
    assert mosaic(shipped.C, shipped.D, shipped.V, shipped.device).grid_width == 7


def test_triton_s_tiles_are_of_the_same_device_or_the_default(own_table):
    own_table(entry(kernel="triton_gemm", config={"tile_k": 64}), entry(config={"stages": 2}))
    chosen = [
        tuned.choose("triton_gemm", TritonTiles, 64, 64, 64, device, any_device=False) for device in ("GPU A", "GPU B")
    ]
    assert chosen == [TritonTiles(tile_k=64), TritonTiles()]
    assert triton_gemm.choose_config(64, 64, 64) == TritonTiles()  # of a CPU there is none


def test_what_was_chosen_and_from_where_is_said_once(own_table, caplog):
    own_table(entry())
    with caplog.at_level(logging.INFO, "jaxchunk"):
        for _ in range(2):
            mosaic(4096, 1000, 65536)
    (line,) = caplog.messages
    assert "exponentials of [4096, 1000] x [65536, 1000] by mosaic, MosaicConfig(" in line and "stages=3" in line
    assert line.endswith("(tuned for C=4096 D=1024 V=65536 on GPU A: 2.000 ms, 1.100 times cuBLAS)")
    caplog.clear()
    with caplog.at_level(logging.INFO, "jaxchunk"):
        tuned.choose("triton_gemm", TritonTiles, 1, 1, 1, "GPU A", any_device=False)
    assert "(the default: no table has an entry for GPU A)" in caplog.text


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"config": {"stages": 3, "depth": 2}}, "MosaicConfig has no field 'depth'"),
        ({"config": {"stages": 2.5}}, "stages is 2.5; it must be a whole number of at least 1"),
        ({"config": {"stages": True}}, "stages is True"),
        ({"config": {"schedule": "relaxed"}}, "schedule is 'relaxed'; it must be one of 'cooperative', 'pingpong'"),
        ({"config": {"cluster": "k"}}, "cluster is 'k'; it must be one of 'm', 'n', None"),
        ({"config": {"stages": 9}}, "bytes of shared memory; there are 232448"),
        ({"config": {"tile_n": 96}}, "tile_n is 96; it must be a multiple of store_n, 64"),
        ({"kernel": "cutlass"}, "kernel is 'cutlass'; choose from mosaic, triton_gemm"),
        ({"C": 0}, "C is 0; it must be a whole number greater than 0"),
        ({"milliseconds": "fast"}, "milliseconds is 'fast'; it must be a number greater than 0"),
        ({"device": None}, "device is None; it must be a string"),
        ({"config": []}, r"config is []; it must be an object"),
    ],
    ids=str,
)
def test_an_entry_that_cannot_be_used_is_left_out_with_a_word(own_table, caplog, changes, reason):
    path = own_table(entry() | changes, entry(D=999, config={"stages": 2}))
    for _ in range(2):
        assert mosaic(4096, 1024, 65536).stages == 2
    (line,) = (record.message for record in caplog.records if record.levelno == logging.WARNING)
    assert str(path) in line and "is left out: " in line and reason in line


def test_unknown_and_missing_fields_of_an_entry_are_named(own_table, caplog):
    lacking = entry()
    del lacking["date"]
    own_table(entry() | {"power_w": 700}, lacking, "entry")
    mosaic(4096, 1024, 65536)
    assert [line.split("entry ")[1] for line in caplog.messages] == [
        "1 is left out: unknown fields power_w",
        "2 is left out: it lacks date",
        "3 is left out: it is no object",
    ]


@pytest.mark.parametrize(("text", "reason"), [("[{", "Expecting"), ("{}", "it is no list of entries")], ids=str)
def test_a_table_that_is_broken_is_left_out_with_a_word(own_table, caplog, text, reason):
    path = own_table(text=text)
    for _ in range(2):
        assert mosaic(8192, 896, 151936, "NVIDIA H200").grid_width > 0
    (line,) = caplog.messages
    assert line.startswith(f"{path} cannot be used as a table of tiles: ") and reason in line


def test_a_table_that_is_not_there_is_left_out_with_a_word(own_table, caplog):
    own_table(text="[]").unlink()
    assert mosaic(8192, 896, 151936) == mosaic(8192, 896, 151936, "NVIDIA H200")
    (line,) = caplog.messages
    assert "No such file" in line


@pytest.mark.parametrize(
    ("tiles_", "reason"),
    [({"tile_n": 96}, "power of two"), ({"tile_k": 8}, "16 of a tensor core"), ({"tile_k": 512}, "no GPU has that")],
    ids=str,
)
def test_triton_s_obstacles(tiles_, reason):
    with pytest.raises(ValueError, match=reason):
        config_of(TritonTiles, tiles_)

"""The kernels of the fused implementation as the tuner sees them: what they can be asked, and what to try."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic

import jax

from jaxchunk.bench.descent import Space
from jaxchunk.errors import InputError
from jaxchunk.lm_head.kernels import Exponentials, tiles, triton_gemm
from jaxchunk.lm_head.kernels.tiles import MosaicConfig
from jaxchunk.lm_head.kernels.triton_gemm import TritonTiles
from jaxchunk.lm_head.kernels.tuned import Config

_SMALL_SHARED_MEMORY_BYTES = 99 * 1024  # of Ada and GB10
_MOSAIC_STAGES = (2, 3, 4, 5, 6, 7, 8, 10, 12)
_TRITON_STAGES = (2, 3, 4, 5)

Replacements = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class TunableKernel(Generic[Config]):
    """A kernel and what of it is tuned.

    Attributes:
      name: as in the table (`tuned.KERNELS`).
      config_type: of its configurations.
      space: what to try.
      chosen: the configuration that it takes for C, D and V now.
      multiples: what C, D and V must be multiples of.
      exponentials: the kernel (`kernels/__init__.py` has the contract), which takes `config=` as well.
    """

    name: str
    config_type: type[Config]
    space: Space[Config]
    chosen: Callable[[int, int, int], Config]
    multiples: tuple[int, int, int]
    exponentials: Callable[..., Exponentials]


def kernel_named(name: str) -> TunableKernel[Any]:
    """The kernel of this name.

    Raises:
      InputError: this JAX cannot run it.
    """
    if name == "triton_gemm":
        return TunableKernel(
            name, TritonTiles, triton_space(), triton_gemm.choose_config, (1, 1, 1), triton_gemm.exponentials
        )
    if jax.version.__version_info__ < (0, 11):
        raise InputError(f"--kernel {name} needs JAX 0.11 and this is {jax.__version__}; use triton_gemm")
    from jaxchunk.lm_head.kernels import mosaic  # imported on demand: JAX 0.10 has not all that it needs

    multiples = mosaic.ROWS_MULTIPLE, mosaic.WIDTH_MULTIPLE, mosaic.COLUMNS_MULTIPLE
    return TunableKernel(name, MosaicConfig, mosaic_space(), tiles.choose_config, multiples, mosaic.exponentials)


def mosaic_space() -> Space[MosaicConfig]:
    """Tiles and schedules first: everything else depends on them."""
    shapes = ({"tile_m": m, "tile_n": n} for m, n in ((128, 128), (64, 256), (128, 192)))
    schedules: Replacements = (
        {"schedule": "cooperative", "split": "m", "tile_k": 64},
        {"schedule": "cooperative", "split": "n", "tile_k": 64},
        {"schedule": "pingpong", "split": "m", "tile_k": 64},
        {"schedule": "pingpong", "split": "m", "tile_k": 32},
    )
    return Space(
        {
            "tile and schedule": _products(shapes, schedules),
            "order": _products(_values("grid_minor", "m", "n"), _values("grid_width", 4, 8, 16, 32, 64)),
            "cluster": _values("cluster", None, "m", "n"),
            "store": _products(_values("store_n", 32, 64, 128), _values("store_slots", 1, 2)),
            "stages": _values("stages", *_MOSAIC_STAGES),
        },
        _adapted_mosaic,
    )


def _adapted_mosaic(config: MosaicConfig, dimension: str) -> MosaicConfig:
    if config.tile_n % config.store_n and dimension != "store":
        config = dataclasses.replace(config, store_n=64)
    if dimension == "tile and schedule" or (dimension == "store" and config.obstacle is not None):
        config = _deepest(config, "stages", _MOSAIC_STAGES, lambda deeper: deeper.obstacle is None)
    return config


def triton_space() -> Space[TritonTiles]:
    """Tiles and warps first: everything else depends on them."""
    pairs = (64, 64), (64, 128), (128, 64), (128, 128), (64, 256), (128, 256), (256, 128)
    shapes = ({"tile_m": m, "tile_n": n} for m, n in pairs)
    return Space(
        {
            "tile and warps": _products(shapes, _values("tile_k", 32, 64), _values("num_warps", 4, 8)),
            "order": _values("group", 4, 8, 16, 32),
            "stages": _values("num_stages", *_TRITON_STAGES),
        },
        _adapted_triton,
    )


def _adapted_triton(config: TritonTiles, dimension: str) -> TritonTiles:
    """New tiles begin with a pipeline that every GPU has room for; what larger ones gain by more is tried after."""
    if dimension != "tile and warps":
        return config
    return _deepest(
        config, "num_stages", _TRITON_STAGES, lambda deeper: deeper.shared_memory_bytes <= _SMALL_SHARED_MEMORY_BYTES
    )


def _deepest(config: Config, field: str, depths: Iterable[int], fits: Callable[[Config], bool]) -> Config:
    """With the longest pipeline that fits; with the shortest of all where none does."""
    deeper = [dataclasses.replace(config, **{field: depth}) for depth in depths]
    return next((candidate for candidate in reversed(deeper) if fits(candidate)), deeper[0])


def _values(field: str, *values: Any) -> Replacements:
    return [{field: value} for value in values]


def _products(*dimensions: Iterable[Mapping[str, Any]]) -> Replacements:
    return [functools.reduce(lambda a, b: {**a, **b}, parts) for parts in itertools.product(*dimensions)]

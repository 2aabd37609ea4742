"""The device that traced code is meant for."""

import jax
from jax.sharding import AbstractDevice


def target_device() -> jax.Device | AbstractDevice:
    """An abstract mesh's device, or the default device, or the first of the back end."""
    abstract_device: AbstractDevice | None = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if abstract_device is not None:
        return abstract_device
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    if device is None or isinstance(device, str):
        device = jax.local_devices(backend=device)[0]
    return device

"""The training loop: config, step, loop, records."""

"""Energies of simulated training steps against the true joules, where the counter is dear: the table of docs/energy.md.

`python tests/telemetry/step_energies.py` prints it (results/simulation/step_energies/table.md). Nothing is measured.
"""

import itertools

import numpy as np
from test_power_samples import Steps, rig

from jaxchunk.telemetry.simulation.simulated import drive

LAYERS_S = (0.004, 0.0071, 0.0099, 0.011, 0.0163, 0.0198, 0.0203, 0.021, 0.041, 0.05)
FROM_S, UNTIL_S = 8.0, 37.0


def errors(seed, layer_s, swing, sample_mean_s):
    """(whether the energy is known, error, bound) of each step; both of the true joules."""
    profile = Steps(seed, layer_s=layer_s, swing=swing, until_s=42.0)
    clock, device, monitor = rig(profile, seed=seed, samples_every_s=0.02, sample_mean_s=sample_mean_s)
    drive(monitor.sampler.poll_once, clock, UNTIL_S + 3.0, lateness_s=0.001, seed=seed)
    for start_s, end_s in itertools.pairwise(profile.starts_s):
        if start_s >= FROM_S and end_s <= UNTIL_S:
            true_j = device.true_energy_j(start_s, end_s)
            found, _ = monitor.sampler.tracks.energy_between(start_s, end_s)
            known = monitor.window(start_s, end_s).energy_j is not None
            yield known, abs(found.value - true_j) / true_j, found.bound / true_j


def main():
    print(
        "**SIMULATION: nothing here was measured.** Steps of 0.41 s, counter at 3.5 ms a reading, a sample every 20 ms;"
    )
    print(f"power swings within layers of {', '.join(f'{1e3 * s:g}' for s in LAYERS_S)} ms.")
    print()
    print(
        "| swing | a sample is | steps | with an energy | error: median, 99%, most | bound: median | beyond the bound |"
    )
    print("|---|---|---|---|---|---|---|")
    for swing, mean_s in itertools.product((0.0, 0.08, 0.15, 0.3), (0.02, 0.0)):
        runs = [errors(seed, layer_s, swing, mean_s) for seed, layer_s in enumerate(LAYERS_S)]
        known, error, bound = np.array(list(itertools.chain(*runs))).T
        middle, late, most = np.quantile(error, (0.5, 0.99, 1.0))
        sample = "the mean of 20 ms" if mean_s else "of a moment"
        print(
            f"| +-{swing:.0%} | {sample} | {len(error)} | {known.mean():.0%} | "
            f"{middle:.2%}, {late:.2%}, {most:.2%} | {np.median(bound):.1%} | {np.mean(error > bound):.1%} |"
        )


if __name__ == "__main__":
    main()

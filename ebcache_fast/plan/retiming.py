"""Which step of a run is where a step of a run of another number of steps is."""


def steps_as_far(own: int, others: int) -> list[int]:
    """For each of ``others`` steps the one of ``own`` that is as far into its run, the earlier where two are as near.

    By index, the first and the last at the ends. By timestep or log-SNR a table comes less near to one that is
    calibrated where the sampler spaces its timesteps in another way: `bench/retime.py` measures it.
    """
    if others == 1:
        return [0]
    # ceil(x - 1/2) of x = step * (own - 1) / (others - 1), in whole numbers, so that rounding decides nothing.
    last = others - 1
    return [-((last - 2 * step * (own - 1)) // (2 * last)) for step in range(others)]

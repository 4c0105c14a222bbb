"""Retiming by step index: the step of a run that matches each step of a run of another length."""


def steps_as_far(own: int, others: int) -> list[int]:
    """The step among ``own`` that is as far into its run as each of ``others`` is, the earlier where two are as near.

    By index, the first and the last at the ends. By timestep or log-SNR a table comes less near to one that is
    calibrated where the sampler spaces its timesteps in another way: `bench/retime.py` measures it.
    """
    if others == 1:
        return [0]
    # ceil(x - 1/2) of x = step * (own - 1) / (others - 1), in whole numbers, so that rounding decides nothing.
    last = others - 1
    return [-((last - 2 * step * (own - 1)) // (2 * last)) for step in range(others)]

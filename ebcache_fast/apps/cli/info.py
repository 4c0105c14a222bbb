"""``ebcache-fast info``: what runs here."""


def info() -> None:
    """Say what runs here: versions, device, Triton, the backend of every operation, the tables at hand."""
    from ebcache_fast.apps import console

    console.print_info()

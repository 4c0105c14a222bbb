"""The typed errors. Each message names the value, the allowed range and the remedy."""


class EBCacheError(Exception):
    """Base of every error that ebcache_fast raises on purpose."""


class TableError(EBCacheError, ValueError):
    """A cache table or plan is malformed, or does not fit the model or the sampler."""


class InputError(EBCacheError, ValueError):
    """An argument is outside what the operation can take."""


class CacheLimitError(InputError):
    """The caches of a run would take more memory than ``max_cache_bytes`` allows."""


class TrajectoryError(EBCacheError, RuntimeError):
    """Steps were executed in an order, or on inputs, that the trajectory was not made for."""


class CaptureError(EBCacheError, RuntimeError):
    """A CUDA graph could not be captured, or a kernel launched, and ``strict=True`` forbids the fallback."""


class JobError(EBCacheError, RuntimeError):
    """A resumable job can't start or resume: its files disagree with its arguments, or can't be written."""

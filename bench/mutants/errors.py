"""The error of the mutation tests; the package's own would cost an import of torch."""


class MutationError(Exception):
    """The mutants can't be made or run; the message names what is in the way and the remedy."""

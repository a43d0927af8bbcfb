"""The errors of the package. Each message names the thing, the cause and the next step."""

from __future__ import annotations


class FisherscopeError(Exception):
    """Base of every error that the package raises on purpose."""


class UsageError(FisherscopeError, ValueError):
    """An argument or an option is something that it cannot be."""


class DataError(FisherscopeError):
    """A task, a row or a file of rows cannot be used."""


class AdapterError(FisherscopeError):
    """No adapter knows the model, or the layout it gave is wrong."""


class CoverageError(FisherscopeError):
    """Parameters were asked for that cannot be instrumented."""


class CoupledSamplesError(FisherscopeError):
    """The gradient of a sample depends on the other samples of its batch."""


class ModelBusyError(FisherscopeError):
    """Another call is collecting from the same model."""


class ModelChangedError(FisherscopeError):
    """The model is made of other modules or parameters than when it was wrapped."""


class NonFiniteError(FisherscopeError):
    """A weight, an activation, a loss or a gradient is NaN or infinite."""


class StoreError(FisherscopeError):
    """Base of the errors of the contribution store."""


class StoreExistsError(StoreError):
    """The output directory holds something else."""


class StoreFormatError(StoreError):
    """The directory is not a store, or one of another format version."""


class StoreFullError(StoreError):
    """The disk cannot hold what would be written."""


class StoreLockedError(StoreError):
    """Another process writes to this store."""


class FingerprintError(StoreError):
    """The store was written by another run than the one that wants to resume it."""


class CorruptStoreError(StoreError):
    """Bytes in the store are missing or damaged."""


class NotStoredError(StoreError):
    """The quantity was not collected."""


class MemoryBudgetError(StoreError, MemoryError):
    """What was asked for would not fit the memory that a reader may take."""


class Interrupted(FisherscopeError):  # noqa: N818 - an event, not a fault
    """A collection was stopped by a signal after sealing what was done.

    Attributes:
        signal: number of the signal.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal

"""Every error this package raises on purpose, and the exit code a job ends with.

    LrurecError                  70  internal: report it
    ├── ConfigError              30  a setting is wrong; names the setting, the rule, the way out
    ├── DataNotReadyError        20  an input does not exist (yet)
    ├── DataQualityError         21  an input exists and cannot be used
    ├── CatalogueError           21  item ids do not belong together
    ├── IntegrityError           70  committed files are missing or changed
    │   ├── CheckpointError      70
    │   └── BundleError          70
    ├── StorageError             70  a store cannot hold or give what is asked: full disk, file replaced while read
    │   └── TryAgainError        75  a store fails for a reason that passes: network, throttling, server fault
    ├── StateError               70  a user state cannot be used: its bytes are not those of a state
    │   └── StateVersionError    70  another bundle made it; the user's history makes a new one
    ├── RequestError             70  a request asks the service for what it cannot give; the service goes on
    ├── DivergenceError          70  the loss is no longer finite
    ├── GateRefusedError         10  a bundle is not good enough to serve; the one before goes on serving
    ├── LeaseError               40  another run holds the lease
    ├── ChannelMovedError        75  somebody else moved a registry's channel meanwhile; the same command looks again
    ├── WorkersError             75  workers or nodes are lost, or not there, for longer than the settings allow
    └── StoppedError             75  somebody stopped the job; the same command goes on

Messages follow one form: setting=value, the rule it breaks, the numbers, the way out.
"""

EXIT_DONE = 0


class LrurecError(Exception):
    """Base of every deliberate error; `exit_code` is what the job's process returns."""

    exit_code = 70


class ConfigError(LrurecError):
    """A setting is unknown, of the wrong type, or impossible together with another one."""

    exit_code = 30


class DataNotReadyError(LrurecError):
    """An input path does not exist or holds no files."""

    exit_code = 20


class DataQualityError(LrurecError):
    """An input exists but is empty, lacks a column, or has too many unusable rows."""

    exit_code = 21


class CatalogueError(LrurecError):
    """Item ids of two artefacts come from different catalogues."""

    exit_code = 21


class IntegrityError(LrurecError):
    """A committed directory misses a file or holds one that changed after the commit."""


class CheckpointError(IntegrityError):
    """A checkpoint cannot be used."""


class BundleError(IntegrityError):
    """A bundle cannot be used."""


class StorageError(LrurecError):
    """A store cannot hold or give what is asked of it."""


class TryAgainError(StorageError):
    """A store failed again and again for a reason that passes; the same command may succeed later."""

    exit_code = 75


class StateError(LrurecError):
    """A user state cannot be used."""


class StateVersionError(StateError):
    """A user state was made by another bundle than the one that is asked; the user's history makes a new one."""


class RequestError(LrurecError):
    """A request asks the service for what it cannot give; its sender learns why."""


class DivergenceError(LrurecError):
    """Training produced a loss that is not finite."""


class GateRefusedError(LrurecError):
    """The gate refuses a bundle; the decision record says which checks failed, with their numbers."""

    exit_code = 10


class LeaseError(LrurecError):
    """Another run holds the lease of a directory, or took it over."""

    exit_code = 40


class ChannelMovedError(LrurecError):
    """A channel of the registry is no longer what it was when the work began; nothing was changed."""

    exit_code = 75


class WorkersError(LrurecError):
    """The cluster lost training workers too often, or does not have them; the same command goes on later."""

    exit_code = 75


class StoppedError(LrurecError):
    """The job was asked to stop; the same command goes on where it stopped."""

    exit_code = 75

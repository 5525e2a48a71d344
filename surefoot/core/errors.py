"""Errors a user can act on. Each message is one line that says what is wrong and what to do about it.

The CLI prints the message and exits with `exit_code`; the server answers `http_status` in OpenAI's error shape.
"""


class SurefootError(Exception):
    """Base of all errors that are the input's or the environment's fault, not a bug."""

    exit_code = 2
    http_status = 400
    code: str | None = None


class ModelError(SurefootError):
    """The model folder, its configuration or its weights cannot be used as they are."""


class InputError(SurefootError):
    """A prompt, a flag or a sampling parameter is impossible."""


class DeviceError(SurefootError):
    """The requested device is absent or cannot do what was asked of it."""

    http_status = 500


class CapacityError(SurefootError):
    """The request can never fit into the memory or the limits that the engine was given."""


class OfflineError(SurefootError):
    """A download was needed and the network or the hub library is not available."""


class StepError(RuntimeError):
    """A step of the engine failed: a bug or a device, not the input. Its requests have ended; the engine can go on."""

    def __init__(self, request_ids: list[str], cause: BaseException):
        super().__init__(f"a step with {len(request_ids)} requests failed: {type(cause).__name__}: {cause}")
        self.request_ids = request_ids


def first_line(error: BaseException) -> str:
    """What another library's error says first, for a message of one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]

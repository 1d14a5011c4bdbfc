# SPDX-License-Identifier: Apache-2.0
"""What went wrong at the Hub, as a part of a sentence."""

from huggingface_hub.errors import HfHubHTTPError


ADVICE = {
    401: "log in with `hf auth login`, or set HF_TOKEN",
    403: "the token has to be one that may do this",
}


def hub_reason(error: BaseException) -> str:
    """
    Why the Hub, or the way to it, did not do what it was asked.

    Args:
        error (`BaseException`):
            Of the client.

    Returns:
        `str`: one line, without a full stop.
    """
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        said = f" ({error.server_message.rstrip('.')})" if error.server_message else ""
        advice = f"; {ADVICE[status]}" if status in ADVICE else ""
        return f"it answers {status}{said}{advice}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__

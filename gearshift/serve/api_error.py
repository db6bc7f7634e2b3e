"""The error that an HTTP request gets. `app.py` turns it into a status and one line of JSON."""

from __future__ import annotations

from collections.abc import Mapping

from gearshift.errors import GearshiftError


class ApiError(GearshiftError):
    """A request that is refused, or that fails."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """`status`: the HTTP status. `code`: a word for programs, such as `model_not_found`.
        `param`: the field of the request that is wrong. `headers`: further headers of the answer.
        """
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.headers = dict(headers or {})

"""Logs as JSON lines that carry the run's and the request's id, and the metrics of Prometheus."""

from __future__ import annotations

import json
import logging
import sys
import time
from contextvars import ContextVar
from typing import Any

#: The run that the code is working on, for the log.
run_id_of_log: ContextVar[str] = ContextVar("run_id_of_log", default="")
#: The HTTP request that the code is answering, for the log.
request_id_of_log: ContextVar[str] = ContextVar("request_id_of_log", default="")

_PLAIN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}


class JsonLines(logging.Formatter):
    """One JSON object per record; what was passed as `extra` are fields of it."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line: dict[str, Any] = {
            "at": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name, variable in (("run_id", run_id_of_log), ("request_id", request_id_of_log)):
            if variable.get():
                line[name] = variable.get()
        for name, value in vars(record).items():
            if name not in _PLAIN:
                line[name] = value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def set_up_logs(form: str, level: str = "info") -> None:
    """Everything to standard error, as `json` lines or as `text`."""
    handler = logging.StreamHandler(sys.stderr)
    if form == "json":
        handler.setFormatter(JsonLines())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers[:] = []
        logger.propagate = True
    # Their news are of no use to who runs the service.
    for name in ("alembic", "numba", "uvicorn.access"):
        logging.getLogger(name).setLevel(logging.WARNING)

"""The log of the server, on stderr: a line an event, whatever a caller or a file is named."""

import json
import logging
import re
import sys
from datetime import UTC, datetime
from typing import Any

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class TextLines(logging.Formatter):
    """Time, level and message; a traceback follows, indented."""

    def format(self, record: logging.LogRecord) -> str:
        line = f"{_time(record)} {record.levelname} {one_line(record.getMessage())}"
        if record.exc_info:
            trace = self.formatException(record.exc_info).split("\n")
            line = "\n    ".join([line, *map(one_line, trace)])
        return line


class JsonLines(logging.Formatter):
    """An object a line: time, level, message, and what else the event has."""

    def format(self, record: logging.LogRecord) -> str:
        event: dict[str, Any] = {"time": _time(record), "level": record.levelname.lower()}
        event |= {"message": record.getMessage(), **getattr(record, "event", {})}
        if record.exc_info:
            event["traceback"] = self.formatException(record.exc_info)
        return json.dumps(event)


def log_to_stderr(log_format: str) -> None:
    """Log everything of this process as "text" or as "json"."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if log_format == "json" else TextLines())
    logging.getLogger().addHandler(handler)
    logging.getLogger("hnsw_gpu").setLevel(logging.INFO)
    logging.captureWarnings(True)


def one_line(text: str) -> str:
    """The text with its line breaks and other controls written out."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")

"""The OpenAPI document of the server's HTTP interface."""

from typing import Any

import hnsw_gpu
from hnsw_gpu.serve.formats import FORMATS, JSON, NPY, SAFETENSORS

PROBLEM = "application/problem+json"
TITLES = {
    400: "Malformed request",
    401: "Not authorised",
    403: "Forbidden",
    404: "Not found",
    405: "Method not allowed",
    406: "Not acceptable",
    408: "The request came too slowly",
    409: "A swap is running",
    413: "Too large",
    414: "Too long a URL",
    415: "Unsupported media type",
    421: "Not this server",
    422: "Wrong request",
    429: "Too many rows wait",
    431: "Too long a head",
    500: "Internal error",
    503: "Not serving",
    504: "Too late",
    505: "Unsupported version of HTTP",
    507: "Not enough memory",
}


def document(limits: dict[str, int], has_token: bool) -> dict[str, Any]:
    """The OpenAPI 3.1 document; `limits` holds the largest `k` and `ef`."""
    paths = {
        "/v1/search": {"post": _search(limits)},
        "/v1/index": {"get": _get("The index being served", _ref("Index"), 503)},
        "/v1/index:swap": {"post": _swap()},
        "/health/live": {"get": _get("Is the process alive?", _ref("State"))},
        "/health/ready": {"get": _get("Does it answer searches?", _ref("State"), 503)},
        "/metrics": {"get": _text("Prometheus metrics", "text/plain")},
        "/openapi.json": {"get": _get("This document", {"type": "object"})},
        "/": {"get": _text("A live status page", "text/html")},
    }
    found: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "hnsw_gpu",
            "version": hnsw_gpu.__version__,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {"schemas": SCHEMAS},
    }
    for methods in paths.values():
        for operation in methods.values():
            operation["responses"]["421"] = _problem(421)
    if has_token:
        found["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        for path, methods in paths.items():
            if path not in ("/", "/health/live", "/health/ready"):
                for operation in methods.values():
                    operation["security"] = [{"token": []}]
                    operation["responses"]["401"] = _problem(401)
    return found


def _search(limits: dict[str, int]) -> dict[str, Any]:
    def parameter(name: str, schema: dict[str, Any], what: str, where: str = "query") -> Any:
        return {"name": name, "in": where, "schema": schema, "description": what}

    def number(most: int, default: int) -> dict[str, Any]:
        return {"type": "integer", "minimum": 1, "maximum": most, "default": default}

    binary = {"type": "string", "format": "binary"}
    asked = {JSON: {"schema": _ref("Asked")}, NPY: {"schema": binary}}
    asked[SAFETENSORS] = {"schema": binary}
    return {
        "summary": "The k nearest labels of every query",
        "description": "The body holds queries (q, dim): a .npy, or by name safetensors or JSON. "
        "The result has labels and distances (q, k), nearest first, which a .npy holds as two "
        "fields. Missing results: label -1, distance infinite (null in JSON). Labels that are "
        "strings are given in JSON; a missing one is empty. A .npy holds them as <U; safetensors "
        "holds their UTF-8, and label_offsets.",
        "parameters": [
            parameter("k", number(limits["k"], 10), "results per query"),
            parameter("ef", number(limits["ef"], 64), "beam capacity: higher recall, slower"),
            parameter(
                "recall",
                {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
                "in place of ef: the one that was tuned for this recall and k",
            ),
            parameter(
                "rerank",
                {
                    "oneOf": [
                        {"type": "integer", "minimum": 1, "maximum": limits["ef"]},
                        {"enum": ["auto", "all"]},
                    ],
                    "default": "auto",
                },
                "nearest of the beam that refine rows compare; auto: of int4 the largest "
                "of 2 k, 20 and ef / 4, else all",
            ),
            parameter("allow", {"type": "string"}, "name of a registered filter"),
            parameter(
                "X-Timeout-Ms",
                {"type": "integer", "minimum": 1, "maximum": 3_600_000},
                "answer within this time, or 504",
                "header",
            ),
            parameter(
                "X-Call-Id",
                {"type": "string", "pattern": "^[A-Za-z0-9_.-]{1,64}$"},
                "repeated in the answer, of any call",
                "header",
            ),
        ],
        "requestBody": {"required": True, "content": asked},
        "responses": {
            "200": {
                "description": "labels and distances",
                "headers": {
                    name: {"schema": {"type": "string"}, "description": what}
                    for name, what in (
                        ("X-Index-Version", "counts the indexes that this server has served"),
                        ("X-Index-Checksum", "of the index that answered"),
                    )
                },
                "content": {
                    JSON: {"schema": _ref("Result")},
                    NPY: {"schema": binary},
                    SAFETENSORS: {"schema": binary},
                },
            },
            **_problems(400, 406, 408, 413, 415, 422, 429, 503, 504),
        },
    }


def _swap() -> dict[str, Any]:
    return {
        "summary": "Serve another saved index from now on",
        "description": "Loads and warms it beside the old one, then swaps between batches; "
        "searches that arrived earlier are answered by the old one.",
        "parameters": [
            {
                "name": "force",
                "in": "query",
                "schema": {"type": "boolean", "default": False},
                "description": "serve it even if its dim, metric or kind of labels is another",
            }
        ],
        "requestBody": {"required": True, "content": {JSON: {"schema": _ref("Swap")}}},
        "responses": {
            **_get("The new index", _ref("Index"))["responses"],
            **_problems(400, 403, 404, 408, 409, 413, 415, 422, 429, 503, 507),
        },
    }


def _get(summary: str, schema: dict[str, Any], *problems: int) -> dict[str, Any]:
    answer = {"description": summary, "content": {JSON: {"schema": schema}}}
    return {"summary": summary, "responses": {"200": answer, **_problems(*problems)}}


def _text(summary: str, media: str) -> dict[str, Any]:
    answer = {"description": summary, "content": {media: {"schema": {"type": "string"}}}}
    return {"summary": summary, "responses": {"200": answer}}


def _problems(*codes: int) -> dict[str, Any]:
    return {str(code): _problem(code) for code in codes}


def _problem(code: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        "description": TITLES[code],
        "content": {PROBLEM: {"schema": _ref("Problem")}},
    }
    if code in (429, 503):
        found["headers"] = {"Retry-After": {"schema": {"type": "integer"}, "description": "s"}}
    return found


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(required: list[str], **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "required": required,
        "properties": properties,
        "additionalProperties": False,
    }


_TEXT, _WHOLE = {"type": "string"}, {"type": "integer"}
_LABELS = {
    "type": "array",
    "items": {"oneOf": [{"type": "integer", "minimum": 0}, {"type": "string", "minLength": 1}]},
}
_VECTOR = {"type": "array", "items": {"type": "number"}}
SCHEMAS: dict[str, Any] = {
    "Asked": {
        **_object(
            [],
            queries={
                "description": "(q, dim), or one vector (dim)",
                "anyOf": [{"type": "array", "items": _VECTOR}, _VECTOR],
            },
            labels={**_LABELS, "description": "search for the stored vectors of these labels"},
            allow={**_LABELS, "description": "labels that may be returned"},
        ),
        "oneOf": [{"required": ["queries"]}, {"required": ["labels"]}],
    },
    "Result": _object(
        ["labels", "distances"],
        labels={
            "type": "array",
            "items": {"type": "array", "items": {"type": ["integer", "string"]}},
        },
        distances={
            "type": "array",
            "items": {"type": "array", "items": {"type": ["number", "null"]}},
        },
    ),
    "Swap": _object(["path"], path={**_TEXT, "description": "of an index, relative to the root"}),
    "State": _object(["state"], state={"enum": ["live", "ready"]}),
    "Index": _object(
        ["n", "dim", "metric", "dtype", "parameters", "checksum", "version", "path", "filters"],
        n=_WHOLE,
        dim=_WHOLE,
        metric=_TEXT,
        dtype=_TEXT,
        device=_TEXT,
        labels={"enum": ["integers", "strings"]},
        parameters={"type": "object", "additionalProperties": True},
        checksum=_TEXT,
        version=_WHOLE,
        path=_TEXT,
        filters={"type": "array", "items": _TEXT},
        limits={"type": "object", "additionalProperties": _WHOLE},
        formats={"type": "array", "items": {"enum": list(FORMATS)}},
        seconds={"type": "number", "description": "that loading and warming took"},
    ),
    "Problem": {
        "description": "RFC 9457",
        "type": "object",
        "required": ["type", "title", "status", "detail"],
        "properties": {
            "type": {"const": "about:blank"},
            "title": _TEXT,
            "status": _WHOLE,
            "detail": _TEXT,
        },
    },
}

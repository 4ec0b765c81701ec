"""Google Cloud Storage on this machine: as much of its JSON API as gcsfs, tensorstore and Google's own client use.

Objects live in memory. As in the real service they appear whole, cannot be appended to, and directories are nothing but
common prefixes. Source: the JSON API reference, cloud.google.com/storage/docs/json_api.
"""

import base64
import contextlib
import hashlib
import json
import re
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import google_crc32c

BUCKET = "bucket"
TIME = "2026-01-01T00:00:00.000Z"
PAGE = 1000  # the longest page of a listing
OBJECT = re.compile(r"/(?:download/)?storage/v1/b/([^/]+)/o/([^/]+)$")
COPY = re.compile(r"/storage/v1/b/[^/]+/o/([^/]+)/(rewriteTo/b/[^/]+|moveTo)/o/([^/]+)$")
UPLOAD = re.compile(r"/upload/storage/v1/b/([^/]+)/o$")
LIST = re.compile(r"/storage/v1/b/([^/]+)/o/?$")
THE_BUCKET = re.compile(r"/storage/v1/b/([^/]+)$")


@dataclass
class Store:
    """The objects of the one bucket.

    Attributes:
        url: of the server.
        objects: content and generation by name.
        uploads: names of uploads in pieces, and what has come of them.
    """

    url: str = ""
    objects: dict[str, tuple[bytes, int]] = field(default_factory=dict)
    uploads: dict[str, tuple[str, bytearray]] = field(default_factory=dict)
    generation: int = 0
    lock: threading.RLock = field(default_factory=threading.RLock)

    def environment(self) -> dict[str, str]:
        """Return the variables with which all three clients come here, and look for neither credentials nor Google."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
            "FSSPEC_GCS_TOKEN": "anon",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "NO_GCE_CHECK": "true",
        }

    def names(self, prefix: str = "") -> list[str]:
        """Return the names that begin so, in order."""
        with self.lock:
            return sorted(name for name in self.objects if name.startswith(prefix))

    def put(self, name: str, content: bytes) -> dict:
        """Store an object; return its description."""
        with self.lock:
            self.generation += 1
            self.objects[name] = (content, self.generation)
            return self.describe(name)

    def describe(self, name: str) -> dict:
        """Return the resource of an object."""
        content, generation = self.objects[name]
        return {
            "kind": "storage#object",
            "id": f"{BUCKET}/{name}/{generation}",
            "name": name,
            "bucket": BUCKET,
            "generation": str(generation),
            "metageneration": "1",
            "size": str(len(content)),
            "contentType": "application/octet-stream",
            "storageClass": "STANDARD",
            "timeCreated": TIME,
            "updated": TIME,
            "md5Hash": base64.b64encode(hashlib.md5(content).digest()).decode(),
            "crc32c": base64.b64encode(google_crc32c.Checksum(content).digest()).decode(),
        }

    def listing(self, query: dict[str, str]) -> dict:
        """Return a page of names, and of common prefixes up to the delimiter."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        size = min(int(query.get("maxResults", PAGE)), PAGE)
        found: dict[str, bool] = {}
        for name in self.names(prefix):
            cut = name.find(delimiter, len(prefix)) if delimiter else -1
            entry, is_prefix = (name, False) if cut < 0 else (name[: cut + len(delimiter)], True)
            if is_prefix and entry == name and query.get("includeTrailingDelimiter") == "true":
                found[entry + "\0"] = False
            found[entry] = found.get(entry, False) or is_prefix
        begin = query.get("pageToken", query.get("startOffset", ""))
        entries = [entry for entry in sorted(found) if entry >= begin and entry < query.get("endOffset", "\U0010ffff")]
        page, rest = entries[:size], entries[size:]
        answer = {
            "kind": "storage#objects",
            "items": [self.describe(entry.rstrip("\0")) for entry in page if not found[entry]],
            "prefixes": [entry for entry in page if found[entry]],
        }
        return {**answer, "nextPageToken": rest[0]} if rest else answer


class Handler(BaseHTTPRequestHandler):
    """Answers one request; `store` is set by `serve`."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    store: Store

    def do_GET(self) -> None:
        """Describe the bucket, list it, describe an object, or give its content."""
        path, query = self.request_target()
        if match := OBJECT.match(path):
            self.get_object(unquote(match[2]), query)
        elif LIST.match(path):
            with self.store.lock:
                self.answer(200, self.store.listing(query))
        elif THE_BUCKET.match(path):
            self.answer(200, {"kind": "storage#bucket", "name": BUCKET, "hierarchicalNamespace": {"enabled": False}})
        else:
            self.missing()

    def do_POST(self) -> None:
        """Take a whole object or a piece of one, begin an upload in pieces, copy or move."""
        path, query = self.request_target()
        if "upload_id" in query:
            return self.do_PUT()
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        store = self.store
        if match := COPY.match(path):
            with store.lock:
                source, target, move = unquote(match[1]), unquote(match[3]), match[2] == "moveTo"
                if source not in store.objects:
                    return self.missing()
                resource = store.put(target, store.objects[source][0])
                if move:
                    del store.objects[source]
            done = {"kind": "storage#rewriteResponse", "done": True, "resource": resource}
            return self.answer(200, resource if move else done)
        if not UPLOAD.match(path):
            return self.missing()
        kind, name = query.get("uploadType"), query.get("name")
        if kind == "resumable":
            name = name or json.loads(body)["name"]
            key = f"upload-{len(store.uploads)}"
            store.uploads[key] = (name, bytearray())
            location = f"{store.url}/upload/storage/v1/b/{BUCKET}/o?uploadType=resumable&upload_id={key}"
            return self.answer(200, {}, Location=location)
        if kind == "multipart":
            header, body = _parts(body, self.headers["Content-Type"])
            name = name or header["name"]
        with store.lock:
            wanted = query.get("ifGenerationMatch")
            if wanted is not None and int(wanted) != store.objects.get(name, (b"", 0))[1]:
                return self.answer(412, _error(412))
            return self.answer(200, store.put(name, body))

    def do_PUT(self) -> None:
        """Take a piece of an upload; with the last one the object appears."""
        _, query = self.request_target()
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        name, content = self.store.uploads[query["upload_id"]]
        content += body
        if self.headers["Content-Range"].endswith("/*"):
            return self.answer(308, {}, Range=f"bytes=0-{len(content) - 1}")
        return self.answer(200, self.store.put(name, bytes(content)))

    def do_DELETE(self) -> None:
        """Remove an object."""
        path, _ = self.request_target()
        with self.store.lock:
            if self.store.objects.pop(unquote(OBJECT.match(path)[2]), None) is None:
                return self.missing()
        return self.answer(204, None)

    def get_object(self, name: str, query: dict[str, str]) -> None:
        """Give an object's description or, with alt=media, its bytes or some of them."""
        with self.store.lock:
            if name not in self.store.objects:
                return self.missing()
            (content, generation), resource = self.store.objects[name], self.store.describe(name)
        if query.get("ifGenerationNotMatch") == str(generation):
            return self.answer(304, None)
        if query.get("ifGenerationMatch", str(generation)) != str(generation):
            return self.answer(412, _error(412))
        if query.get("alt") != "media":
            return self.answer(200, resource)
        headers = {"x-goog-generation": str(generation), "x-goog-hash": f"crc32c={resource['crc32c']}"}
        wanted = re.match(r"bytes=(\d*)-(\d*)$", self.headers.get("Range", ""))
        if wanted is None:
            return self.answer(200, content, **headers)
        if not wanted[1]:
            begin, end = max(len(content) - int(wanted[2]), 0), len(content)
        else:
            begin, end = int(wanted[1]), min(int(wanted[2] or len(content)) + 1, len(content))
        if begin >= len(content):
            return self.answer(416, _error(416))
        span = f"bytes {begin}-{end - 1}/{len(content)}"
        return self.answer(206, content[begin:end], **{"Content-Range": span, **headers})

    def request_target(self) -> tuple[str, dict[str, str]]:
        """Return the path, still quoted, and the query."""
        target = urlsplit(self.path)
        return target.path, {name: values[0] for name, values in parse_qs(target.query).items()}

    def answer(self, status: int, body: dict | bytes | None, **headers: str) -> None:
        """Send an answer."""
        content = json.dumps(body).encode() if isinstance(body, dict) else body or b""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        kind = "application/json" if isinstance(body, dict) else "application/octet-stream"
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def missing(self) -> None:
        """Say that there is no such thing."""
        self.answer(404, _error(404))

    def log_message(self, *arguments) -> None:
        """Say nothing of a request."""


class Server(ThreadingHTTPServer):
    """A thread for every connection."""

    daemon_threads = True

    def handle_error(self, request, client_address) -> None:
        """Let a client hang up, or be killed, in the middle of an answer."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def _parts(body: bytes, content_type: str) -> tuple[dict, bytes]:
    """Return the description and the content of a multipart upload."""
    mark = b"--" + re.search(r'boundary="?([^";]+)"?', content_type)[1].encode()
    _, header, content, _ = body.split(mark, 3)
    (_, header), (_, content) = (re.split(rb"\r?\n\r?\n", part, maxsplit=1) for part in (header, content))
    return json.loads(header), re.sub(rb"\r?\n$", b"", content)


def _error(code: int) -> dict:
    return {"error": {"code": code, "message": f"error {code}", "errors": [{"reason": f"error {code}"}]}}


@contextlib.contextmanager
def serve() -> Iterator[Store]:
    """Serve an empty bucket while the block runs."""
    store = Store()
    server = Server(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"store": store}))
    store.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield store
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

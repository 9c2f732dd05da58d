"""A Google Cloud Storage without a cloud: what gcsfs asks of it, over HTTP."""

import contextlib
import http.server
import json
import re
import threading
import time
import urllib.parse
from collections.abc import Iterator

__all__ = ["serving"]


class _Server(http.server.ThreadingHTTPServer):
    """Objects by bucket and name: content, and time of the last change."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, tuple[bytes, float]] = {}
        self.uploads: dict[str, bytes] = {}  # in several parts, by name
        self.lock = threading.Lock()

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that asks in two ways at once goes with the first answer


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *_: object) -> None:  # noqa: A002
        pass

    def _answer(self, code: int, content: object, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _asked(self) -> tuple[str, str, dict[str, str]]:
        """The bucket, the object's name, and the query."""
        parts = urllib.parse.urlsplit(self.path)
        match = re.search(r"/b/([^/]+)(?:/o(?:/([^/]+))?)?", parts.path)
        assert match is not None, self.path
        name = urllib.parse.unquote(match[2] or "")
        return match[1], name, dict(urllib.parse.parse_qsl(parts.query))

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _describe(self, key: str) -> dict[str, str]:
        bucket, _, name = key.partition("/")
        content, then = self.server.objects[key]
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(then))
        stamp += f".{int(then % 1 * 1e6):06}Z"
        about = {"kind": "storage#object", "bucket": bucket, "name": name}
        size = str(len(content))
        return {**about, "size": size, "updated": stamp, "timeCreated": stamp}

    def do_GET(self) -> None:
        bucket, name, query = self._asked()
        with self.server.lock:
            if not name:
                return self._answer(200, self._list(bucket, query))
            key = f"{bucket}/{name}"
            if key not in self.server.objects:
                return self._answer(404, {})
            content = self.server.objects[key][0]
            is_media = query.get("alt") == "media"
            return self._answer(200, content if is_media else self._describe(key))

    def _list(self, bucket: str, query: dict[str, str]) -> dict[str, object]:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        items, prefixes = [], set()
        for key in sorted(self.server.objects):
            where, _, name = key.partition("/")
            if where == bucket and name.startswith(prefix):
                head, found, _ = name[len(prefix) :].partition(delimiter or "\n")
                if found:
                    prefixes.add(f"{prefix}{head}{delimiter}")
                else:
                    items.append(self._describe(key))
        return {"items": items, "prefixes": sorted(prefixes)}

    def do_POST(self) -> None:
        bucket, name, query = self._asked()
        body = self._body()
        with self.server.lock:
            if copy := re.search(r"/rewriteTo/b/([^/]+)/o/([^/?]+)", self.path):
                content, key = self.server.objects[f"{bucket}/{name}"][0], copy[1]
                key += "/" + urllib.parse.unquote(copy[2])
            elif query["uploadType"] == "resumable":
                return self._upload(f"{bucket}/{query['name']}", query, body)
            else:
                assert query["uploadType"] == "multipart"
                _, head, rest = body.split(b"\n\n", 2)
                about = json.loads(head.partition(b"\n--==0==")[0])
                key = f"{bucket}/{about['name']}"
                content = rest.removesuffix(b"\n--==0==--")
                if query.get("ifGenerationMatch") == "0" and key in self.server.objects:
                    return self._answer(412, {"error": "conditionNotMet"})
            self.server.objects[key] = content, time.time()
            return self._answer(200, {**self._describe(key), "done": True})

    def _upload(self, key: str, query: dict[str, str], body: bytes) -> None:
        """Begins an upload, or takes a part of one; the last makes the object."""
        server = self.server
        if "id" not in query:
            server.uploads[key] = b""
            host = f"http://127.0.0.1:{server.server_port}"
            return self._answer(200, {}, Location=f"{host}{self.path}&id=1")
        server.uploads[key] += body
        size = self.headers["Content-Range"].rpartition("/")[2]
        if size != str(len(server.uploads[key])):
            return self._answer(308, {})
        server.objects[key] = server.uploads.pop(key), time.time()
        return self._answer(200, self._describe(key))

    def do_DELETE(self) -> None:
        bucket, name, _ = self._asked()
        with self.server.lock:
            was = self.server.objects.pop(f"{bucket}/{name}", None)
        self._answer(404 if was is None else 204, b"")


@contextlib.contextmanager
def serving() -> Iterator[_Server]:
    """Runs a server, whose buckets are all there; `server_port` is its port."""
    with _Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()

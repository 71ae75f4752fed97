"""A server of what gcsfs and array_record ask of Google Cloud Storage; its objects are in memory.

    python fake_gcs.py FOLDER    prints its address, and serves until its standard input ends

The folder's files are the objects of gs://bucket. In the end those that were written lie there too.
Every fortieth request fails with 503, as a busy service's may: the libraries have to ask again.
"""

import base64
import hashlib
import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

OBJECTS: dict[tuple[str, str], bytes] = {}
COUNT = {"requests": 0, "failed": 0}
LOCK = threading.Lock()


class Server(ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        self.handle_one("GET")

    def do_POST(self) -> None:
        self.handle_one("POST")

    def do_PUT(self) -> None:
        self.handle_one("PUT")

    def do_DELETE(self) -> None:
        self.handle_one("DELETE")

    def handle_one(self, method: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        with LOCK:
            COUNT["requests"] += 1
            fails = COUNT["requests"] % 40 == 0
            COUNT["failed"] += fails
        if fails:
            return self.answer({"error": {"code": 503, "message": "busy"}}, 503)
        for (wanted, pattern), reply in ROUTES.items():
            found = re.fullmatch(pattern, url.path)
            if wanted == method and found:
                return reply(self, query, body, *map(unquote, found.groups()))
        self.answer({"error": {"code": 404, "message": f"no such thing: {self.path}"}}, 404)

    def answer(self, content: dict | bytes, status: int = 200, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def missing(self, name: str) -> None:
        self.answer({"error": {"code": 404, "message": f"No such object: {name}"}}, 404)


def about(bucket: str, name: str) -> dict:
    data = OBJECTS[bucket, name]
    return {
        "kind": "storage#object",
        "id": f"{bucket}/{name}/1",
        "bucket": bucket,
        "name": name,
        "size": str(len(data)),
        "generation": str(int(hashlib.md5(data).hexdigest()[:12], 16)),
        "metageneration": "1",
        "storageClass": "STANDARD",
        "md5Hash": base64.b64encode(hashlib.md5(data).digest()).decode(),
        "timeCreated": "2026-01-01T00:00:00Z",
        "updated": "2026-01-01T00:00:00Z",
    }


def read(server: Handler, query: dict, body: bytes, bucket: str, name: str) -> None:
    if (bucket, name) not in OBJECTS:
        return server.missing(name)
    if query.get("alt") != "media":
        return server.answer(about(bucket, name))
    data = OBJECTS[bucket, name]
    if asked := re.fullmatch(r"bytes=(\d*)-(\d*)", server.headers.get("Range", "")):
        first, last = asked.groups()
        start = int(first) if first else max(len(data) - int(last), 0)
        end = min(int(last) + 1 if first and last else len(data), len(data))
        if start >= len(data):
            return server.answer(b"", 416)
        part = f"bytes {start}-{end - 1}/{len(data)}"
        return server.answer(data[start:end], 206, Content_Range=part)
    server.answer(data)


def find(server: Handler, query: dict, body: bytes, bucket: str) -> None:
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
    items, folders = [], set()
    for place, name in sorted(OBJECTS):
        if place == bucket and name.startswith(prefix):
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                folders.add(prefix + rest.split(delimiter)[0] + delimiter)
            else:
                items.append(about(bucket, name))
    server.answer({"kind": "storage#objects", "items": items, "prefixes": sorted(folders)})


def write(server: Handler, query: dict, body: bytes, bucket: str) -> None:
    if query["uploadType"] == "media":
        OBJECTS[bucket, query["name"]] = body
        return server.answer(about(bucket, query["name"]))
    if query["uploadType"] == "resumable":
        name = query.get("name") or json.loads(body)["name"]
        place = f"http://{server.headers['Host']}/upload/session/{bucket}/{name}"
        return server.answer({}, Location=place)
    border = re.search(r"boundary=\"?([^\";]+)", server.headers["Content-Type"])[1].encode()
    _, described, data, _ = body.split(b"--" + border)
    name = json.loads(described.split(b"\n\n" if b"\r\n" not in described else b"\r\n\r\n", 1)[1])
    head, data = re.split(rb"\r?\n\r?\n", data, maxsplit=1)
    OBJECTS[bucket, name["name"]] = re.sub(rb"\r?\n\Z", b"", data)
    server.answer(about(bucket, name["name"]))


def go_on(server: Handler, query: dict, body: bytes, bucket: str, name: str) -> None:
    first, last, total = re.fullmatch(
        r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", server.headers["Content-Range"]
    ).groups()
    before = OBJECTS.get((bucket, name + ".part"), b"")
    before = before[: int(first)] + body if first else before
    OBJECTS[bucket, name + ".part"] = before
    if total == str(len(before)):
        OBJECTS[bucket, name] = OBJECTS.pop((bucket, name + ".part"))
        return server.answer(about(bucket, name))
    server.answer(b"", 308, Range=f"bytes=0-{len(before) - 1}")


def copy(server: Handler, query: dict, body: bytes, *names: str) -> None:
    if names[:2] not in OBJECTS:
        return server.missing(names[1])
    OBJECTS[names[2:]] = OBJECTS[names[:2]]
    server.answer({"kind": "storage#rewriteResponse", "done": True, "resource": about(*names[2:])})


def delete(server: Handler, query: dict, body: bytes, bucket: str, name: str) -> None:
    if OBJECTS.pop((bucket, name), None) is None:
        return server.missing(name)
    server.answer(b"", 204)


def batch(server: Handler, query: dict, body: bytes) -> None:
    """Many deletions in one request."""
    parts = []
    for found in re.finditer(rb"DELETE [^ ]*/storage/v1/b/([^/]+)/o/([^? ]+)", body):
        gone = OBJECTS.pop(tuple(unquote(part.decode()) for part in found.groups()), None)
        status = "204 No Content" if gone is not None else "404 Not Found"
        parts.append(f"--X\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 {status}\r\n\r\n\r\n")
    server.answer("".join([*parts, "--X--"]).encode(), Content_Type="multipart/mixed; boundary=X")


def bucket_of(server: Handler, query: dict, body: bytes, bucket: str) -> None:
    server.answer({"kind": "storage#bucket", "id": bucket, "name": bucket, "location": "US"})


_OBJECT = r"(?:/download)?/storage/v1/b/([^/]+)/o/(.+)"
ROUTES = {
    ("GET", r"/storage/v1/b/([^/]+)/o/?"): find,
    ("GET", _OBJECT): read,
    ("GET", r"/storage/v1/b/([^/]+)"): bucket_of,
    ("POST", r"/storage/v1/b/([^/]+)/o/(.+)/(?:rewriteTo|copyTo)/b/([^/]+)/o/(.+)"): copy,
    ("POST", r"/upload/storage/v1/b/([^/]+)/o"): write,
    ("PUT", r"/upload/session/([^/]+)/(.+)"): go_on,
    ("POST", r"/upload/session/([^/]+)/(.+)"): go_on,
    ("POST", r"/batch/storage/v1"): batch,
    ("DELETE", _OBJECT): delete,
}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for path in folder.rglob("*"):
        if path.is_file():
            OBJECTS["bucket", path.relative_to(folder).as_posix()] = path.read_bytes()
    made = Server(("127.0.0.1", 0), Handler)
    print(f"http://127.0.0.1:{made.server_port}", flush=True)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    sys.stdin.read()
    for (_, name), data in OBJECTS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    print(json.dumps(COUNT), flush=True)

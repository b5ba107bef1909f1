"""Who may ask the page of `mimo demo --web` for what: browsers of this machine, from the page itself, for their files.

Gradio finds a user by a name that the client makes up, and takes any path of its upload folder from everybody. Here a
browser gets a cookie that nobody guesses; uploads and sessions belong to the cookie that came with them.
"""

import json
import os
import re
import secrets
from collections import Counter
from urllib.parse import parse_qs, unquote, urlsplit

from starlette.responses import JSONResponse


# bytes of one upload, of all uploads of one browser, and of all browsers
MAX_UPLOAD = 2**30
MAX_UPLOADS = 2 * 2**30
MAX_TOTAL = 8 * 2**30
# files of one browser
MAX_FILES = 100
# bytes of a request that is no upload
MAX_BODY = 2**22

API = "/gradio_api/"
# what the page and gradio's client use; the rest of gradio's routes fetch URLs, start programs or look inside
ROUTES = {
    "GET": re.compile(
        r"/(config/?|theme\.css|favicon\.ico|manifest\.json|robots\.txt|(static|assets|svelte)/.+"
        r"|gradio_api/(info/?|app_id/?|startup-events|heartbeat/[^/]+|queue/data|upload_progress|file=.+))?"
    ),
    "POST": re.compile(r"/gradio_api/(queue/join|run/[^/]+/?|upload|cancel|reset/?)"),
}
ROUTES["HEAD"] = ROUTES["GET"]


class Refused(Exception):
    """status: of HTTP."""

    def __init__(self, status: int, text: str):
        super().__init__(text)
        self.status = status


class Doors:
    """ASGI middleware in front of gradio.

    Attributes:
        owners: path of an uploaded file -> whose it is; "" stands for a client without cookie, whose file becomes that
            of the first session that asks about it.
        sessions: gradio's name of a session -> whose it is.
        arriving: owner -> bytes of uploads on their way.
    """

    def __init__(self, app):
        self.app = app
        self.owners: dict[str, set[str]] = {}
        self.sessions: dict[str, str] = {}
        self.arriving: Counter[str] = Counter()

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        try:
            if scope["type"] != "http":
                raise Refused(403, f"expected HTTP, got {scope['type']}")
            await self._answer(scope, receive, send)
        except Refused as error:
            await JSONResponse({"detail": str(error), "error": str(error)}, error.status)(scope, receive, send)

    async def _answer(self, scope, receive, send) -> None:
        headers = {name.decode().lower(): value.decode("latin-1") for name, value in scope["headers"]}
        path, method = scope["path"], scope["method"]
        if method not in ROUTES or not ROUTES[method].fullmatch(path):
            raise Refused(404, f"{method} {path[:80]!r}: expected a request that the page makes")
        check_origin(headers, is_page=method == "GET" and path == "/")
        # browsers share cookies between the ports of a machine
        cookie = f"mimo_{scope['server'][1]}"
        found = re.search(rf"(?:^|; ?){cookie}=([\w-]{{32}})(?:;|$)", headers.get("cookie", ""), re.ASCII)
        owner = found[1] if found else ""
        if not found and path in ("/", "/config"):
            send = with_cookie(send, f"{cookie}={secrets.token_urlsafe(24)}")
        if path == f"{API}upload":
            await self._upload(scope, receive, send, owner, headers)
            return
        if path.startswith(f"{API}file="):
            self._check_read(path.removeprefix(f"{API}file="), owner)
        for session in sessions_of(scope):
            self._check_session(session, owner)
        if method == "POST":
            receive = await self._checked_body(receive, owner)
        await self.app(scope, receive, send)

    def _check_session(self, session: str, owner: str) -> str:
        """Whose files the session may use. Refused: it is somebody else's."""
        owner = owner or f"session {session}"
        if self.sessions.setdefault(session, owner) != owner:
            raise Refused(403, "session_hash: expected a session of this browser, got one of another")
        return owner

    def _check_read(self, path: str, owner: str) -> None:
        """Refused: an upload of somebody else, or what is no path. Gradio checks whether it lies in its folders."""
        if not os.path.isabs(path) or os.path.normpath(path) != path:
            raise Refused(403, f"{path[:80]!r}: expected the plain path of a file of the page")
        if path in self.owners and owner not in self.owners[path]:
            raise Refused(403, f"{os.path.basename(path)!r}: expected a file that this browser uploaded")

    def _check_use(self, path: str, owner: str) -> None:
        owners = self.owners.get(path, set())
        if owner not in owners and "" in owners:
            owners.remove("")
            owners.add(owner)
        if owner not in owners:
            name = os.path.basename(path)[:80]
            raise Refused(403, f"{name!r}: expected a file that this session uploaded, got another path")

    async def _checked_body(self, receive, owner: str):
        """`receive` again, after the JSON in it was checked."""
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Refused(400, "body: expected all of it, got a part")
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > MAX_BODY:
                raise Refused(413, f"body: expected at most {MAX_BODY} bytes, got more")
        try:
            content = json.loads(body)
            session = content.get("session_hash")
        except (ValueError, RecursionError, AttributeError):
            raise Refused(400, "body: expected a JSON object, got something else") from None
        if session is not None:
            owner = self._check_session(str(session), owner)
        for path in paths_in(content):
            self._check_use(path, owner)

        sent = False

        async def again():
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        return again

    async def _upload(self, scope, receive, send, owner: str, headers: dict[str, str]) -> None:
        length = headers.get("content-length", "")
        if not length.isdecimal():
            raise Refused(411, "upload: expected its length, got none")
        length = int(length)
        if length > MAX_UPLOAD:
            raise Refused(413, f"upload: expected at most {MAX_UPLOAD} bytes, got {length}")
        mine = [path for path, owners in self.owners.items() if owner in owners and os.path.exists(path)]
        if len(mine) >= MAX_FILES:
            raise Refused(413, f"upload: expected at most {MAX_FILES} files of a browser, got more")
        for limit, paths, arriving in (
            (MAX_UPLOADS, mine, self.arriving[owner]),
            (MAX_TOTAL, [path for path in self.owners if os.path.exists(path)], self.arriving.total()),
        ):
            held = sum(map(os.path.getsize, paths)) + arriving
            if held + length > limit:
                whose = "of a browser" if paths is mine else "of all browsers"
                raise Refused(413, f"upload: expected at most {limit} bytes {whose}, got {held + length}")
        answer = bytearray()
        status = 0

        async def noted(message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif status == 200:
                answer.extend(message.get("body", b""))
                if not message.get("more_body", False):
                    for path in json.loads(answer):
                        self.owners.setdefault(path, set()).add(owner)
            await send(message)

        self.arriving[owner] += length
        try:
            await self.app(scope, receive, noted)
        finally:
            self.arriving[owner] -= length


def check_origin(headers: dict[str, str], is_page: bool) -> None:
    """Refused: another page asks, as the browser says; a link to `is_page` may stand anywhere."""
    origin = headers.get("origin")
    if origin is not None and (urlsplit(origin).scheme, urlsplit(origin).netloc) != ("http", headers.get("host")):
        raise Refused(403, f"Origin: expected http://{headers.get('host')}, got {origin[:80]!r}")
    if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and not is_page:
        raise Refused(403, "Sec-Fetch-Site: expected same-origin, got a request of another page")


def with_cookie(send, cookie: str):
    """`send` that sets it; scripts cannot read it, and other sites' requests come without it."""

    async def send_with_cookie(message) -> None:
        if message["type"] == "http.response.start":
            value = f"{cookie}; Path=/; HttpOnly; SameSite=Strict".encode()
            message = {**message, "headers": [*message.get("headers", ()), (b"set-cookie", value)]}
        await send(message)

    return send_with_cookie


def sessions_of(scope) -> list[str]:
    """Those that the address of a request names."""
    named = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("session_hash", [])
    if scope["path"].startswith(f"{API}heartbeat/"):
        named = [*named, unquote(scope["path"].rpartition("/")[2])]
    return named


def paths_in(content) -> list[str]:
    """Of everything in a JSON value that names a file as gradio does, wherever it stands."""
    found, waiting = [], [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            meta = value.get("meta")
            if "path" in value or (isinstance(meta, dict) and "_type" in meta):
                found.append(str(value.get("path")))
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return found

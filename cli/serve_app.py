"""The application behind `mimo serve`: Transformers' server with one MiMo-V2 model that is already loaded."""

import asyncio
import secrets
import time

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server

from .serve_chat import CLIENT_GONE, MiMoV2ChatHandler
from .serve_generation import OneModelState
from .serve_requests import MediaPolicy


CHAT = "/v1/chat/completions"
# endpoints of Transformers' server that are kept; the others load models by name or read answers in other formats
SERVED = (CHAT, "/v1/completions", "/v1/models", "/health")


class ServedModel(ModelManager):
    """One loaded model under a name, which is the only one there is."""

    def __init__(self, name: str, model, processor):
        super().__init__(model_timeout=-1)
        self.force_model = name
        self.model, self.processor = model, processor
        self.created = int(time.time())

    @staticmethod
    def process_model_name(model_id: str) -> str:
        # there are no revisions to tell apart
        return model_id

    def load_model_and_processor(self, model_id_and_revision: str, *args, **kwargs):
        return self.model, self.processor

    def list_models(self, cache_dir: str | None = None) -> list[dict]:
        return [{"id": self.force_model, "object": "model", "created": self.created, "owned_by": "modeling-mimo"}]

    # its name in Transformers 5.23
    get_gen_models = list_models


class WatchedClients:
    """ASGI middleware that sets CLIENT_GONE when a client leaves, whether anybody waits for its messages or not."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        gone, messages = asyncio.Event(), asyncio.Queue()

        async def watch() -> None:
            while not gone.is_set():
                message = await receive()
                if message["type"] == "http.disconnect":
                    gone.set()
                messages.put_nowait(message)

        async def received() -> dict:
            if gone.is_set() and messages.empty():
                return {"type": "http.disconnect"}
            return await messages.get()

        CLIENT_GONE.set(gone)
        watching = asyncio.create_task(watch())
        try:
            await self.app(scope, received, send)
        finally:
            watching.cancel()


def build_app(
    name: str,
    model,
    processor,
    policy: MediaPolicy,
    thinking: bool | None = None,
    use_mtp: bool = False,
    api_key: str | None = None,
) -> tuple[FastAPI, OneModelState]:
    """The application, and what runs its answers, whose `shutdown` belongs behind the server's.

    name: of the model in requests. thinking, policy: see MiMoV2ChatHandler. api_key: what clients must send.
    """
    served, state = ServedModel(name, model, processor), OneModelState()
    app = build_server(
        served,
        MiMoV2ChatHandler(served, state, policy, thinking, use_mtp),
        completion_handler=CompletionHandler(served, state),
        response_handler=None,
        transcription_handler=None,
        systemone_handler=None,
        generation_state=state,
    )
    app.router.routes[:] = [route for route in app.router.routes if route.path in SERVED]
    report_errors_as_openai(app)
    if api_key is not None:
        require_key(app, api_key)
    app.add_middleware(WatchedClients)
    return app, state


def error_response(status: int, message: str) -> JSONResponse:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    error = {"message": message, "type": kind, "param": None, "code": None}
    return JSONResponse({"error": error}, status_code=status)


def report_errors_as_openai(app: FastAPI) -> None:
    """Every error is `{"error": {"message": one line, ...}}`; what is wrong with a request has status 400."""

    @app.exception_handler(StarletteHTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == 404:
            return error_response(404, f"{request.url.path}: expected one of {', '.join(SERVED)}")
        return error_response(400 if error.status_code == 422 else error.status_code, error.detail)

    @app.exception_handler(RequestValidationError)
    async def unreadable(request: Request, error: RequestValidationError) -> JSONResponse:
        return error_response(400, f"body: expected a JSON object, got {error.errors()[0]['msg']}")

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return error_response(500, f"{type(error).__name__}: {' '.join(str(error).split())}")


def require_key(app: FastAPI, api_key: str) -> None:
    """Requests without `Authorization: Bearer KEY` get status 401, except for /health."""
    expected = f"Bearer {api_key}".encode()

    @app.middleware("http")
    async def check(request: Request, call_next):
        given = request.headers.get("authorization", "").encode()
        if request.url.path != "/health" and not secrets.compare_digest(given, expected):
            return error_response(401, "authorization: expected the API key of this server, got none or another one")
        return await call_next(request)

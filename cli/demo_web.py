"""`mimo demo --web`: a page to chat on, on this machine alone."""

import os
import signal
import socket
import tempfile
from argparse import Namespace
from contextlib import suppress

from .demo import model_name
from .loading import load
from .serve import SHUTDOWN_TIMEOUT, listener


# tokens; an answer of a small model that finds no end is cut off here
MAX_NEW_TOKENS = 512
# the page may load nothing from elsewhere, whatever an answer contains
POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'self'"
LOCAL_NAMES = ["127.0.0.1", "localhost"]


def serve(args) -> int:
    """0 after Ctrl-C. Raises ValueError or OSError for a port or a checkpoint that cannot be had.

    args: of `mimo demo`: path, port, max_new_tokens, dtype, device_map, fp8_resident.
    """
    with listener(LOCAL_NAMES[0], args.port) as sock, tempfile.TemporaryDirectory(prefix="mimo-demo-") as uploads:
        # read by gradio; what is dropped on the page goes when the server does
        os.environ["GRADIO_TEMP_DIR"] = uploads
        model, processor = load(Namespace(**vars(args), towers=True))

        from .demo_web_app import build_app, shipped_examples

        name = model_name(args.path)
        limit = args.max_new_tokens or MAX_NEW_TOKENS
        app = build_app(model, processor, shipped_examples(model), name, limit)
        try:
            run(app, name, sock)
        finally:
            app.conversations.close()
    return 0


def run(app, name: str, sock: socket.socket) -> None:
    """Serves the page on `sock` until Ctrl-C or SIGTERM."""
    server = page_server(app)
    print(f"{name} is at http://{LOCAL_NAMES[0]}:{sock.getsockname()[1]}; Ctrl-C stops.", flush=True)
    # uvicorn ends with the signal that stopped it; SIGTERM's own handler would leave the uploads behind
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with suppress(KeyboardInterrupt):
        server.run(sockets=[sock])


def page_server(app):
    """A uvicorn server of the page that, told to stop, ends what keeps connections open."""
    import uvicorn
    from starlette.routing import Mount

    web = guarded(app)
    (page,) = [route.app for route in web.routes if isinstance(route, Mount)]

    class Server(uvicorn.Server):
        async def shutdown(self, *args, **kwargs) -> None:
            app.conversations.stop()
            # gradio's, for the stream that every open page listens to
            page.stop_event.set()
            await super().shutdown(*args, **kwargs)

    return Server(uvicorn.Config(web, log_level="warning", timeout_graceful_shutdown=SHUTDOWN_TIMEOUT))


class ContentPolicy:
    """ASGI middleware that sends POLICY with every response; streams pass through it as they are."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        async def send_with_policy(message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", ()), (b"content-security-policy", POLICY.encode())]
                message = {**message, "headers": headers}
            await send(message)

        await self.app(scope, receive, send_with_policy)


def guarded(app):
    """`app` in an ASGI application that answers browsers of this machine alone and lets its page load nothing else."""
    import gradio as gr
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from .demo_web_doors import MAX_UPLOAD, Doors
    from .demo_web_style import CSS, FONTS, MONO_FONTS

    web = FastAPI(openapi_url=None)
    web.add_middleware(Doors)
    web.add_middleware(TrustedHostMiddleware, allowed_hosts=LOCAL_NAMES)
    web.add_middleware(ContentPolicy)
    theme = gr.themes.Default(primary_hue="teal", neutral_hue="slate", font=FONTS, font_mono=MONO_FONTS)
    folders = sorted({os.path.dirname(path) for path in app.example_files})
    mounted = gr.mount_gradio_app(
        web,
        app,
        path="/",
        theme=theme,
        css=CSS,
        allowed_paths=folders,
        max_file_size=MAX_UPLOAD,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
    )
    # without it gradio checks no path of a question: it takes a mounted page for one that is still being built
    app.has_launched = True
    return mounted

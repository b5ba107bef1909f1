"""`mimo serve`: an OpenAI-compatible server for a checkpoint."""

import argparse
import os
import socket
from importlib.util import find_spec
from pathlib import Path

from .loading import add_arguments, check_path, load


EXAMPLE = """examples:
  mimo serve /models/MiMo-V2.5
  mimo serve /models/MiMo-V2.5 --mtp --no-thinking --port 9000
  MIMO_API_KEY=secret mimo serve /models/MiMo-V2.5 --host 0.0.0.0 --media-folder /data/media

Clients of OpenAI's chat API then use http://127.0.0.1:8000/v1. Images, sounds and videos come in the request as data
URLs, or from http(s) URLs. Answers are computed one after the other.
"""

PACKAGES = ("fastapi", "uvicorn", "openai", "pydantic")
# seconds for open connections to end when the server is stopped
SHUTDOWN_TIMEOUT = 5


def add_parser(subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "serve",
        help="serve a checkpoint with OpenAI's chat API",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on, 0 for a free one (default: 8000)")
    parser.add_argument("--name", help="what requests call the model (default: the last part of PATH)")
    key = "what clients must send as their key (default: $MIMO_API_KEY, else none is asked for)"
    parser.add_argument("--api-key", metavar="KEY", default=os.environ.get("MIMO_API_KEY"), help=key)
    parser.add_argument("--mtp", action="store_true", help="draft with the MTP heads of the checkpoint")
    thinking = "whether the model thinks where a request does not say (default: as the chat template does)"
    parser.add_argument("--thinking", action=argparse.BooleanOptionalAction, help=thinking)
    parser.add_argument("--no-downloads", dest="downloads", action="store_false", help="refuse media by http(s) URL")
    folder = "let clients name files in FOLDER by file:// URLs (default: no files of this machine)"
    parser.add_argument("--media-folder", metavar="FOLDER", type=Path, help=folder)
    return parser


def run(args) -> int:
    """0 after Ctrl-C. Raises ValueError or OSError for bad input before a model is loaded where that is possible."""
    missing = [package for package in PACKAGES if find_spec(package) is None]
    if missing:
        raise ValueError(
            f"serve: expected {', '.join(missing)} to be installed: pip install 'modeling-mimo[serving]'."
        )
    if args.media_folder is not None and not args.media_folder.is_dir():
        raise ValueError(f"`--media-folder`: expected a folder, got {args.media_folder}.")
    check_path(args.path)
    with listener(args.host, args.port) as sock:
        model, processor = load(args)
        if args.mtp and model.model.mtp is None:
            raise ValueError(f"`--mtp`: expected a checkpoint with MTP heads, got {args.path} without.")
        serve(args, model, processor, sock)
    return 0


def listener(host: str, port: int) -> socket.socket:
    """A bound socket, before minutes are spent on loading a model. ValueError: the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{host}:{port}: expected a free address to listen on, got: {reason}.") from None


def serve(args, model, processor, sock: socket.socket) -> None:
    """Answers until Ctrl-C or SIGTERM."""
    import uvicorn

    from .serve_app import CHAT, build_app
    from .serve_requests import MediaPolicy

    name = args.name or Path(args.path).resolve().name
    policy = MediaPolicy(args.downloads, args.media_folder)
    app, state = build_app(name, model, processor, policy, args.thinking, args.mtp, args.api_key)
    host, port = sock.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    print(f"{name} is served at {address}/v1; Ctrl-C stops. Try:")
    key = " -H 'Authorization: Bearer KEY'" if args.api_key is not None else ""
    request = f'{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    print(f"  curl {address}{CHAT} -H 'Content-Type: application/json'{key} -d '{request}'", flush=True)

    class Server(uvicorn.Server):
        def handle_exit(self, *signal):
            # connections are waited for, so the answers that they carry end first
            state.manager.cancel()
            super().handle_exit(*signal)

    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=SHUTDOWN_TIMEOUT)
    try:
        Server(config).run(sockets=[sock])
    except KeyboardInterrupt:
        # how it is meant to be stopped
        pass
    finally:
        state.shutdown()

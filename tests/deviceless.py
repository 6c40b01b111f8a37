"""JAX's CUDA plugin beside the CPU's jaxlib: programs compiled for no GPU.

The two wheels (130 MB), and NVIDIA's assembler where the machine has none, come
on first use into a folder of the system's temporary directory, which only the
subprocesses that compile see: installed into the environment they would make
every start of JAX print a traceback.
"""

import fcntl
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import jax

_ROOT = pathlib.Path(__file__).parent.parent
_WHEELS = ('jax-cuda13-plugin', 'jax-cuda13-pjrt')
# XLA looks for ptxas in the PATH, here, and beside the plugin.
_CUDA = pathlib.Path('/usr/local/cuda/bin/ptxas')
_ASSEMBLER = ('nvidia-cuda-nvcc>=13,<14', 'nvidia-nvvm>=13,<14')


def plugin() -> pathlib.Path:
  """The folder of the plugin of this JAX and Python, installed if missing."""
  python = '{}.{}'.format(*sys.version_info)
  name = f'deepseek_jax_cuda_{jax.__version__}_{python}'
  folder = pathlib.Path(tempfile.gettempdir()) / name
  with open(f'{folder}.lock', 'w') as lock:  # Tests run in two processes.
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not folder.exists():
      with tempfile.TemporaryDirectory(dir=folder.parent) as partial:
        target = pathlib.Path(partial) / 'target'
        wheels = [f'{wheel}=={jax.__version__}' for wheel in _WHEELS]
        if not (shutil.which('ptxas') or _CUDA.exists()):
          wheels += _ASSEMBLER
        pip = [sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps']
        subprocess.run([*pip, f'--target={target}', *wheels], check=True)
        target.rename(folder)
  return folder


def assembled(*arguments: str) -> list[str]:
  """What ptxas says of each Pallas kernel that `python ARGUMENTS` compiles."""
  with tempfile.TemporaryDirectory() as folder:
    run(*arguments, MOSAIC_GPU_DUMP_PTXAS='1', MOSAIC_GPU_DUMP_TO=folder)
    paths = sorted(pathlib.Path(folder).glob('*.ptxas'))
    return [path.read_text() for path in paths]


def run(*arguments: str, **variables: str) -> str:
  """What `python ARGUMENTS` prints, where it can compile for a GPU.

  Args:
    *arguments: of Python.
    **variables: of the environment, besides.
  """
  paths = [str(plugin()), str(_ROOT), os.environ.get('PYTHONPATH', '')]
  environment = {
    **os.environ,
    'PYTHONPATH': os.pathsep.join(filter(None, paths)),
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': '',  # Those of conftest.py are for the CPU.
    **variables,
  }
  done = subprocess.run(
    [sys.executable, *arguments],
    cwd=_ROOT,
    env=environment,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout

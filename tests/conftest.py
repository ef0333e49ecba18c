"""What several test modules share."""

import multiprocessing
import os
import resource
import runpy
import subprocess
import sys
import tempfile
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# With small models, tests in parallel use the cores better than threads within a test.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The shell scripts ask for an activated environment: this PATH is that of one.
os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
# The folders of the scripts, which import the modules beside them by name.
SCRIPTS = [str(ROOT / "tools"), str(ROOT / "studies")]
sys.path += SCRIPTS


def computes_in_float16():
    """Whether torch convolves in float16 on the CPU; torch 2.1 does not."""
    import torch  # after the number of threads is set

    try:
        torch.nn.functional.conv2d(*torch.zeros(2, 1, 1, 1, 1).half())
    except RuntimeError:
        return False
    return True


# For a config: a convolution, conv_cfg=dict(type="Bent"), whose output no CBN can follow.
BENT_CONV = """
exec('''
import torch
from mmengine.registry import MODELS

class Bent(torch.nn.Module):
    def __init__(self, *args, **kwargs):
        super().__init__()
        self.inner = torch.nn.Conv2d(*args, **kwargs)
        vars(self).update({key: self.inner.__dict__[key] for key in self.inner.__constants__})
        self.transposed, self.output_padding = False, (0, 0)

    def forward(self, x):
        return torch.relu(self.inner(x))

MODELS.register_module(name="Bent", module=Bent, force=True)
''', {})
"""

needs_float16 = pytest.mark.skipif(
    not computes_in_float16(), reason="this torch does not compute in float16 on the CPU"
)


def run_on_full_disk(limit, *command):
    """Runs Python as if on a full disk: no file may grow beyond ``limit`` bytes."""
    return subprocess.run(
        [sys.executable, *command],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        # Coverage's own data file would exceed the limit.
        env={key: value for key, value in os.environ.items() if not key.startswith("COV")},
        capture_output=True,
        text=True,
    )


def cut(path, target=None):
    """Writes the first half of a file to `target`; without one, cuts the file itself."""
    content = path.read_bytes()
    (target or path).write_bytes(content[: len(content) // 2])
    return target or path


def damage(path, target):
    """Writes a copy of a file, of the same length, whose middle is zeros."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 1000] = bytes(1000)
    target.write_bytes(content)
    return target


@pytest.fixture(scope="session")
def root():
    """The root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """A small digits data set."""
    from digits.build import build_digits

    return build_digits(
        tmp_path_factory.mktemp("data") / "digits", num_train=12, num_val=4, progress=False
    )


@pytest.fixture(scope="session")
def coco(tmp_path_factory):
    """A handful of images in a folder laid out like COCO's."""
    from coco_folder import build_coco

    return build_coco(tmp_path_factory.mktemp("data") / "coco")


@pytest.fixture(scope="session")
def small_config(digits):
    """Writes a config that trains one of ``studies/digits/configs`` on the small data set."""

    def write(folder, base, extra=""):
        path = folder / f"{Path(base).stem}_small.py"
        path.write_text(
            f'_base_ = "{ROOT}/studies/digits/configs/{base}.py"\n'
            f'data_root = "{digits}/"\n'
            "train_dataloader = dict(dataset=dict(data_root=data_root))\n"
            "val_dataloader = dict(dataset=dict(data_root=data_root))\n"
            "test_dataloader = val_dataloader\n"
            'val_evaluator = dict(ann_file=data_root + "annotations/instances_val.json")\n'
            "test_evaluator = val_evaluator\n"
            "default_hooks = dict(logger=dict(interval=1))\n"
            f"{extra}\n"
        )
        return path

    return write


@pytest.fixture(scope="session")
def tool_module():
    """Imports one of ``tools/``, for tests that need to call its functions."""

    def load(name):
        spec = spec_from_file_location(f"tools_{name}", ROOT / "tools" / f"{name}.py")
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def tool():
    """Runs one of ``tools/`` or ``studies/`` as a user does, but saves the seconds of its imports.

    Each run is a process of its own, forked from one that has imported the frameworks. The result's
    stdout also holds what the tool wrote to stderr, unless ``apart`` is set.
    """
    context = multiprocessing.get_context("forkserver")
    # MMDetection imports its parts when a config first names one.
    parts = ("apis", "datasets", "engine", "evaluation", "models", "visualization")
    preload = ["pytest", "mmcv.ops", *(f"mmdet.{part}" for part in parts), "cbn_mmdet"]
    context.set_forkserver_preload(preload)

    def run_tool(name, *args, check=True, cwd=ROOT, env=None, apart=False, limit=600):
        (script,) = (path for path in (Path(each, name) for each in SCRIPTS) if path.is_file())
        command = [str(script), *map(str, args)]
        with tempfile.NamedTemporaryFile("r") as output, tempfile.NamedTemporaryFile("r") as errors:
            env = dict(os.environ) if env is None else env
            streams = output.name, (errors if apart else output).name
            process = context.Process(target=be_tool, args=(command, cwd, env, streams))
            process.start()
            process.join(limit)
            if process.exitcode is None:
                process.kill()
            said, complaints = output.read(), errors.read()
        if process.exitcode is None or (check and process.exitcode != 0):
            raise AssertionError(f"{command} ended with {process.exitcode}:\n{said[-5000:]}")
        return subprocess.CompletedProcess(command, process.exitcode, said, complaints)

    return run_tool


def be_tool(command, cwd, env, streams):
    """Turns this process into a run of a tool, from start to end."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    # Unless Python runs unbuffered, the buffer still holds what the imports printed: discard it.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stdout.flush()
    for number, path in enumerate(streams, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    sys.argv = command
    sys.path[:] = [os.path.dirname(command[0]), *(each for each in sys.path if each not in SCRIPTS)]
    runpy.run_path(command[0], run_name="__main__")

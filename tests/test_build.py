"""What setup.py decides on a given machine, and what the package says where it cannot run."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rasa_ext

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("toolchain", ROOT / "toolchain.py")
toolchain = importlib.util.module_from_spec(spec)
sys.modules["toolchain"] = toolchain
spec.loader.exec_module(toolchain)

CPU_TORCH = toolchain.Torch(Path("torch"), "2.13.0+cpu")
CUDA_TORCH = toolchain.Torch(Path("torch"), "2.14.1+cu130", "13.0")
TOOLKIT = toolchain.CudaToolkit(Path("toolkit"), "13.1")


def write_script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def fake_torch(folder, version, cuda=None):
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "__init__.py").write_text("raise ImportError('must not be imported')")
    (folder / "torch" / "version.py").write_text(f"__version__ = {version!r}\ncuda = {cuda!r}")
    return folder


def isolated_environ(tmp_path, **variables):
    """Return the environment of a build: PYTHONPATH hides what the user has installed."""
    overlay = tmp_path / "overlay"
    overlay.mkdir(exist_ok=True)
    return {"PATH": "", "PYTHONPATH": str(overlay), "PYTHONNOUSERSITE": "1", **variables}


def python_with(tmp_path, site, name="python"):
    """Return an interpreter whose only torch, if any, is the one in `site`."""
    run = f'"{sys.executable}" -S'
    return str(
        write_script(
            tmp_path / "bin" / name,
            f'PYTHONPATH="{site}${{PYTHONPATH:+:$PYTHONPATH}}" exec {run} "$@"',
        )
    )


# --- finding torch --------------------------------------------------------------------------------


def test_the_users_torch_is_found_from_inside_isolation_without_importing_it(tmp_path):
    site = fake_torch(tmp_path / "site", "2.14.1+cu130", "13.0")
    found = toolchain.find_torch(isolated_environ(tmp_path), python_with(tmp_path, site))
    assert found == toolchain.Torch(site / "torch", "2.14.1+cu130", "13.0")


def test_the_users_torch_goes_before_the_build_environments(tmp_path):
    site = fake_torch(tmp_path / "site", "2.13.0")
    fake_torch(tmp_path / "overlay", "2.10.0")
    found = toolchain.find_torch(isolated_environ(tmp_path), python_with(tmp_path, site))
    assert found.version == "2.13.0"


def test_the_build_environments_torch_is_better_than_none(tmp_path):
    fake_torch(tmp_path / "overlay", "2.10.0")
    found = toolchain.find_torch(isolated_environ(tmp_path), python_with(tmp_path, "nowhere"))
    assert found.version == "2.10.0"


def test_rasa_ext_python_names_the_interpreter(tmp_path):
    site = fake_torch(tmp_path / "site", "2.12.0")
    environ = isolated_environ(tmp_path, RASA_EXT_PYTHON=python_with(tmp_path, site, "named"))
    found = toolchain.find_torch(environ, python_with(tmp_path, "nowhere"))
    assert found.version == "2.12.0"


def test_the_activated_environment_on_path_is_searched(tmp_path):
    site = fake_torch(tmp_path / "site", "2.11.0")
    python_with(tmp_path / "venv", site)
    lib = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    (tmp_path / "venv" / "lib" / lib).mkdir(parents=True)
    environ = isolated_environ(tmp_path, PATH=str(tmp_path / "venv" / "bin"))
    found = toolchain.find_torch(environ, python_with(tmp_path, "nowhere"))
    assert found.version == "2.11.0"


def test_no_torch_exits_with_what_to_install(tmp_path):
    torch = toolchain.find_torch(isolated_environ(tmp_path), python_with(tmp_path, "nowhere"))
    with pytest.raises(SystemExit) as exit:
        toolchain.require_torch(torch)
    assert "no torch is installed" in exit.value.code
    assert 'pip install "torch>=2.9"' in exit.value.code


def test_an_old_torch_exits_with_what_to_install():
    with pytest.raises(SystemExit) as exit:
        toolchain.require_torch(toolchain.Torch(Path("site/torch"), "2.8.1+cpu"))
    assert "needs torch >= 2.9, got 2.8.1+cpu in site/torch" in exit.value.code
    assert 'pip install "torch>=2.9"' in exit.value.code


@pytest.mark.parametrize("version", ["2.9.0", "2.10.0a0+git1234567", "3.0.0+cu130"])
def test_a_supported_torch_is_taken(version):
    torch = toolchain.Torch(Path("torch"), version)
    assert toolchain.require_torch(torch) is torch


# --- finding CUDA, and what is built --------------------------------------------------------------


def fake_nvcc(folder, top, release):
    return write_script(
        folder / "nvcc",
        f'case "$*" in *--dryrun*) echo "#$ TOP={top}/bin/.." >&2;; '
        f'*) echo "Cuda compilation tools, release {release}, V{release}.88";; esac',
    )


def test_the_toolkits_root_is_found_through_a_wrapper_script(tmp_path):
    root = tmp_path / "toolkit"
    (root / "bin").mkdir(parents=True)
    fake_nvcc(tmp_path / "wrappers", root, "13.0")
    environ = {"PATH": f"{tmp_path / 'wrappers'}{os.pathsep}{os.environ['PATH']}"}
    assert toolchain.find_cuda(environ) == toolchain.CudaToolkit(root, "13.0")


def test_cuda_home_is_the_only_place_looked_at(tmp_path):
    fake_nvcc(tmp_path / "path", tmp_path, "13.0")
    environ = {"PATH": str(tmp_path / "path"), "CUDA_HOME": str(tmp_path / "nothing")}
    assert toolchain.find_cuda(environ) is None


def test_a_cpu_torch_gets_the_cpu_backend_and_no_notice():
    assert toolchain.decide_backends(CPU_TORCH, TOOLKIT) == (("cpu",), None)


def test_a_cuda_torch_with_a_toolkit_of_its_major_version_gets_both_backends():
    assert toolchain.decide_backends(CUDA_TORCH, TOOLKIT) == (("cpu", "cuda"), None)


@pytest.mark.parametrize(
    ("toolkit", "reason"),
    [
        (None, "no CUDA toolkit was found. For the CUDA backend, install the CUDA 13.0"),
        (toolchain.CudaToolkit(Path("old"), "12.8"), "the toolkit in old is CUDA 12.8"),
    ],
)
def test_a_cuda_torch_without_what_cuda_needs_gets_cpu_only_and_a_notice(toolkit, reason):
    backends, notice = toolchain.decide_backends(CUDA_TORCH, toolkit)
    assert backends == ("cpu",)
    assert notice.startswith("CPU backend only: torch 2.14.1+cu130 is a CUDA 13.0 build, but")
    assert reason in notice


@pytest.mark.parametrize(
    ("arch_list", "toolkit", "expected"),
    [
        (None, "13.0", ("80+PTX", "86", "89", "90", "100", "120")),
        ("", "12.6", ("80+PTX", "86", "89", "90")),
        ("8.0;9.0a+PTX", "13.0", ("80", "90a+PTX")),
        ("8.6 12.0", "13.0", ("86", "120")),
    ],
)
def test_architectures_follow_torch_cuda_arch_list(arch_list, toolkit, expected):
    assert toolchain.cuda_architectures(arch_list, toolkit) == expected


def test_an_architecture_that_is_no_number_exits_with_its_name():
    with pytest.raises(SystemExit, match='got "Ampere" in "8.0;Ampere"'):
        toolchain.cuda_architectures("8.0;Ampere", "13.0")


def test_ptx_is_embedded_where_it_is_asked_for():
    assert toolchain.gencode_flags(("80+PTX", "90a")) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_80,code=compute_80",
        "-gencode=arch=compute_90a,code=sm_90a",
    ]


def test_the_cuda_runtime_is_the_one_torch_loads(tmp_path):
    runtime = tmp_path / "nvidia" / "cu13" / "lib" / "libcudart.so.13"
    torch = toolchain.Torch(tmp_path / "torch", "2.14.1", "13.0")
    assert toolchain.find_cudart(torch, TOOLKIT) == Path("toolkit/lib64/libcudart.so")
    runtime.parent.mkdir(parents=True)
    runtime.touch()
    assert toolchain.find_cudart(torch, TOOLKIT) == runtime


def test_a_source_archive_inside_somebody_elses_clone_has_no_revision(tmp_path):
    environ = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull}
    identity = ["-c", "user.name=n", "-c", "user.email=e", "commit", "-q", "--allow-empty", "-mm"]
    for arguments in (["init", "-q"], identity):
        subprocess.run(["git", *arguments], cwd=tmp_path, env=environ, check=True)
    (tmp_path / "archive").mkdir()
    assert len(toolchain.git_revision(tmp_path, environ)) == 12
    assert toolchain.git_revision(tmp_path / "archive", environ) is None


# --- importing the package ------------------------------------------------------------------------


def import_copy(tmp_path, built_against=None, backends=("cpu",)):
    """Import a copy of the package without its extension; return the last line of the traceback."""
    ignore = shutil.ignore_patterns("*.so", "_build_config.py", "__pycache__")
    shutil.copytree(Path(rasa_ext.__file__).parent, tmp_path / "rasa_ext", ignore=ignore)
    if built_against is not None:
        config = f"torch_version = {built_against!r}\nbackends = {backends!r}\n"
        (tmp_path / "rasa_ext" / "_build_config.py").write_text(config)
    run = subprocess.run(
        [sys.executable, "-c", "import rasa_ext"], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 1
    return run.stderr.strip().splitlines()[-1]


def test_importing_the_source_folder_says_how_to_install(tmp_path):
    message = import_copy(tmp_path)
    assert message.startswith(f"ImportError: rasa_ext was imported from {tmp_path / 'rasa_ext'}")
    assert "pip install -e ." in message


def test_importing_under_another_torch_release_names_both_and_the_fix(tmp_path):
    message = import_copy(tmp_path, built_against="2.1.2+cpu")
    assert message.startswith("ImportError: rasa_ext was built against torch 2.1.2+cpu, got torch ")
    assert f"got torch {torch.__version__}. Install rasa_ext again" in message
    assert message.endswith("or install torch 2.1")


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA")
def test_importing_a_cuda_build_under_a_cpu_torch_is_refused(tmp_path):
    message = import_copy(tmp_path, built_against=torch.__version__, backends=("cpu", "cuda"))
    assert "rasa_ext was built with CUDA against torch" in message
    assert "without CUDA. Install rasa_ext again" in message


def test_an_extension_that_does_not_load_is_named_with_its_torch(tmp_path):
    message = import_copy(tmp_path, built_against=torch.__version__)
    assert f"was built against torch {torch.__version__}, and its extension cannot be" in message
    assert "rasa_ext._C" in message


def test_another_patch_release_of_the_same_minor_is_accepted():
    from rasa_ext.build_info import check_torch

    check_torch("2.13.0+cpu", ("cpu",), "2.13.1+cu130", "13.0")


def test_build_info_describes_the_running_build():
    info = rasa_ext.build_info()
    assert info["version"] == rasa_ext.__version__
    assert info["torch_running"] == torch.__version__
    assert info["torch_built"].split(".")[:2] == torch.__version__.split(".")[:2]
    assert "cpu" in info["backends"]
    assert info["cpu_capability"] in ("baseline", "avx2", "avx512", "avx512_bf16")


def test_one_openmp_runtime_is_loaded():
    with open("/proc/self/maps") as maps:
        files = {line.split()[-1] for line in maps if "omp" in line and ".so" in line}
    runtimes = {
        file for file in files if Path(file).name.startswith(("libgomp", "libiomp", "libomp"))
    }
    assert len(runtimes) == 1


def test_gpu_check_on_a_machine_without_a_gpu_says_so_and_fails(tmp_path):
    write_script(tmp_path / "nvidia-smi", "exit 9")
    environ = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    run = subprocess.run(
        ["make", "-s", "gpu-check"], cwd=ROOT, env=environ, capture_output=True, text=True
    )
    assert run.returncode != 0
    assert run.stdout == "gpu-check: FAILED: this machine has no NVIDIA GPU\n"

"""The file of site defaults."""

import pytest
from click.testing import CliRunner

from hpc_ray.config import Settings, site_file
from hpc_ray.exceptions import ConfigurationError
from hpc_ray.launcher.cli import cli


@pytest.fixture
def site(tmp_path, monkeypatch):
    """Writes the file."""

    def write(text: str) -> str:
        path = tmp_path / "site.toml"
        path.write_text(text)
        monkeypatch.setenv("HPC_RAY_CONFIG", str(path))
        return str(path)

    return write


def test_file_then_environment_then_arguments(site, monkeypatch):
    site("[settings]\nidle_worker_s = 5\nmax_processes = 77\ntask_history = 1\n")
    monkeypatch.setenv("HPC_RAY_MAX_PROCESSES", "88")
    monkeypatch.setenv("HPC_RAY_TASK_HISTORY", "2")
    settings = Settings.from_environment({"task_history": 3})
    assert (settings.idle_worker_s, settings.max_processes, settings.task_history) == (5.0, 88, 3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[settings]\nidle_workers = 5\n", "'idle_workers', which is not a setting"),
        ("[settings]\nidle_worker_s = 'long'\n", "idle_worker_s"),
        ("[setting]\n", "'setting' is not known"),
        ("submit = 3\n", "'submit' is not known"),
        ("[settings\n", "is not TOML"),
    ],
)
def test_mistakes_name_file_and_key(site, text, words):
    path = site(text)
    with pytest.raises(ConfigurationError) as caught:
        Settings.from_environment()
    assert path in str(caught.value) and words in str(caught.value)


def test_a_named_file_must_be_there(monkeypatch, tmp_path):
    monkeypatch.setenv("HPC_RAY_CONFIG", str(tmp_path / "absent.toml"))
    with pytest.raises(ConfigurationError, match=r"absent.toml \(HPC_RAY_CONFIG\) cannot be read"):
        Settings.from_environment()


def test_where_it_is_found(monkeypatch, tmp_path):
    home, here = tmp_path / "home", tmp_path / "here"
    (home / ".config").mkdir(parents=True)
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    monkeypatch.delenv("HPC_RAY_CONFIG")
    assert site_file() == ""
    (home / ".config" / "hpc_ray.toml").write_text("")
    assert site_file() == str(home / ".config" / "hpc_ray.toml")
    (here / "hpc_ray.toml").write_text("")
    assert site_file() == "hpc_ray.toml"
    monkeypatch.setenv("HPC_RAY_CONFIG", "")
    assert site_file() == ""


def test_defaults_of_submit(site, tmp_path, monkeypatch):
    site("[submit]\nnodes = 3\npartition = 'gpu'\nsetup = ['module load mpi', 'cd x']\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "a.py").write_text("")
    printed = CliRunner().invoke(cli, ["submit", "--dry-run", "-p", "cpu", "a.py"]).output
    assert "#SBATCH --nodes=3\n" in printed and "#SBATCH --partition=cpu\n" in printed
    assert "\nmodule load mpi\ncd x\nexec srun " in printed


def test_an_unknown_option_of_submit(site):
    path = site("[submit]\npartitions = 'gpu'\n")
    error = CliRunner().invoke(cli, ["submit", "--dry-run", "a.py"]).exception
    assert isinstance(error, ConfigurationError)
    assert path in str(error) and "'partitions', which is not an option" in str(error)

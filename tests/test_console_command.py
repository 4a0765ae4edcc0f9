"""The one command for all programs, and the library's configs wherever it is called."""

import importlib
import io
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from convnext_jax import cli, config_files, configs
from convnext_jax.__main__ import PROGRAMS, main
from convnext_jax.errors import UserError
from convnext_jax.version import __version__

ROOT = Path(__file__).parents[1]


def test_pyproject_names_this_command():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {cli.COMMAND: "convnext_jax.__main__:main"}


def test_without_arguments_it_lists_the_programs(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(re.search(rf"^  {name} +\w", printed, re.MULTILINE) for name in PROGRAMS)
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == printed
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


def test_every_module_that_is_a_program_is_listed():
    package = ROOT / "convnext_jax"
    files = [*package.glob("*.py"), *package.glob("*/__main__.py")]
    programs = {
        file.parent.name if file.name == "__main__.py" else file.stem
        for file in files
        if "cli.run(main)" in file.read_text()
    }
    assert programs - {"convnext_jax"} == set(PROGRAMS)


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_is_readable_and_has_examples_in_the_words_that_were_typed(
    program, capsys, monkeypatch
):
    for typed, begin in (
        ("/usr/bin/convnext-jax", f"convnext-jax {program}"),
        (f"convnext_jax/{program}.py", f"python -m convnext_jax.{program}"),
    ):
        monkeypatch.setattr(sys, "argv", [typed])
        with pytest.raises(SystemExit) as ended:
            main([program, "--help"])
        assert ended.value.code == 0
        printed = capsys.readouterr().out
        assert printed.startswith(f"usage: {begin} ")
        examples = printed.partition("examples:\n")[2]
        assert begin in examples
        assert ("python -m" in printed) == begin.startswith("python")
        assert all(len(line) <= 100 for line in printed.splitlines())


def test_the_examples_arguments_are_understood(monkeypatch):
    """Each example of --help goes through its own parser; only what follows is left out."""

    class UnderstoodError(Exception):
        pass

    for program in PROGRAMS:
        name = "convert.__main__" if program == "convert" else program
        module = importlib.import_module(f"convnext_jax.{name}")
        found = []

        def make(*arguments, found=found, original=cli.make_parser):
            parser = original(*arguments)
            found.append((parser, arguments[2]))
            return parser

        with monkeypatch.context() as patch:
            patch.setattr(cli, "make_parser", make)
            with pytest.raises(SystemExit):
                module.main(["--help"])
        ((parser, examples),) = found
        lines = re.sub(r"\\\n\s*", "", examples).splitlines()
        commands = [line.split() for line in lines if "python -m convnext_jax." in line]
        assert commands
        for _, _, whose, *words in commands:
            if whose == f"convnext_jax.{program}":
                words = words[: words.index(">")] if ">" in words else words
                _, rest = parser.parse_known_args(words)
                assert all(word.startswith("--config.") or "'" in word for word in rest), words


def test_an_unknown_program_is_one_sentence(capsys):
    assert main(["trian"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: there is no program 'trian'; the programs are train, evaluate")
    assert len(said.splitlines()) == 1


def test_a_users_mistake_goes_through_it(capsys):
    assert main(["train", "--config", "nowhere.py", "--workdir", "w"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: there is no config file nowhere.py; the nearest are configs/")


def test_interruption_by_the_keyboard_is_no_stack_trace(capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    assert cli.run(interrupted, []) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("unbuffered", ["1", ""])
def test_a_reader_that_has_seen_enough_is_no_mistake(unbuffered):
    done = subprocess.run(
        f"{sys.executable} -m convnext_jax configs base | true; echo ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        cwd=ROOT,
    )
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] == "141"


# Of a directory without configs/, as whoever installed the package has it.
@pytest.mark.parametrize("given", ["configs/digits.py", "digits.py", "digits", "./digits.py"])
def test_the_librarys_configs_are_found_from_any_directory(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_files.load_config(given).data.name == "digits"


def test_an_argument_follows_the_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_files.load_config("tiny_22k_ft_1k:384").data.image_size == 384
    assert config_files.load_config("configs/tiny_22k_ft_1k.py:384").data.image_size == 384


def test_a_file_of_ones_own_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = config_files.library_configs()["digits"].read_text()
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "digits.py").write_text(own.replace('"200 epochs"', '"7 epochs"'))
    assert config_files.load_config("configs/digits.py").total == "7 epochs"
    assert config_files.load_config("digits.py").total == "200 epochs"


@pytest.mark.parametrize("given", ["elsewhere/digits.py", "digits.txt", "digitz"])
def test_another_place_or_name_is_none_of_the_librarys(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"no config file {given}; the nearest are .*digits\.py"):
        config_files.load_config(given)


def test_configs_lists_each_with_what_it_is(capsys):
    configs.main([])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(config_files.library_configs())
    assert len(lines) == len(list((ROOT / "configs").glob("*.py")))
    assert all(re.fullmatch(r"\w+ {2,}[A-Z].*\.", line) for line in lines)


def test_configs_prints_one(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    configs.main(["tiny"])
    printed = capsys.readouterr().out
    assert printed == (ROOT / "configs" / "tiny.py").read_text()
    (tmp_path / "mine.py").write_text(printed)
    assert config_files.load_config("mine.py").model.name == "convnext_tiny"
    with pytest.raises(UserError, match="no config 'tinny'; there are base, "):
        configs.main(["tinny"])


@pytest.mark.parametrize("stream", [None, io.StringIO()], ids=["open", "no file"])
def test_another_pipe_that_breaks_is_not_taken_for_the_output(stream, monkeypatch):
    if stream is not None:
        monkeypatch.setattr(sys, "stdout", stream)

    def broken(argv):
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        cli.run(broken, [])

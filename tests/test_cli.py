"""Mistakes on the command line end in one sentence, status 2 and no traceback."""

import logging
import textwrap

import pytest
from runs import CONFIG_FILE, digit_folder

from convnext_jax import cli, config_files, train
from convnext_jax.errors import RunStoppedError, UserError

pytest_plugins = ["run_fixtures"]
pytestmark = pytest.mark.usefixtures("quick", "_own_log")


@pytest.fixture
def _own_log():
    """Takes back what a program does to the logger, which other tests listen to."""
    log = logging.getLogger("convnext_jax")
    handlers, propagate, level = log.handlers[:], log.propagate, log.level
    yield
    log.handlers[:] = handlers
    log.propagate = propagate
    log.setLevel(level)


@pytest.fixture
def mistake(tmp_path, capsys):
    """Runs the program, which must refuse; returns what it says."""

    def run(*arguments, config=CONFIG_FILE):
        workdir = tmp_path / "run"
        status = cli.run(
            train.main, ["--config", str(config), "--workdir", str(workdir), *arguments]
        )
        err = capsys.readouterr().err
        assert status == 2
        assert "Traceback" not in err
        # Before it the log may say something; the mistake itself is one line.
        *_, last = err.splitlines()
        assert last.startswith("error: ")
        return last

    return run


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("--config.optim.learning_rat=1e-3", ["config.optim.learning_rat ", "learning_rate"]),
        ("--config.batch_size=many", ["wrong type", "batch_size", "many"]),
        ("--config.seed=0.5", ["wrong type", "seed", "0.5"]),
        ("--config.mesh=2", ["config.mesh ", "config.mesh.data"]),
        ("--learning_rate=1e-3", ["--learning_rate", "config.optim.learning_rate"]),
        ("surplus", ["'surplus'", "--config.FIELD=VALUE"]),
        ("--config.model.name=convnext_tinny", ["'convnext_tinny'", "convnext_tiny"]),
        ("--config.model.dtype=float16", ["config.model.dtype", "float16", "bfloat16"]),
        ("--config.model.overrides.depths=(1,1,1)", ["config.model", "depths", "dims"]),
        (
            "--config.model.overrides.kernel=5",
            ["no argument kernel", "kernel_size"],
        ),
        ("--config.data.image_size=1", ["image", "stride"]),
        ("--config.data.name=imagenet2021", ["'imagenet2021'", "imagenet2012"]),
        ("--config.data.name=imagenet2012", ["'imagenet2012'", "tfds build"]),
        ("--config.data.name=folder", ["'folder'", "data_dir"]),
        ("--config.data.train_split=training", ["'training'", "'train'"]),
        ("--config.data.on_bad_image=ignore", ["on_bad_image", "'ignore'", "'stop'"]),
        ("--config.data.workers=-1", ["workers", "-1"]),
        ("--config.augment.crop=center", ["config.augment.crop", "'center'", '"pad"']),
        ("--config.batch_size=36", ["config.batch_size = 36", "8"]),
        ("--config.eval_batch_size=36", ["config.eval_batch_size = 36", "multiple of 8"]),
        ("--config.batch_size=2048", ["config.batch_size = 2048", "1438"]),
        ("--config.batch_size=0", ["config.batch_size = 0"]),
        ("--config.optim.accumulation_steps=3", ["batch_size = 32", "3 micro-batches", "24"]),
        ("--config.optim.accumulation_steps=0", ["accumulation_steps", "0"]),
        ("--config.mesh.fsdp=3", ["config.mesh", "3", "8"]),
        ("--config.optim.warmup=2 epochs", ["config.optim.warmup", "2 epochs", "config.total"]),
        ("--config.total=forty steps", ["config.total", "'forty steps'", '"300 epochs"']),
        ("--config.log_every=5", ["config.log_every", "'5'", "unit"]),
        ("--config.checkpoint_every=0 steps", ["config.checkpoint_every", "more than 0"]),
        ("--config.checkpoints_kept=0", ["0", "at least 1"]),
        ("--config.mix.group_size=12", ["config.mix.group_size = 12", "batch_size = 32"]),
        ("--config.mix.switch_prob=1.5", ["config.mix.switch_prob", "1.5"]),
        ("--config.optim.clip_norm=-1.0", ["config.optim.clip_norm", "-1.0"]),
        ("--config.optim.layer_decay=-1.0", ["config.optim.layer_decay", "-1.0"]),
        ("--config.on_nonfinite=halt", ["config.on_nonfinite", "'halt'", '"skip"']),
        ("--config.model.num_classes=3", ["config.model.num_classes", "3", "10"]),
        ("--config.seed=-1", ["seed", "-1"]),
        ("--config.init_from=", ["fine-tunes", "--config.init_from=WEIGHTS"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_field_that_cannot_be(mistake, argument, parts):
    message = mistake(argument)
    assert [part for part in parts if part not in message] == [], message


def test_a_config_file_that_is_not_there(mistake, tmp_path):
    message = mistake(config=CONFIG_FILE.with_name("tiny_confg.py"))
    assert "tiny_confg.py" in message
    assert str(CONFIG_FILE) in message
    assert "no config file" in mistake(config=tmp_path / "absent" / "config.py")


@pytest.mark.parametrize(
    ("body", "parts"),
    [
        ("return 3", ["config.py", "recipes.base()"]),
        ("return ConfigDict({'seed': 1})", ["missing", "recipes.base()"]),
        (
            "c = recipes.base(); c.unlock(); c.optim.beta = 0.9; return c",
            ["config.optim.beta", "nearest", "config.optim.decayed"],
        ),
    ],
)
def test_a_config_file_that_says_something_else(mistake, tmp_path, body, parts):
    path = tmp_path / "config.py"
    path.write_text(
        textwrap.dedent(f"""
        from ml_collections import ConfigDict
        from convnext_jax import recipes
        def get_config():
            {body}
        """)
    )
    message = mistake(config=path)
    assert [part for part in parts if part not in message] == [], message


@pytest.mark.parametrize(
    ("signature", "argument", "parts"),
    [
        ("", ":t/07", ["takes nothing after a colon", "leave out :t/07"]),
        ("", ":", ["takes nothing after a colon"]),
        ("step", "", ["needs its step after a colon", "config.py:STEP"]),
        ("size='224'", ":wide", ["does not take 'wide'", "invalid literal"]),
    ],
)
def test_what_follows_the_colon(tmp_path, signature, argument, parts):
    path = tmp_path / "config.py"
    body = "int(size)" if signature.startswith("size") else "None"
    path.write_text(f"def get_config({signature}):\n    return {body}\n")
    with pytest.raises(UserError) as caught:
        config_files.load_config(f"{path}{argument}")
    assert [part for part in parts if part not in str(caught.value)] == []
    assert str(path) in str(caught.value)


def test_colons_that_belong_to_the_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "from convnext_jax import recipes\ndef get_config(total='1 epoch'):\n"
    text += "    config = recipes.base()\n    config.total = total\n    return config\n"
    # A drive of Windows; here it is a directory of that name.
    for name in ("C:/runs.py", "odd.py:2.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        assert config_files.load_config(name).total == "1 epoch"
        assert config_files.load_config(f"{path}").total == "1 epoch"
    assert config_files.load_config("C:/runs.py:2 epochs").total == "2 epochs"
    assert config_files.load_config("C:/runs.py:2:3").total == "2:3"
    with pytest.raises(UserError, match=r"no config file C:\\runs\\absent\.py"):
        config_files.load_config("C:\\runs\\absent.py:t")


def test_a_config_file_without_get_config(mistake, tmp_path):
    path = tmp_path / "config.py"
    path.write_text("config = 1\n")
    assert "get_config" in mistake(config=path)


def test_init_from_nothing(mistake, tmp_path):
    message = mistake(f"--config.init_from={tmp_path / 'absent'}")
    assert "config.init_from" in message
    assert str(tmp_path / "absent") in message
    (tmp_path / "file").write_text("")
    assert "is empty" in mistake(f"--config.init_from={tmp_path / 'file'}")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    assert "holds no checkpoint" in mistake(f"--config.init_from={tmp_path / 'empty'}")


def test_a_batch_that_the_devices_do_not_divide(mistake):
    message = mistake("--config.batch_size=36", "--config.mix.group_size=0")
    assert "config.batch_size = 36" in message
    assert "8 devices" in message
    assert "multiple of 8" in message


def test_a_mistake_does_not_tie_the_workdir_to_its_config(mistake, tmp_path):
    """What never took a step can be corrected and started again, without being told."""
    for wrong in ("center", "middle"):
        assert f"config.augment.crop is '{wrong}'" in mistake(f"--config.augment.crop={wrong}")
    for wrong in ("one", "two"):
        assert str(tmp_path / wrong) in mistake(f"--config.init_from={tmp_path / wrong}")


def test_a_folder_that_is_smaller_than_a_batch(mistake, tmp_path):
    root = digit_folder(tmp_path / "digits", 2, count=10)
    message = mistake("--config.data.name=folder", f"--config.data.data_dir={root}")
    assert "config.batch_size = 32" in message
    assert "18 images" in message


def test_a_workdir_that_is_a_file(tmp_path, capsys):
    (tmp_path / "run").write_text("")
    argv = ["--config", str(CONFIG_FILE), "--workdir", str(tmp_path / "run")]
    assert cli.run(train.main, argv) == 2
    assert str(tmp_path / "run") in capsys.readouterr().err


def test_what_argparse_asks_for(capsys):
    with pytest.raises(SystemExit) as left:
        cli.run(train.main, ["--config", str(CONFIG_FILE)])
    assert left.value.code == 2
    assert "--workdir" in capsys.readouterr().err


def test_fields_are_set_by_their_types():
    config = config_files.load_config(
        str(CONFIG_FILE),
        [
            "--config.optim.learning_rate=1e-3",
            "--config.total",
            "2 epochs",
            "--config.ema_decay=None",
            "--config.init_from=somewhere",
            "--config.model.overrides.depths=(2,1)",
            "--config.model.overrides.kernel_size=5",
            "--config.model.overrides.norm_type=layer",
            "--noconfig.model.remat",
        ],
    )
    assert config.optim.learning_rate == 1e-3
    assert config.total == "2 epochs"
    assert config.ema_decay is None
    assert config.init_from == "somewhere"
    assert config.model.overrides.depths == (2, 1)
    # What the file does not have is read as Python would read it.
    assert config.model.overrides.kernel_size == 5
    assert config.model.overrides.norm_type == "layer"
    assert config.model.remat is False


def test_exit_statuses(capsys):
    def raises(error):
        def program(argv):
            assert argv == ["--argument"]
            raise error

        return program

    assert cli.run(lambda argv: {"step": 1}, []) == 0
    assert cli.run(raises(UserError("no such thing")), ["--argument"]) == 2
    assert cli.run(raises(RunStoppedError("step 3")), ["--argument"]) == 1
    assert capsys.readouterr().err == "error: no such thing\nstopped: step 3\n"
    # What is no user's mistake keeps its traceback.
    with pytest.raises(KeyError):
        cli.run(raises(KeyError("x")), ["--argument"])


def test_the_log_reaches_the_terminal_once(capsys):
    log = logging.getLogger("convnext_jax")
    log.handlers.clear()
    for _ in range(2):
        cli.run(lambda argv: logging.getLogger("convnext_jax.data").warning("look"), [])
    assert capsys.readouterr().err == "look\nlook\n"

"""Studies renamed, copied and deleted, on SQLite and on a real Postgres."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

import optuna
import pytest
import sqlalchemy
import typer
from command import Adopt
from optuna.artifacts import FileSystemArtifactStore, upload_artifact
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from autodiffusion_optuna.errors import AdoptError
from autodiffusion_optuna.results.summary import read_summary
from autodiffusion_optuna.storage import artifacts, manage
from autodiffusion_optuna.storage.attrs import ARTIFACTS, CANDIDATE, GENERATION, OPERATOR, OWNER, PARENTS, STAGE
from autodiffusion_optuna.storage.database import open_storage
from autodiffusion_optuna.storage.lease import owner
from autodiffusion_optuna.storage.studies import load_study, stored_config, study_names
from studies import rows, run


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.slow)])
def url(request: pytest.FixtureRequest, folder: Path) -> Iterator[str]:
    """An empty database of each kind."""
    if request.param == "sqlite":
        yield "sqlite:///studies.db"
        return
    server = request.getfixturevalue("server")
    yield server
    storage = open_storage(server)
    for study in storage.get_all_studies():
        storage.delete_study(study._study_id)


def with_pictures(url: str, name: str, pictures: Path) -> list[str]:
    """Give a study a waiting trial with a picture, and a picture of its own; ids of both."""
    pictures.mkdir(exist_ok=True)
    store = FileSystemArtifactStore(pictures)
    (pictures.parent / "grid.png").write_bytes(b"a picture of " + name.encode())
    study = load_study(open_storage(url, create=False), name)
    study.set_user_attr(ARTIFACTS, str(pictures))
    study.enqueue_trial({})
    waiting = study.get_trials(deepcopy=False)[-1]
    path = str(pictures.parent / "grid.png")
    return [
        upload_artifact(artifact_store=store, file_path=path, study_or_trial=waiting, storage=study._storage),
        upload_artifact(artifact_store=store, file_path=path, study_or_trial=study),
    ]


def attrs(storage: RDBStorage, name: str) -> dict[str, object]:
    return storage.get_study_user_attrs(storage.get_study_id_from_name(name))


def test_a_renamed_study_keeps_everything_and_goes_on(url: str, folder: Path, adopt: Adopt) -> None:
    study = run(folder / "quick.toml", url, "search.trials=9")
    before = rows(url, "quick")
    pictures = with_pictures(url, "quick", folder / "pictures")
    study._storage.set_study_system_attr(study._study_id, "dashboard:note_str:0", "a note")

    done = adopt("studies", "rename", "--study", "quick", "--to", "slow", "--storage", url)
    assert (done.code, done.out) == (0, "renamed quick to slow\n")
    storage = open_storage(url, create=False)
    assert study_names(storage) == ["slow"]
    assert storage.get_study_id_from_name("slow") == study._study_id
    assert stored_config(load_study(storage, "slow")).name == "slow"
    assert rows(url, "slow")[:9] == before[:9]
    assert storage.get_study_system_attrs(study._study_id)["dashboard:note_str:0"] == "a note"
    assert {path.name for path in (folder / "pictures").iterdir()} == set(pictures)
    again = adopt("run", "--study", "slow", "--set", "search.trials=12", "--storage", url)
    assert again.code == 0, again
    assert study_names(storage) == ["slow"]


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_copy_goes_on_like_the_original(url: str, folder: Path, adopt: Adopt, elsewhere: bool) -> None:
    other = "sqlite:///other.db" if elsewhere else url
    target = ["--to-storage", "other.db"] if elsewhere else []
    run(folder / "quick.toml", url, "search.trials=9")
    done = adopt("studies", "copy", "--study", "quick", "--to", "twin", "--storage", url, *target)
    assert done.code == 0, done
    assert rows(url, "quick") == rows(other, "twin")
    run(folder / "quick.toml", url, "search.trials=14")
    run(folder / "quick.toml", other, "search.trials=14", "name=twin")
    original, copied = (load_study(open_storage(u), n) for u, n in ((url, "quick"), (other, "twin")))
    assert len(rows(url, "quick")) == 14
    for one, two in zip(original.get_trials(), copied.get_trials(), strict=True):
        assert (one.number, one.state, one.values, one.params) == (two.number, two.state, two.values, two.params)
        assert one.distributions == two.distributions
        for key in (CANDIDATE, GENERATION, STAGE, OPERATOR, PARENTS):
            assert one.user_attrs.get(key) == two.user_attrs.get(key), key
    assert stored_config(copied).name == "twin"
    assert read_summary(copied).to_json()["best"] == read_summary(original).to_json()["best"]


def test_a_copy_has_notes_and_pictures_of_its_own(url: str, folder: Path, adopt: Adopt) -> None:
    study = run(folder / "quick.toml", url, "search.trials=2")
    first = study.get_trials()[0]
    study._storage.set_study_system_attr(study._study_id, f"dashboard:{first._trial_id}:note_str:0", "look here")
    old = with_pictures(url, "quick", folder / "pictures")
    storage = open_storage(url)
    manage.copy_study(storage, "quick", "twin")

    twin = load_study(storage, "twin")
    notes = storage.get_study_system_attrs(twin._study_id)
    assert notes[f"dashboard:{twin.get_trials()[0]._trial_id}:note_str:0"] == "look here"
    assert f"dashboard:{first._trial_id}:note_str:0" not in notes
    new = {path.name for path in (folder / "pictures").iterdir()} - set(old)
    assert len(new) == 2
    waiting = twin.get_trials()[-1]
    assert {f"artifacts:{name}" for name in new} >= {key for key in waiting.system_attrs if "artifacts" in key}
    assert all((folder / "pictures" / name).read_bytes() == b"a picture of quick" for name in new)

    done = adopt("studies", "delete", "--study", "quick", "--yes", "--storage", url)
    assert (done.code, done.out) == (0, "deleted quick and 2 pictures\n")
    assert {path.name for path in (folder / "pictures").iterdir()} == new
    assert study_names(storage) == ["twin"]


def test_a_study_that_another_program_renamed_goes_by_its_new_name(folder: Path, adopt: Adopt) -> None:
    run(folder / "quick.toml", "sqlite:///adopt.db", "search.trials=2")
    # As optuna-dashboard renames: a copy, and the old one is deleted.
    optuna.copy_study(
        from_study_name="quick", from_storage="sqlite:///adopt.db", to_storage="sqlite:///adopt.db",
        to_study_name="theirs",
    )  # fmt: skip
    optuna.delete_study(study_name="quick", storage="sqlite:///adopt.db")
    assert stored_config(load_study(open_storage("sqlite:///adopt.db"), "theirs")).name == "theirs"
    listed = adopt("studies", "list").out
    assert "theirs" in listed
    assert "quick" not in listed
    done = adopt("run", "--study", "theirs", "--set", "search.trials=4")
    assert done.code == 0, done
    assert "adopt export --study theirs" in done.out
    assert "quick" not in done.out
    assert study_names(open_storage("sqlite:///adopt.db")) == ["theirs"]


def test_a_name_that_only_another_program_gives_is_shown(folder: Path, adopt: Adopt) -> None:
    run(folder / "quick.toml", "sqlite:///adopt.db", "search.trials=1")
    optuna.copy_study(
        from_study_name="quick", from_storage="sqlite:///adopt.db", to_storage="sqlite:///adopt.db",
        to_study_name="a copy (1)",
    )  # fmt: skip
    assert adopt("show", "--study", "a copy (1)").code == 0
    assert "a copy (1)" in adopt("studies", "list").out
    refused = adopt("run", "--study", "a copy (1)")
    assert refused.code == 1
    assert refused.err.count("\n") == 1
    assert "'a copy (1)'" in refused.err
    assert adopt("studies", "rename", "--study", "a copy (1)", "--to", "mine").code == 0
    assert adopt("run", "--study", "mine").code == 0


def test_a_picture_that_another_study_shows_is_kept(folder: Path) -> None:
    run(folder / "quick.toml", "sqlite:///studies.db", "search.trials=1")
    kept = with_pictures("sqlite:///studies.db", "quick", folder / "pictures")
    optuna.copy_study(
        from_study_name="quick", from_storage="sqlite:///studies.db", to_storage="sqlite:///studies.db",
        to_study_name="theirs",
    )  # fmt: skip
    (folder / "pictures" / "stranger").touch()
    assert manage.delete_study(open_storage("sqlite:///studies.db"), "quick") == manage.Deleted(0)
    assert {path.name for path in (folder / "pictures").iterdir()} == {*kept, "stranger"}


class Denied(FileSystemArtifactStore):
    """A store that lets nobody write, and nothing be removed but one picture."""

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        raise PermissionError(13, "Permission denied")

    def remove(self, artifact_id: str) -> None:
        if [path.name for path in Path(self._base_path).iterdir()] == [artifact_id]:
            raise RuntimeError("AccessDenied: not yours\nand much more")
        super().remove(artifact_id)


def test_a_store_that_fails_is_one_line_and_keeps_the_study(
    folder: Path, adopt: Adopt, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(folder / "quick.toml", "sqlite:///adopt.db", "search.trials=1")
    pictures = sorted(with_pictures("sqlite:///adopt.db", "quick", folder / "pictures"))
    monkeypatch.setattr(manage, "open_store", lambda location: Denied(location))
    copied = adopt("studies", "copy", "--study", "quick", "--to", "twin")
    assert (copied.code, copied.err.count("\n")) == (1, 1)
    assert "cannot copy pictures in" in copied.err
    assert "Permission denied" in copied.err
    deleted = adopt("studies", "delete", "--study", "quick", "--yes")
    assert (deleted.code, deleted.err.count("\n")) == (1, 1)
    assert "AccessDenied: not yours; fix that and try again, or give --force" in deleted.err
    assert study_names(open_storage("sqlite:///adopt.db")) == ["quick"]
    forced = adopt("studies", "delete", "--study", "quick", "--yes", "--force")
    assert (forced.code, forced.out) == (0, "deleted quick\n")
    assert f"pictures that stay: {pictures[1]}\n" in forced.err
    assert study_names(open_storage("sqlite:///adopt.db")) == []


def test_a_store_that_cannot_be_opened_keeps_the_study_unless_forced(
    folder: Path, adopt: Adopt, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = run(folder / "quick.toml", "sqlite:///adopt.db", "search.trials=1")
    pictures = with_pictures("sqlite:///adopt.db", "quick", folder / "pictures")
    study.set_user_attr(ARTIFACTS, "s3://bucket/mine")

    def missing(bucket: str) -> None:
        raise ImportError("no module named boto3")

    monkeypatch.setattr(artifacts, "Boto3ArtifactStore", missing)
    deleted = adopt("studies", "delete", "--study", "quick", "--yes")
    assert (deleted.code, deleted.err.count("\n")) == (1, 1)
    assert 'pip install "autodiffusion-optuna[s3]"' in deleted.err
    assert "--force" in deleted.err
    assert study_names(open_storage("sqlite:///adopt.db")) == ["quick"]
    forced = adopt("studies", "delete", "--study", "quick", "--yes", "--force")
    assert forced.code == 0
    assert f"pictures that stay: {' '.join(sorted(pictures))}\n" in forced.err
    assert study_names(open_storage("sqlite:///adopt.db")) == []


def test_a_deleted_study_leaves_no_row(url: str, folder: Path) -> None:
    run(folder / "quick.toml", url, "search.trials=3")
    storage = open_storage(url)
    manage.delete_study(storage, "quick")
    with storage.engine.connect() as connection:
        for table in sqlalchemy.inspect(storage.engine).get_table_names():
            if table not in ("alembic_version", "version_info"):
                assert connection.execute(sqlalchemy.text(f"SELECT count(*) FROM {table}")).scalar() == 0, table


REFUSED = [
    (("rename", "--study", "nobody", "--to", "new"), "unknown study 'nobody'"),
    (("rename", "--study", "quick", "--to", "other"), "a study 'other' exists already"),
    (("rename", "--study", "quick", "--to", "a b"), "'a b' cannot be a study's name"),
    (("rename", "--study", "foreign", "--to", "new"), "was not made by adopt"),
    (("copy", "--study", "nobody", "--to", "new", "--to-storage", "new.db"), "unknown study 'nobody'"),
    (("copy", "--study", "quick", "--to", "other"), "a study 'other' exists already"),
    (("copy", "--study", "quick", "--to", "-x/y"), "'-x/y' cannot be a study's name"),
    (("copy", "--study", "foreign", "--to", "new"), "was not made by adopt"),
    (("delete", "--study", "nobody", "--yes"), "unknown study 'nobody'"),
    (("delete", "--study", "foreign", "--yes"), "was not made by adopt"),
    (("delete", "--study", "quick"), "needs --yes"),
]


def test_what_cannot_be_done_is_one_line_and_changes_nothing(url: str, folder: Path, adopt: Adopt) -> None:
    for name in ("quick", "other"):
        run(folder / "quick.toml", url, "search.trials=2", f"name={name}")
    storage = open_storage(url)
    optuna.create_study(study_name="foreign", storage=storage)
    before = {name: attrs(storage, name) for name in study_names(storage)}
    for arguments, message in REFUSED:
        result = adopt("studies", *arguments, "--storage", url)
        assert result.code == 1, arguments
        assert result.err.startswith("error: ")
        assert result.err.count("\n") == 1
        assert message in result.err
        assert {name: attrs(storage, name) for name in study_names(storage)} == before
    assert not (folder / "new.db").exists()


def test_a_study_that_is_being_run_is_left_alone(url: str, folder: Path, adopt: Adopt) -> None:
    study = run(folder / "quick.toml", url, "search.trials=3")
    running = study.ask()
    running.set_user_attr(OWNER, owner())
    for action in (("rename", "--to", "new"), ("copy", "--to", "new"), ("delete", "--yes")):
        command = ("studies", action[0], "--study", "quick", *action[1:], "--storage", url)
        refused = adopt(*command)
        assert refused.code == 1
        assert "is being run: 1 running trials" in refused.err
        assert study_names(open_storage(url)) == ["quick"]
    assert adopt("studies", "copy", "--study", "quick", "--to", "twin", "--force", "--storage", url).code == 0
    copied = load_study(open_storage(url), "twin").get_trials()
    assert copied[running.number].state == TrialState.WAITING
    assert {t.state for t in copied} == {TrialState.COMPLETE, TrialState.WAITING}
    assert adopt("studies", "rename", "--study", "quick", "--to", "new", "--force", "--storage", url).code == 0
    assert adopt("studies", "delete", "--study", "new", "--yes", "--force", "--storage", url).code == 0
    assert study_names(open_storage(url)) == ["twin"]


@pytest.mark.parametrize("change", [manage.delete_study, partial(manage.rename_study, new="new")])
def test_a_trial_that_is_being_taken_is_waited_for(url: str, folder: Path, change: Callable[..., object]) -> None:
    study = run(folder / "quick.toml", url, "search.trials=2")
    storage, refused = open_storage(url), []

    def try_it() -> None:
        try:
            change(storage, "quick")
        except AdoptError as error:
            refused.append(str(error))

    with open_storage(url).locked(study):
        changing = threading.Thread(target=try_it)
        changing.start()
        time.sleep(0.5)
        study.ask()
    changing.join()
    assert "is being run: 1 running trials" in refused[0]
    assert study_names(storage) == ["quick"]


def test_a_study_that_is_being_begun_keeps_no_other_waiting(folder: Path) -> None:
    url = "sqlite:///studies.db"
    storage = open_storage(url)
    other = run(folder / "quick.toml", url, "search.trials=2")
    begun = optuna.create_study(study_name="begun", storage=storage)
    with storage.locked(begun, beginning=True), open_storage(url).locked(other):
        locks = {path.name for path in folder.glob("*.lock")}
        assert locks == {"studies.db.lock", f"studies.db.{begun._study_id}.lock"}
    assert [path.name for path in folder.glob("*.lock")] == ["studies.db.lock"]


def test_trials_of_dead_workers_stop_nobody(folder: Path) -> None:
    study = run(folder / "quick.toml", "sqlite:///studies.db", "search.trials=2")
    host, pid, started = owner().rsplit("/", 2)
    study.ask().set_user_attr(OWNER, f"{host}/{pid}/{int(started) + 1}")
    storage = open_storage("sqlite:///studies.db")
    manage.rename_study(storage, "quick", "new")
    assert study_names(storage) == ["new"]


SLOW_COPY = """
import sys, time
from autodiffusion_optuna.storage import manage
from autodiffusion_optuna.storage.database import open_storage
def tell(done, total):
    print(done, flush=True)
    time.sleep(60 if done == 3 else 0)
manage.copy_study(open_storage(sys.argv[1]), "quick", "twin", on_copied=tell)
"""


def test_a_copy_that_was_killed_is_no_study_and_can_be_made_again(url: str, folder: Path, adopt: Adopt) -> None:
    run(folder / "quick.toml", url, "search.trials=5")
    copier = subprocess.Popen([sys.executable, "-c", SLOW_COPY, url], stdout=subprocess.PIPE, text=True)
    assert copier.stdout is not None
    while copier.stdout.readline().strip() != "3":
        assert copier.poll() is None
    listed = adopt("studies", "list", "--storage", url).out
    assert "twin" not in listed
    storage = open_storage(url)
    with pytest.raises(AdoptError, match="is being copied by"):
        manage.copy_study(storage, "quick", "twin")
    os.kill(copier.pid, signal.SIGKILL)
    copier.communicate()
    deadline = time.monotonic() + 10
    while "twin" not in study_names(storage) and time.monotonic() < deadline:
        manage.copy_study(storage, "quick", "twin")
    assert study_names(storage) == ["quick", "twin"]
    assert rows(url, "twin") == rows(url, "quick")


def test_an_interrupted_copy_leaves_nothing(folder: Path) -> None:
    run(folder / "quick.toml", "sqlite:///studies.db", "search.trials=5")
    with_pictures("sqlite:///studies.db", "quick", folder / "pictures")
    trials = len(rows("sqlite:///studies.db", "quick"))
    storage = open_storage("sqlite:///studies.db")

    def stop(done: int, total: int) -> None:
        assert total == trials
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        manage.copy_study(storage, "quick", "twin", on_copied=stop)
    assert study_names(storage) == ["quick"]
    assert len(list((folder / "pictures").iterdir())) == 2


def test_the_database_belongs_behind_the_command(folder: Path, adopt: Adopt) -> None:
    result = adopt("studies", "--storage", "a.db", "list")
    assert result.code == 1
    assert "adopt studies list --storage URL" in result.err


@pytest.mark.parametrize(("sure", "code", "left"), [(False, 130, ["quick"]), (True, 0, [])])
def test_on_a_terminal_delete_asks(
    folder: Path, adopt: Adopt, monkeypatch: pytest.MonkeyPatch, sure: bool, code: int, left: list[str]
) -> None:
    run(folder / "quick.toml", "sqlite:///adopt.db", "search.trials=2")

    def answer(question: str, abort: bool) -> None:
        assert "quick with 2 finished trials" in question
        if not sure and abort:
            raise typer.Abort

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(typer, "confirm", answer)
    assert adopt("studies", "delete", "--study", "quick").code == code
    assert study_names(open_storage("sqlite:///adopt.db")) == left

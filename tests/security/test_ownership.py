"""Attack: a `.env`, or a home, that somebody else made, or may write, decides about servers and keys."""

import grp
import json
import os
import pwd
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from dovecote.processes.children import started_at
from dovecote.processes.state_directory import StateDirectory, StateDirectoryError, ensure_private_directory
from dovecote.settings import SettingsError, load_settings
from tests.support.keys import KEYS

ROOT = os.geteuid() == 0
NOBODY = 65_534
EVIL = "DATABASE_URL=postgresql://evil@127.0.0.1:1/x\nREDIS_URL=redis://127.0.0.1:1\n"

needs_root = pytest.mark.skipif(not ROOT, reason="only root can make files of others")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    directory = tmp_path / "place"
    directory.mkdir(mode=0o755)
    return directory


@pytest.fixture
def private_group() -> int:
    """A group that has no member but us, as many systems make one for each user."""
    (gid,) = {os.getgid()}
    others = {entry.pw_uid for entry in pwd.getpwall() if entry.pw_gid == gid} - {os.geteuid()}
    if others or grp.getgrgid(gid).gr_mem:
        pytest.skip("our group has other members on this machine")
    return gid


def dotenv(place: Path, text: str = EVIL) -> Path:
    file = place / ".env"
    file.write_text(text)
    return file


def load(place: Path) -> str:
    return load_settings({"DOVECOTE_HOME": str(place / "home")}, directory=place).database.url.get_secret_value()


def of_nobody(path: Path) -> None:
    os.chown(path, NOBODY, NOBODY, follow_symlinks=False)


def world_writable(place: Path) -> None:
    dotenv(place).chmod(0o666)


def in_a_world_writable_directory(place: Path) -> None:
    dotenv(place)
    place.chmod(0o777)


def in_a_sticky_directory(place: Path) -> None:
    dotenv(place)
    place.chmod(0o1777)


def a_strangers(place: Path) -> None:
    of_nobody(dotenv(place))


def in_a_strangers_directory(place: Path) -> None:
    dotenv(place)
    of_nobody(place)


def writable_for_a_strangers_group(place: Path) -> None:
    file = dotenv(place)
    os.chown(file, -1, NOBODY)
    file.chmod(0o664)


def in_a_directory_of_a_strangers_group(place: Path) -> None:
    dotenv(place)
    os.chown(place, -1, NOBODY)
    place.chmod(0o775)


def a_link_to_a_strangers(place: Path) -> None:
    theirs = place.parent / "theirs"
    theirs.write_text(EVIL)
    of_nobody(theirs)
    (place / ".env").symlink_to(theirs)


def a_link_of_a_stranger_to_ours(place: Path) -> None:
    ours = place.parent / "ours"
    ours.write_text(EVIL)
    (place / ".env").symlink_to(ours)
    of_nobody(place / ".env")


def a_link_into_a_world_writable_directory(place: Path) -> None:
    open_place = place.parent / "open"
    open_place.mkdir()
    open_place.chmod(0o777)
    (open_place / "env").write_text(EVIL)
    (place / ".env").symlink_to(open_place / "env")


FOREIGN = [
    world_writable,
    in_a_world_writable_directory,
    in_a_sticky_directory,
    a_link_into_a_world_writable_directory,
    pytest.param(a_strangers, marks=needs_root),
    pytest.param(in_a_strangers_directory, marks=needs_root),
    pytest.param(writable_for_a_strangers_group, marks=needs_root),
    pytest.param(in_a_directory_of_a_strangers_group, marks=needs_root),
    pytest.param(a_link_to_a_strangers, marks=needs_root),
    pytest.param(a_link_of_a_stranger_to_ours, marks=needs_root),
]


@pytest.mark.parametrize("made", FOREIGN)
def test_an_env_file_that_others_decide_about_is_refused_in_words(place: Path, made: Callable[[Path], None]) -> None:
    made(place)

    with pytest.raises(SettingsError, match=r"\.env is not read, because .*chown, chmod go-w.*remove it"):
        load(place)


def test_an_env_file_of_ours_is_read_also_by_a_link_and_with_a_private_group(place: Path, private_group: int) -> None:
    ours = place / "settings"
    ours.write_text(EVIL)
    (place / ".env").symlink_to(ours)
    os.chown(ours, -1, private_group)
    ours.chmod(0o664)
    place.chmod(0o775)

    assert "evil" in load(place)


def test_a_group_that_an_access_list_opens_is_not_private(place: Path, private_group: int) -> None:
    file = dotenv(place)
    os.chown(file, -1, private_group)
    # version 2; owner rw, the user 65534 rw, group r, mask rw, others r
    entries = [(1, 6, -1), (2, 6, NOBODY), (4, 4, -1), (16, 6, -1), (32, 4, -1)]
    acl = b"".join(struct.pack("<HHI", tag, bits, uid % 2**32) for tag, bits, uid in entries)
    try:
        os.setxattr(file, "system.posix_acl_access", struct.pack("<I", 2) + acl)
    except OSError as error:
        pytest.skip(f"no access lists on this file system: {error}")

    with pytest.raises(SettingsError, match="a group may write"):
        load(place)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "device"])
def test_an_env_file_that_never_ends_does_not_hold_up_the_start(place: Path, make: Callable[[Path], None]) -> None:
    make(place / ".env")

    with pytest.raises(SettingsError, match="is not read, because"):
        load(place)


def test_an_env_file_sets_our_options_and_nothing_else(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = dict(os.environ)
    dotenv(place, f"{EVIL}PGHOST=evil\nPYTHONPATH=/evil\nSSL_CERT_FILE=/evil\nDOVECOTE_HOME=/evil\nPATH=/evil\n")
    StateDirectory(place / "home").create()
    StateDirectory(place / "home").announce(KEYS)

    settings = load_settings({"DOVECOTE_HOME": str(place / "home")}, directory=place)

    assert settings.privacy.hash_key, "the home is the one of the environment"
    assert dict(os.environ) == before


# The home ---------------------------------------------------------------------------------------


@needs_root
@pytest.mark.parametrize("name", ["system.json", "secrets.json"])
def test_a_strangers_home_names_no_servers_and_no_keys(tmp_path: Path, name: str) -> None:
    home = tmp_path / "home"
    home.mkdir()
    content = {"pid": os.getpid(), "started": started_at(os.getpid()), "environment": dict(KEYS)}
    (home / name).write_text(json.dumps(content if name == "system.json" else KEYS))
    read = StateDirectory(home).running if name == "system.json" else StateDirectory(home).secrets
    assert read()
    for path in (home / name, home):
        of_nobody(path)
        with pytest.raises(
            StateDirectoryError, match=r"is not read, because .* belongs to the user nobody: run this as"
        ):
            read()
        os.chown(path, os.geteuid(), -1)

    home.chmod(0o777)
    with pytest.raises(StateDirectoryError, match=r"everybody may write to .*home: run this as"):
        read()


def foreign(home: Path) -> None:
    home.mkdir()
    of_nobody(home)


def open_to_all(home: Path) -> None:
    home.mkdir()
    home.chmod(0o1777)


def open_to_a_group(home: Path) -> None:
    home.mkdir()
    os.chown(home, -1, NOBODY)
    home.chmod(0o770)


def below_a_strangers(home: Path) -> None:
    of_nobody(home.parent)


def below_one_that_is_open_to_all(home: Path) -> None:
    home.parent.chmod(0o777)


def a_strangers_link(home: Path) -> None:
    home.symlink_to(home.parent.parent)
    of_nobody(home)


def a_link_to_nowhere(home: Path) -> None:
    home.symlink_to("/nowhere")


HOMES = [
    foreign,
    open_to_all,
    open_to_a_group,
    below_a_strangers,
    below_one_that_is_open_to_all,
    a_strangers_link,
    a_link_to_nowhere,
]


@needs_root
@pytest.mark.parametrize("made", HOMES)
def test_a_home_that_others_may_write_or_move_is_refused(place: Path, made: Callable[[Path], None]) -> None:
    home = place / "home"
    made(home)

    with pytest.raises(StateDirectoryError):
        ensure_private_directory(home)
    assert not home.is_dir() or [*home.iterdir()] == [] or home.is_symlink()


def test_a_home_in_a_sticky_directory_is_ours(place: Path) -> None:
    if not ROOT:
        pytest.skip("a sticky directory keeps things from each other's users when it is root's")
    place.chmod(0o1777)

    ensure_private_directory(place / "home")

    assert (place / "home").stat().st_uid == os.geteuid()

"""Databases for tests: SQLite files, and a PostgreSQL server of our own in a temporary folder."""

import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

REQUIRE_ALL = os.environ.get("PPO_RLHF_REQUIRE_ALL") == "1"
ACCOUNT = "postgres" if os.geteuid() == 0 else None  # the server refuses to run as root


def missing(what):
    """Skips the test for want of a program, or fails it where nothing may be skipped."""
    if REQUIRE_ALL:
        pytest.fail(f"{what} is not installed, and PPO_RLHF_REQUIRE_ALL=1 lets nothing be skipped")
    pytest.skip(f"{what} is not installed")


def postgres_programs():
    """The folder of initdb and pg_ctl, which Debian keeps off the path."""
    found = shutil.which("initdb")
    folders = [Path(found).parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return folders[-1] if folders else None


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="session")
def postgres(tmp_path_factory):
    """The address of a running server, without a database's name."""
    programs = postgres_programs()
    if programs is None:
        missing("PostgreSQL")
    folder = tmp_path_factory.mktemp("postgres")
    if ACCOUNT:
        for each in [folder, *folder.parents[:3]]:
            each.chmod(0o755)
        shutil.chown(folder, ACCOUNT)
    port = free_port()

    def call(program, *words, check=True):
        subprocess.run([programs / program, *words], check=check, capture_output=True, user=ACCOUNT, cwd=folder)

    cluster = folder / "cluster"
    call("initdb", "-D", cluster, "-U", "tester", "-A", "trust", "--no-sync", "-E", "UTF8")
    settings = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories={folder}"
    call("pg_ctl", "-D", cluster, "-w", "-l", folder / "log", "-o", settings, "start")
    yield f"postgresql://tester@127.0.0.1:{port}"
    call("pg_ctl", "-D", cluster, "-m", "immediate", "stop", check=False)  # it may be gone already


@pytest.fixture(params=["sqlite", "postgresql"])
def address(request, tmp_path):
    """The URL of an empty database, of either kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/preferences.db"
    server = request.getfixturevalue("postgres")
    name = f"test_{os.urandom(6).hex()}"
    engine = create_engine(f"{server}/postgres".replace("://", "+psycopg://"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return f"{server}/{name}"

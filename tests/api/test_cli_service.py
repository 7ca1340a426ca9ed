"""The service's commands in this process: keys, db, runs, rerun, backup, prune, and what they refuse."""

from __future__ import annotations

import json
import socket
import threading
import time
from pathlib import Path
from typing import Any, cast

import pytest

from api import cli_service
from api.cli import main
from api.cli_service import Files
from api.client import Client, ServiceError
from api.keys import fits, split_key
from api.store import Store, open_store
from hardware import InputError
from tests.api.conftest import Captured, error_of
from tests.api.store_conformance import claimed, new_run


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The user's own database, in a folder of the test."""
    monkeypatch.setenv("PLANFRONT_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.delenv("PLANFRONT_SERVER", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    found = open_store(f"sqlite:///{tmp_path}/data/planfront.db")
    found.close()
    return found


def test_a_key_is_shown_once_and_can_be_revoked(store: Store, capsys: Captured) -> None:
    assert main(["keys", "create", "--role", "viewer", "--name", "t", "--days", "1"]) == 0
    out, err = capsys.readouterr()
    parts = split_key(out.strip())
    assert parts is not None
    assert "not shown again" in err
    assert "needs a key from now on" in err, "the first key closes what was open"
    record = store.key(parts[0])
    assert record is not None
    assert record.role == "viewer"
    assert fits(parts[1], record, time.time())
    assert not fits(parts[1], record, time.time() + 86_401)
    assert main(["keys", "list", "--json"]) == 0
    listed = capsys.readouterr().out
    assert [row["state"] for row in json.loads(listed)] == ["active"]
    assert parts[1] not in listed
    assert main(["keys", "revoke", parts[0]]) == 0
    capsys.readouterr()
    assert main(["keys", "revoke", parts[0]]) == 2
    assert "no active key" in error_of(capsys)
    assert main(["keys", "create"]) == 0
    assert "from now on" not in capsys.readouterr().err
    assert main(["keys", "list"]) == 0
    assert "revoked" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["keys", "revoke"], "needs the ID"),
        (["keys", "create", "x"], "nothing else takes one"),
        (["keys", "create", "--days", "0"], "--days"),
        (["keys", "create", "--name", "x" * 101], "--name"),
        (["serve", "--port", "70000"], "--port"),
        (["serve", "--workers", "-1"], "--workers"),
        (["serve", "--host", "0.0.0.0"], "there are no API keys"),
        (["runs", "--cancel"], "name the run"),
        (["runs", "0" * 28], "there is no run"),
        (["runs", "--server", "nonsense"], "--server"),
        (["rerun", "x"], "there is no run"),
        (["prune", "--older-than", "-1"], "--older-than"),
        (["backup", "data"], "exists already"),
        (["backup", "no/where.db"], "folder does not exist"),
        (["db", "check", "--database-url", "mysql://a/b"], "SQLite and PostgreSQL"),
    ],
)
def test_what_is_refused_in_one_sentence(
    store: Store, capsys: Captured, arguments: list[str], words: str
) -> None:
    assert main(arguments) == 2
    assert words in error_of(capsys)


def test_db(store: Store, capsys: Captured, tmp_path: Path) -> None:
    assert main(["db", "check"]) == 0
    store.database.downgrade("0001")
    capsys.readouterr()
    assert main(["db", "check"]) == 2
    assert "planfront db upgrade" in error_of(capsys)
    assert main(["db", "upgrade"]) == 0
    assert main(["db", "check"]) == 0
    capsys.readouterr()
    store.database.downgrade("0001")
    assert main(["worker"]) == 2, "a worker changes no schema"
    assert "planfront db upgrade" in error_of(capsys)


def test_runs_backup_and_prune(store: Store, capsys: Captured, tmp_path: Path) -> None:
    ids = [store.submit(new_run(label="x"))[0] for _ in range(2)]
    assert main(["runs", "--label", "x"]) == 0
    out = capsys.readouterr().out
    assert all(run_id in out for run_id in ids)
    assert main(["runs", ids[0], "--cancel"]) == 3
    assert "cancelled" in capsys.readouterr().out
    claim = claimed(store)
    assert main(["runs", claim.run_id, "--json", "--wait", "0"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "running"
    assert main(["runs", claim.run_id, "--result", "-"]) == 2
    assert "has no result" in error_of(capsys)
    assert main(["backup", "copy.db"]) == 0
    assert (tmp_path / "copy.db").exists()
    capsys.readouterr()
    assert main(["prune", "--older-than", "0"]) == 0
    assert capsys.readouterr().out == "1 runs deleted\n"
    assert main(["runs", "--json", "--status", "queued"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_a_refusal_before_the_body_was_read_is_told() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    body = b'{"status": 413, "detail": "A body holds at most 9 bytes.", "errors": []}'
    head = b"HTTP/1.1 413 Content Too Large\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body)

    def refuse() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(100)
            connection.sendall(head + body)
            connection.shutdown(socket.SHUT_WR)
            time.sleep(0.5)  # what was sent can be read before the rest of the body ends the connection

    thread = threading.Thread(target=refuse, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with Client(address) as client, pytest.raises(ServiceError, match="at most 9 bytes"):
        client.upload(bytes(30_000_000))
    thread.join()
    listener.close()


def test_every_command_of_the_service_has_a_function() -> None:
    from api.cli import SERVICE

    for name in SERVICE:
        assert callable(getattr(cli_service, name))


# --- files that a request names ----------------------------------------------------------------------


class _Receiver:
    """Takes traces as the service does, and keeps how each was sent."""

    def __init__(self) -> None:
        self.sent: list[str] = []

    def upload(self, content: bytes, name: str = "", *, on_bad_row: str = "refuse") -> dict[str, Any]:
        self.sent.append(on_bad_row)
        if on_bad_row == "refuse":
            errors = [{"path": "", "message": "the trace has 1 bad row"}]
            raise ServiceError(422, {"detail": "the trace has 1 bad row", "errors": errors})
        return {"path": f"upload:{len(self.sent)}"}


def test_a_trace_is_sent_with_what_is_done_about_its_bad_rows(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("anything")
    receiver = _Receiver()
    files = Files(cast(Client, receiver), tmp_path)
    trace = {"path": "t.csv", "on_bad_row": "skip"}
    for _ in range(2):
        found = files.in_request({"model": "m", "workload": {"trace": trace}})
        assert found["workload"]["trace"] == {"path": "upload:1", "on_bad_row": "skip"}
    assert receiver.sent == ["skip"], "the same file is sent once"
    with pytest.raises(InputError, match=r"^workload\.trace\.path: the trace has 1 bad row"):
        files.in_request({"model": "m", "workload": {"trace": {"path": "t.csv"}}})

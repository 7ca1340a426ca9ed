"""What every database of the store keeps to; `test_store.py` runs it over SQLite and PostgreSQL."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from api.keys import fits, make_key, split_key
from api.lifecycle import ENDS, TRANSITIONS, Status
from api.store import (
    Claim,
    Filters,
    IdempotencyConflict,
    NewRun,
    QuotaReached,
    Signal,
    Store,
    UploadRecord,
    is_id,
    new_id,
)

LEASE_S = 30.0


def new_run(owner: str = "ann", **changes: Any) -> NewRun:
    values: dict[str, Any] = {
        "owner": owner,
        "request": '{"search":{"budget_s":1.0},"text":"é\\u0000"}',
        "model": "llama-3.1-8b",
        "devices": ("h100-sxm-80gb", "l4"),
        "engine": "vllm",
        "seed": 2**63 - 1,
        "versions": "{}",
    }
    return NewRun(**{**values, **changes})


def claimed(store: Store, worker: str = "w1", **options: Any) -> Claim:
    found = store.claim(worker, lease_s=options.pop("lease_s", LEASE_S), **options)
    assert found is not None
    return found


def status(store: Store, run_id: str) -> str:
    found = store.run(run_id)
    assert found is not None
    return str(found["status"])


def kinds(store: Store, run_id: str) -> list[str]:
    return [event["kind"] for event in store.events(run_id, 0)]


class StoreConformance:
    """Inherit, and give a `store` fixture."""

    # --- asking and reading -----------------------------------------------------------------------

    def test_a_run_comes_back_as_it_went_in(self, store: Store) -> None:
        run_id, fresh = store.submit(new_run(label="a", notes="b"))
        assert fresh
        assert is_id(run_id)
        found = store.run(run_id)
        assert found is not None
        assert found["request"] == new_run().request
        assert (found["label"], found["notes"], found["seed"]) == ("a", "b", 2**63 - 1)
        assert (found["status"], found["version"], found["attempt"]) == ("queued", 1, 0)
        assert found["cancel_requested"] is False
        assert "webhook_secret" not in found
        assert kinds(store, run_id) == ["status"]
        assert store.run(new_id()) is None

    def test_the_same_key_and_body_is_the_same_run(self, store: Store) -> None:
        first, fresh = store.submit(new_run(), idempotency_key="k", body_sha256="1")
        again = store.submit(new_run(), idempotency_key="k", body_sha256="1")
        assert fresh
        assert again == (first, False)
        with pytest.raises(IdempotencyConflict):
            store.submit(new_run(), idempotency_key="k", body_sha256="2")
        other, _ = store.submit(new_run("bob"), idempotency_key="k", body_sha256="2")
        assert other != first
        assert len(store.runs(Filters())) == 2

    def test_many_clients_with_one_key_make_one_run(self, store: Store) -> None:
        start = threading.Barrier(8)

        def ask(_: int) -> str:
            start.wait()
            return store.submit(new_run(), idempotency_key="k", body_sha256="1")[0]

        with ThreadPoolExecutor(8) as pool:
            assert len(set(pool.map(ask, range(8)))) == 1
        assert len(store.runs(Filters())) == 1

    def test_an_owner_may_have_only_so_many_waiting(self, store: Store) -> None:
        for _ in range(2):
            store.submit(new_run(), most_waiting=2)
        with pytest.raises(QuotaReached):
            store.submit(new_run(), idempotency_key="k", body_sha256="1", most_waiting=2)
        store.submit(new_run("bob"), most_waiting=2)
        claimed(store)
        # The key of the refused call was not used up.
        assert store.submit(new_run(), idempotency_key="k", body_sha256="2", most_waiting=2)[1]

    def test_pages_and_filters(self, store: Store) -> None:
        ids = [
            store.submit(new_run(label=f"l{n % 2}", devices=("l4",) if n % 2 else ("t4",)))[0]
            for n in range(6)
        ]
        newest = sorted(ids, reverse=True)
        assert [row["id"] for row in store.runs(Filters())] == newest
        page = store.runs(Filters(), limit=4)
        rest = store.runs(Filters(), before=page[-1]["id"])
        assert [row["id"] for row in page + rest] == newest
        assert "request" not in page[0]
        assert len(store.runs(Filters(label="l1"))) == 3
        assert len(store.runs(Filters(device="l4"))) == 3
        assert store.runs(Filters(device="4")) == []
        assert store.runs(Filters(device="l_")) == []
        assert len(store.runs(Filters(model="llama-3.1-8b"))) == 6
        assert store.runs(Filters(owner="bob")) == []
        claimed(store)
        assert len(store.runs(Filters(status=("queued",)))) == 5
        assert len(store.runs(Filters(status=("queued", "running")))) == 6
        middle = page[2]["created_at"]
        after = store.runs(Filters(created_after=middle))
        before = store.runs(Filters(created_before=middle))
        assert all(row["created_at"] > middle for row in after)
        assert all(row["created_at"] < middle for row in before)

    def test_annotating_makes_a_version(self, store: Store) -> None:
        run_id, _ = store.submit(new_run())
        assert store.annotate(run_id, {"label": "x"}, expected_version=1)
        assert not store.annotate(run_id, {"label": "y"}, expected_version=1)
        assert store.annotate(run_id, {"notes": "n"})
        found = store.run(run_id)
        assert found is not None
        assert (found["label"], found["notes"], found["version"]) == ("x", "n", 3)
        assert not store.annotate(new_id(), {"label": "y"})

    # --- the queue --------------------------------------------------------------------------------

    def test_a_claim_is_one_workers_alone(self, store: Store) -> None:
        run_id, _ = store.submit(new_run())
        assert store.waiting()
        claim = claimed(store)
        assert (claim.run_id, claim.attempt, claim.checkpoint) == (run_id, 1, ())
        assert claim.request == new_run().request
        assert not store.waiting()
        assert store.claim("w2", lease_s=LEASE_S) is None
        assert status(store, run_id) == "running"

    def test_every_run_is_claimed_once_by_many_workers(self, store: Store) -> None:
        ids = {store.submit(new_run())[0] for _ in range(24)}
        found: list[str] = []

        def take(worker: int) -> None:
            while (claim := store.claim(f"w{worker}", lease_s=LEASE_S)) is not None:
                found.append(claim.run_id)
                store.finish(claim, Status.DONE, result=b"x", result_sha256="0")

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(take, range(4)))
        # A worker may see an empty queue while another holds the last row; none may see a row twice.
        take(9)
        assert len(found) == 24
        assert set(found) == ids

    def test_owners_take_turns(self, store: Store) -> None:
        for _ in range(5):
            store.submit(new_run("ann"))
        for _ in range(2):
            store.submit(new_run("bob"))
        owners = [claimed(store).owner for _ in range(7)]
        assert owners[:4].count("bob") == 2
        store.submit(new_run("ann"))
        store.submit(new_run("ann"))
        store.submit(new_run("cat"))
        assert "cat" in [claimed(store).owner for _ in range(2)]

    def test_an_owner_runs_only_so_many_at_once(self, store: Store) -> None:
        for _ in range(3):
            store.submit(new_run("ann"))
        store.submit(new_run("bob"))
        owners = [claimed(store, most_running=1).owner for _ in range(2)]
        assert sorted(owners) == ["ann", "bob"]
        assert store.claim("w", lease_s=LEASE_S, most_running=1) is None
        assert claimed(store, most_running=2).owner == "ann"

    def test_heartbeats_hold_a_run_and_tell_of_it(self, store: Store) -> None:
        run_id, _ = store.submit(new_run())
        claim = claimed(store, lease_s=0.2)
        events: list[tuple[str, Any]] = [
            ("progress", {"n": 1}),
            ("incumbents", {"p": []}),
            ("progress", {"n": 2}),
        ]
        assert store.heartbeat(claim, lease_s=LEASE_S, events=events) is Signal.GO_ON
        time.sleep(0.25)
        assert store.expire(most_losses=3) == 0
        found = store.run(run_id)
        assert found is not None
        assert json.loads(found["progress"]) == {"n": 2}
        told = store.events(run_id, 2)
        assert [(event["seq"], event["kind"]) for event in told] == [
            (3, "progress"), (4, "incumbents"), (5, "progress")
        ]  # fmt: skip
        assert found["version"] == 5
        assert store.versions([run_id]) == {run_id: (5, "running")}

    def test_an_expired_lease_interrupts_and_another_worker_resumes(self, store: Store) -> None:
        run_id, _ = store.submit(new_run())
        old = claimed(store, "w1", lease_s=0.01)
        assert store.add_checkpoint(old, 0, b"part 0")
        assert store.add_checkpoint(old, 1, b"part 1")
        time.sleep(0.05)
        assert store.expire(most_losses=3) == 1
        assert status(store, run_id) == "interrupted"
        new = claimed(store, "w2")
        assert (new.run_id, new.attempt, new.checkpoint) == (run_id, 2, (b"part 0", b"part 1"))
        # Whoever was slow changes nothing any more.
        assert store.heartbeat(old, lease_s=LEASE_S) is Signal.LOST
        assert not store.add_checkpoint(old, 2, b"late")
        assert not store.finish(old, Status.DONE, result=b"late", result_sha256="late")
        assert not store.give_back(old, "late")
        assert store.result(run_id) is None
        assert store.finish(new, Status.DONE, result=b"good", result_sha256="good")
        assert store.result(run_id) == (b"good", "good")
        assert kinds(store, run_id)[-1] == "end"
        assert kinds(store, run_id).count("end") == 1

    def test_the_same_worker_with_an_old_attempt_is_refused(self, store: Store) -> None:
        store.submit(new_run())
        old = claimed(store, "w1", lease_s=0.01)
        time.sleep(0.05)
        store.expire(most_losses=3)
        new = claimed(store, "w1")
        assert not store.finish(old, Status.DONE, result=b"x", result_sha256="0")
        assert store.finish(new, Status.DONE, result=b"x", result_sha256="0")

    def test_one_result_whoever_races(self, store: Store) -> None:
        run_id, _ = store.submit(new_run())
        claim = claimed(store)
        start = threading.Barrier(6)

        def end(n: int) -> bool:
            start.wait()
            return store.finish(claim, Status.DONE, result=b"%d" % n, result_sha256=str(n))

        with ThreadPoolExecutor(6) as pool:
            assert sum(pool.map(end, range(6))) == 1
        assert store.result(run_id) is not None

    def test_what_keeps_killing_workers_is_failed(self, store: Store) -> None:
        run_id, _ = store.submit(new_run())
        for _ in range(2):
            claim = store.claim("w", lease_s=0.01)
            if claim is None:  # the pause after a crash
                time.sleep(1.05)
                claim = claimed(store, lease_s=0.01)
            time.sleep(0.05)
            store.expire(most_losses=2)
        found = store.run(run_id)
        assert found is not None
        assert found["status"] == "failed"
        assert json.loads(found["error"])["kind"] == "lost"
        assert store.claim("w", lease_s=1) is None

    def test_a_run_that_is_given_back_is_taken_at_once(self, store: Store) -> None:
        run_id, _ = store.submit(new_run())
        assert store.give_back(claimed(store), "shut down")
        found = store.run(run_id)
        assert found is not None
        assert (found["status"], found["crashes"]) == ("interrupted", 0)
        assert claimed(store).attempt == 2

    def test_a_lost_search_process_counts_as_a_crash(self, store: Store) -> None:
        run_id, _ = store.submit(new_run())
        assert store.give_back(claimed(store), "lost", crashed=True, most_crashes=2)
        assert store.give_back(claimed(store), "lost", crashed=True, most_crashes=2)
        assert status(store, run_id) == "failed"

    def test_vanished_workers_do_not_use_up_what_crashes_may(self, store: Store) -> None:
        """A worker that is killed from outside says little of its run."""
        run_id, _ = store.submit(new_run())
        claim = claimed(store, lease_s=0.01)
        time.sleep(0.05)
        assert store.expire(most_losses=3) == 1
        assert store.give_back(claimed(store), "lost", crashed=True, most_crashes=2)
        assert status(store, run_id) == "interrupted"
        # A new part of the work wipes out both.
        claim = claimed(store)
        assert store.add_checkpoint(claim, 0, b"x")
        found = store.run(run_id)
        assert found is not None
        assert found["crashes"] == 0

    def test_a_run_that_gets_further_is_no_killer(self, store: Store) -> None:
        run_id, _ = store.submit(new_run())
        for part in range(3):
            claim = claimed(store)
            assert store.add_checkpoint(claim, part, b"x")
            assert store.give_back(claim, "lost", crashed=True, most_crashes=2)
        assert status(store, run_id) == "interrupted"

    # --- ends -------------------------------------------------------------------------------------

    @pytest.mark.parametrize("end", [Status.DONE, Status.INFEASIBLE, Status.FAILED, Status.CANCELLED])
    def test_an_end_is_for_ever(self, store: Store, end: Status) -> None:
        run_id, _ = store.submit(new_run())
        claim = claimed(store)
        assert store.finish(claim, end, summary={"a": 1}, error={"kind": "x"}, result_digest="d")
        before = store.run(run_id)
        assert not store.cancel(run_id)
        assert not store.finish(claim, Status.DONE)
        assert not store.give_back(claim, "late")
        assert store.run(run_id) == before
        assert before is not None
        assert (before["status"], before["result_digest"]) == (end, "d")
        assert store.counts() == {end: 1}

    def test_cancel_while_it_waits(self, store: Store) -> None:
        run_id, _ = store.submit(new_run())
        assert store.cancel(run_id)
        assert not store.cancel(run_id)
        assert status(store, run_id) == "cancelled"
        assert kinds(store, run_id) == ["status", "end"]
        assert store.claim("w", lease_s=1) is None
        assert not store.cancel(new_id())

    def test_cancel_while_it_runs_is_asked_once_and_heard(self, store: Store) -> None:
        run_id, _ = store.submit(new_run())
        claim = claimed(store)
        assert store.cancel(run_id)
        assert store.cancel(run_id)
        assert status(store, run_id) == "running"
        assert store.heartbeat(claim, lease_s=LEASE_S) is Signal.CANCEL
        assert store.finish(claim, Status.CANCELLED, result=b"x", result_sha256="0")
        assert kinds(store, run_id).count("end") == 1

    @pytest.mark.parametrize("how", ["expire", "give back"])
    def test_a_cancelled_run_is_not_taken_up_again(self, store: Store, how: str) -> None:
        run_id, _ = store.submit(new_run())
        claim = claimed(store, lease_s=0.01)
        store.cancel(run_id)
        if how == "expire":
            time.sleep(0.05)
            assert store.expire(most_losses=3) == 1
        else:
            assert store.give_back(claim, "shut down")
        assert status(store, run_id) == "cancelled"

    def test_checkpoints_go_with_the_end(self, store: Store) -> None:
        store.submit(new_run())
        claim = claimed(store)
        store.add_checkpoint(claim, 0, b"x")
        assert store.finish(claim, Status.DONE)
        from sqlalchemy import text

        with store.database.read() as connection:
            assert connection.scalar(text("SELECT count(*) FROM checkpoint")) == 0

    def test_totals_count_ends_and_simulations(self, store: Store) -> None:
        for end in (Status.DONE, Status.DONE, Status.FAILED):
            store.submit(new_run())
            store.finish(claimed(store), end, simulations=5)
        totals = store.tallies()
        assert (totals["runs:done"], totals["runs:failed"], totals["simulations"]) == (2, 1, 15)
        assert totals["run_seconds_count"] == 3
        assert totals["run_seconds_bucket:1800"] == 3

    # --- webhooks ---------------------------------------------------------------------------------

    def test_an_end_is_delivered_until_it_was_taken(self, store: Store) -> None:
        url, secret = "https://example.org/hook", "s" * 16
        run_id, _ = store.submit(new_run(webhook_url=url, webhook_secret=secret))
        assert store.take_delivery() is None
        store.finish(claimed(store), Status.DONE)
        taken = store.take_delivery()
        assert taken is not None
        assert (taken.url, taken.secret, taken.attempts) == (url, secret, 1)
        body = json.loads(taken.body)
        assert (body["type"], body["run_id"], body["status"]) == ("run.ended", run_id, "done")
        assert store.take_delivery() is None, "its pause is not over"
        store.end_delivery(taken, "answered 500")
        assert store.deliveries(run_id)[0]["last_error"] == "answered 500"
        store.end_delivery(taken, None)
        assert [row["status"] for row in store.deliveries(run_id)] == ["delivered"]

    def test_a_delivery_is_taken_by_one_sender(self, store: Store) -> None:
        run_id, _ = store.submit(new_run(webhook_url="https://example.org/"))
        store.cancel(run_id)
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: store.take_delivery(), range(4)))
        assert sum(taken is not None for taken in found) == 1

    # --- keys, uploads, workers -------------------------------------------------------------------

    def test_keys(self, store: Store) -> None:
        assert not store.has_keys()
        text, record = make_key("nightly", "planner", expires_in_s=60)
        store.add_key(record)
        assert store.has_keys()
        assert store.key(record.id) == record
        parts = split_key(text)
        assert parts is not None
        assert fits(parts[1], store.key(parts[0]), time.time())
        assert not fits(parts[1], store.key(parts[0]), time.time() + 61)
        assert not fits(parts[1][:-1] + "x", store.key(parts[0]), time.time()) or parts[1].endswith("x")
        assert text.split("_", 2)[2] not in json.dumps([str(key) for key in store.all_keys()])
        assert store.revoke_key(record.id)
        assert not store.revoke_key(record.id)
        assert not fits(parts[1], store.key(parts[0]), time.time())
        assert store.has_keys(), "revoking the last key opens nothing"

    def test_uploads(self, store: Store) -> None:
        record = UploadRecord(new_id(), "ann", "t", "apex", 5, 2, "0" * 64, "{}", time.time())
        store.add_upload(record, iter([b"abc", b"de"]))
        assert store.upload(record.id) == record
        assert b"".join(store.upload_content(record.id)) == b"abcde"
        assert store.uploads() == [record]
        assert store.uploads(before=record.id) == []
        assert (store.uploaded_bytes("ann"), store.uploaded_bytes("bob")) == (5, 0)
        assert store.delete_upload(record.id)
        assert not store.delete_upload(record.id)
        assert list(store.upload_content(record.id)) == []

    def test_workers_come_and_go(self, store: Store) -> None:
        store.see_worker("w1", host="h", pid=1, version="1")
        store.see_worker("w1", host="h", pid=1, version="1")
        assert [row["id"] for row in store.workers()] == ["w1"]
        store.forget_worker("w1")
        assert store.workers() == []
        store.ping()

    def test_prune_deletes_ended_runs_with_all_they_have(self, store: Store) -> None:
        ids = [
            store.submit(new_run(), idempotency_key=f"k{number}", body_sha256="1")[0] for number in range(3)
        ]
        upload = UploadRecord(new_id(), "ann", "t", "apex", 1, 1, "0" * 64, "{}", time.time() - 100)
        named = UploadRecord(new_id(), "ann", "t", "apex", 1, 1, "0" * 64, "{}", time.time() - 100)
        for record in (upload, named):
            store.add_upload(record, iter([b"a"]))
        store.submit(new_run("zoe", request=json.dumps({"path": f"upload:{named.id}"})))
        done = claimed(store)
        store.finish(done, Status.DONE, result=b"x", result_sha256="0")
        assert store.prune(time.time() - 50) == 0
        assert store.prune(time.time() + 1) == 1
        assert store.run(done.run_id) is None
        assert store.result(done.run_id) is None
        assert store.events(done.run_id, 0) == []
        assert len(store.runs(Filters())) == 3
        assert store.upload(upload.id) is None
        assert store.upload(named.id) is not None
        # The key of a run that is gone makes a new one.
        assert store.submit(new_run(), idempotency_key=f"k{ids.index(done.run_id)}", body_sha256="9")[1]

    # --- the model --------------------------------------------------------------------------------

    def test_random_walks_keep_to_the_lifecycle(self, store: Store) -> None:
        """Workers and clients at random: every step that is told is one of the drawing."""
        import random

        rng = random.Random(7)
        ids = [store.submit(new_run(rng.choice("abc")))[0] for _ in range(12)]
        held: list[Claim] = []
        for _ in range(120):
            steps: list[Callable[[], Any]] = [
                lambda: held.append(c) if (c := store.claim(f"w{rng.random()}", lease_s=0.02)) else None,
                lambda: store.expire(most_losses=3),
                lambda: store.cancel(rng.choice(ids)) if rng.random() < 0.2 else None,
                lambda: store.heartbeat(rng.choice(held), lease_s=0.02) if held else None,
                lambda: (
                    store.finish(rng.choice(held), rng.choice(list(TRANSITIONS[Status.RUNNING] & ENDS)))
                    if held
                    else None
                ),
                lambda: store.give_back(rng.choice(held), "x") if held else None,
            ]
            rng.choice(steps)()
        for run_id in ids:
            events = store.events(run_id, 0, limit=1000)
            assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
            before: Status | None = None
            for event in events:
                if event["kind"] not in ("status", "end"):
                    continue
                now = Status(json.loads(event["data"])["status"])
                assert before is None or now is before or now in TRANSITIONS[before]
                before = now
            assert before == status(store, run_id)
            assert sum(event["kind"] == "end" for event in events) == (before in ENDS)

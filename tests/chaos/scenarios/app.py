"""The page is killed with a job running, and started again: the job goes on and belongs to the new page's worker."""

from __future__ import annotations

from tests.chaos.arena import Arena

APP = ("-m", "app", "--port", "0", "--device", "cpu", "--data-dir")
READY = "is ready"


def run(arena: Arena) -> None:
    """A long job under the app: kill the app, start it again, then kill the child to see who looks after it."""
    arena.command, arena.ready = APP, READY  # the app is this arena's worker
    arena.start_worker()
    job = arena.add(arena.kinds[0], steps=5000)
    arena.wait_steps(job, 3)
    record, pid = arena.store.get(job), arena.pid(job)
    arena.kill_worker()
    arena.struck("app", "step", job)
    arena.start_worker()
    after = arena.store.get(job)
    check = arena.findings.check
    check(after.state == "running" and arena.pid(job) == pid, "the app's restart did not leave the job's process alone")
    check(after.step > record.step, "the job stood still while the app was away")
    same = (record.config, record.title, record.created, record.started)
    check(same == (after.config, after.title, after.created, after.started), "the job's record changed")
    states = [event.data["state"] for event in arena.events(job, "state")]
    check(states == ["queued", "running"], f"the job's states are {states}")
    arena.say(f"the app is back; the job went on from step {record.step} to {after.step}")
    arena.kill_child(job)
    arena.struck("child", "step", job)
    arena.wait_steps(job, 1, start=2)
    arena.store.request_cancel(job)
    check(arena.finish(job).state == "cancelled", "the job could not be cancelled under the new app")

"""Jobs: one for each driver. The part of ``GcsState`` that starts and ends them.

JOB-1 (once): a job's number is given once, also across restarts of the GCS.
JOB-2 (ended): a job ends by FinishJob or with its driver; with it end its actors and groups, but not the detached ones.
"""

from __future__ import annotations

from typing import Any

import msgspec

from hpc_ray.gcs.part import Part
from hpc_ray.ids import JobID
from hpc_ray.machine import handles
from hpc_ray.protocol import FinishJob, JobFinished, JobRegistered, RegisterJob

MAX_ENDED_JOBS = 10_000


class Job(msgspec.Struct):
    """As journalled."""

    job_id: bytes
    driver: int
    pid: int
    entrypoint: str
    namespace: str
    config: dict[str, Any]
    start_time: float  # seconds of the epoch
    end_time: float = 0.0  # 0 while it runs
    reason: str = ""


class Jobs(Part):
    """See the module's text."""

    def init_jobs(self) -> None:
        self.jobs: dict[bytes, Job] = {}
        self._next_job = 1

    @handles(RegisterJob)
    def on_register_job(self, event: RegisterJob, source: int) -> None:
        job_id = JobID.from_int(self._next_job).binary()
        self._next_job += 1
        job = Job(
            job_id,
            event.driver,
            event.pid,
            event.entrypoint,
            event.namespace,
            event.config,
            self.now + self.epoch_offset,
        )
        self.jobs[job_id] = job
        self.journal("meta", b"next_job", str(self._next_job).encode())
        self.journal("job", job_id, job)
        self.send(source, JobRegistered(event.request_id, job_id))

    @handles(FinishJob)
    def on_finish_job(self, event: FinishJob, source: int) -> None:
        job = self.jobs.get(event.job_id)
        if job is not None:
            self.finish_job(job, "finished")

    def finish_job(self, job: Job, reason: str) -> None:
        if job.end_time:
            return
        job.end_time = self.now + self.epoch_offset
        job.reason = reason
        self.journal("job", job.job_id, job)
        self.tell_raylets(JobFinished(job.job_id, job.driver))
        self.end_actors_of_job(job.job_id)
        self.remove_groups_of_job(job.job_id)
        ended = [other for other in self.jobs.values() if other.end_time]
        if len(ended) > MAX_ENDED_JOBS:
            del self.jobs[ended[0].job_id]
            self.journal("job", ended[0].job_id, None)

    def finish_jobs_where(self, gone: Any, reason: str) -> None:
        for job in list(self.jobs.values()):
            if not job.end_time and gone(job.driver):
                self.finish_job(job, reason)

    def query_job_config(self, job_id: bytes) -> dict[str, Any]:
        """What its driver said; {} for a job that is not known."""
        job = self.jobs.get(job_id)
        return job.config if job is not None else {}

    def query_list_jobs(self) -> list[dict[str, Any]]:
        return [
            {
                "job_id": job.job_id,
                "driver": job.driver,
                "pid": job.pid,
                "entrypoint": job.entrypoint,
                "namespace": job.namespace,
                "state": "FINISHED" if job.end_time else "RUNNING",
                "start_time": job.start_time,
                "end_time": job.end_time,
                "reason": job.reason,
                "config": job.config,
            }
            for job in self.jobs.values()
        ]

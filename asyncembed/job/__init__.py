"""A job: source → admission → look-up → engine → store → results, in one task group."""

from asyncembed.job.job import Job, JobParts
from asyncembed.job.loading import load_chunker, run_fingerprint
from asyncembed.job.lookup import Entry

__all__ = ["Entry", "Job", "JobParts", "load_chunker", "run_fingerprint"]

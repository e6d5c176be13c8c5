"""A job: source → admission → look-up → engine → store → results, in one task group."""

from asyncembed.job.job import Job, JobParts
from asyncembed.job.loading import load_chunker, run_fingerprint
from asyncembed.job.lookup import Pending

__all__ = ["Job", "JobParts", "Pending", "load_chunker", "run_fingerprint"]

"""A job: source → admission → look-up → engine → store → results, in one task group."""

from asyncembed.job.job import Job, JobParts

__all__ = ["Job", "JobParts"]

"""`--dry-run`: what a run would have to do, and whether it fits; nothing is written."""

from asyncembed.cli.dry_run.rehearsal import dry_run

__all__ = ["dry_run"]

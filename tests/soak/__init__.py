"""Storms: the promises of reliability, held for longer than the suite has time for. `bin/soak` runs them."""

"""What verl imports of its own accord (entry point `verl.plugins`): makes `trainer_mode=dvpo` known.

verl hides an error in here at the level DEBUG; `python -m dvpo.integrations.verl.check` shows it.
"""

from dvpo.integrations.verl import trainer  # noqa: F401  (importing it registers the trainer)

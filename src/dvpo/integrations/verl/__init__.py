"""DVPO inside verl: its critic, its critic's loss and targets, on many machines. No mathematics of its own.

verl keeps what is verl's: rollouts, rewards, the actor, GAE of the critic's value. `docs/verl.md` says how to run it.
"""

"""The method as mathematics: pure tensor functions that import torch and nothing of ours outside this folder."""

"""Shared by all tests: one thread, because tiny models on shared machines run faster so."""

import torch

torch.set_num_threads(1)

"""Hides all GPUs from a process of the tests: deepspeed and Slurm set the variable anew for those that they start."""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""

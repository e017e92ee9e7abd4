# Settings of a cluster. Each job script, and pipeline.sh, reads this file in the repository's folder.
# Partition, account, nodes and time are set by options of sbatch, or by SBATCH_PARTITION, SBATCH_ACCOUNT, ...
# shellcheck shell=bash disable=SC2034

# Programs: `module load ...` goes here. The environment that `make` builds comes first, if it exists.
PATH=$PWD/.venv/bin:$PATH

# A prefix of each command; for slurm/mixar.def: (apptainer exec --nv --bind /data mixar.sif)
CONTAINER=()

# The network between nodes, if NCCL does not find it: export NCCL_SOCKET_IFNAME=... NCCL_IB_HCA=...

# The total number of restarts after time limits, pre-emptions, lost nodes and crashes.
MAX_RESTARTS=${MAX_RESTARTS:-20}

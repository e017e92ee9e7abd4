# What differs between clusters. Each job script, and pipeline.sh, reads this file from the repository's folder.
# Partition, account, nodes and time are sbatch's: options on its command line, or SBATCH_PARTITION, SBATCH_ACCOUNT, ...
# shellcheck shell=bash disable=SC2034

# Programs: `module load ...` goes here. The environment that `make` builds comes first where there is one.
PATH=$PWD/.venv/bin:$PATH

# What stands before each command; for slurm/mixar.def: (apptainer exec --nv --bind /data mixar.sif)
CONTAINER=()

# The network between nodes, where NCCL doesn't find it: export NCCL_SOCKET_IFNAME=... NCCL_IB_HCA=...

# Starts again after a time limit, a pre-emption, a lost node or a crash, altogether.
MAX_RESTARTS=${MAX_RESTARTS:-20}

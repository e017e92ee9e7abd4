#!/usr/bin/env bash
# A real Slurm cluster of virtual nodes on one machine, for the tests: munged, slurmctld, and a slurmd for each node.
#
#   cluster.sh up [NODES]       start it, wait until every node is idle
#   cluster.sh run COMMAND ...  run sbatch, scontrol, ... against it
#   cluster.sh kill-node NODE   cut a node's power: slurmd and all that runs there are gone at once
#   cluster.sh start-node NODE  power it on again
#   cluster.sh down             stop everything and remove the state
#
# CLUSTER_DIR is the folder of its state: a short path without blanks and commas. Where namespaces can be had (root with
# CAP_SYS_ADMIN), the cluster lives in a set of its own and each node in another within: real host names and addresses,
# no traces on the machine, and killing one process kills all. Elsewhere, or with CLUSTER_NET=shared, the nodes are
# daemons on ports of this host, and their names stand in /etc/hosts while it is up.
set -euo pipefail

DIR=${CLUSTER_DIR:-/tmp/mixar-cluster}
SELF=$(readlink -f "${BASH_SOURCE[0]}")
export SLURM_CONF=$DIR/slurm.conf
NODES=$(cat "$DIR/nodes" 2>/dev/null || true)
NET=$(cat "$DIR/net" 2>/dev/null || true)

die() { echo "cluster.sh: $*" >&2; exit 1; }

namespaces() { unshare --net --uts --mount --pid --fork --kill-child --mount-proc "$@"; }

address() { if [ "$NET" = isolated ]; then echo "10.0.0.$((10 + $1))"; else echo 127.0.0.1; fi; }

# Nodes claim 128 CPUs, 1 TB and 8 GPUs: config_overrides makes Slurm believe it. The rest makes it quick to notice a
# dead node (300 s by default), to start a requeued job again (cred_expire, 120 s), and keeps it away from cgroups.
write_config() {
  local head=head k
  [ "$NET" = isolated ] || head=$(hostname -s)
  mkdir -p "$DIR"/{gpu,log,munge,spool,state,pids}
  chmod 711 "$DIR/munge"  # munged refuses what others can write to, clients have to reach the socket
  (umask 077 && head -c 128 /dev/urandom >"$DIR/munge/key")
  for k in {0..7}; do ln -s /dev/null "$DIR/gpu/nvidia$k"; done  # Slurm wants devices, but only counts them
  printf '%s\n' AutoDetect=off "Name=gpu Type=h100 File=$DIR/gpu/nvidia[0-7]" >"$DIR/gres.conf"
  cat >"$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=$head($([ "$NET" = isolated ] && echo 10.0.0.1 || echo 127.0.0.1))
SlurmctldPort=26817
SlurmUser=root
AuthInfo=socket=$DIR/munge/socket,cred_expire=8
SlurmctldPidFile=$DIR/pids/slurmctld
SlurmctldLogFile=$DIR/log/slurmctld
StateSaveLocation=$DIR/state
SlurmdPidFile=$DIR/pids/slurmd.%n
SlurmdLogFile=$DIR/log/slurmd.%n
SlurmdSpoolDir=$DIR/spool/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=1000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
MinJobAge=3600
SlurmdTimeout=6
TCPTimeout=2
MessageTimeout=5
KillWait=5
ReturnToService=2
SlurmdParameters=config_overrides
GresTypes=gpu
CONF
  {
    for ((k = 1; k <= NODES; k++)); do
      echo "NodeName=n$k NodeHostname=$([ "$NET" = isolated ] && echo "n$k" || echo "$head") NodeAddr=$(address $k)" \
        "Port=$((26817 + k)) CPUs=128 RealMemory=1000000 Gres=gpu:h100:8"
    done
    echo "PartitionName=main Nodes=ALL Default=yes PriorityTier=1 GraceTime=20"
    echo "PartitionName=urgent Nodes=ALL PriorityTier=2 PreemptMode=off"
  } >>"$SLURM_CONF"
  [ "$(slurmd -V | grep -oE '[0-9]+\.[0-9]+' | head -n1 | tr -d .)" -lt 2311 ] ||
    echo CgroupPlugin=disabled >"$DIR/cgroup.conf"
}

hosts() { for ((k = 1; k <= NODES; k++)); do echo "$(address $k) n$k"; done; }

start_daemons() {
  local k
  munged --key-file="$DIR/munge/key" --socket="$DIR/munge/socket" --pid-file="$DIR/pids/munged" \
    --log-file="$DIR/log/munged" --seed-file="$DIR/munge/seed"
  slurmctld -i
  for ((k = 1; k <= NODES; k++)); do start_node $k; done
}

# The first process of an isolated cluster; it stays to reap orphans.
site() {
  hostname head
  { printf "127.0.0.1 localhost\n10.0.0.1 head\n"; hosts; } >"$DIR/hosts"
  mount --bind "$DIR/hosts" /etc/hosts
  ip link set lo up
  ip link add switch type bridge
  ip addr add 10.0.0.1/24 dev switch
  ip link set switch up
  start_daemons
  while :; do wait || true; sleep 1; done
}

# The first process of an isolated node.
node() {
  hostname "n$1"
  mount -t tmpfs -o mode=1777 tmpfs /dev/shm
  ip link set lo up
  until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done
  ip addr add "$(address "$1")/24" dev eth0
  ip link set eth0 up
  slurmd -D -N "n$1" &
  while :; do wait || true; sleep 1; done
}

start_node() {
  mkdir -p "$DIR/spool/n$1"
  if [ "$NET" = shared ]; then
    slurmd -N "n$1"
    return
  fi
  namespaces "$BASH" "$SELF" _node "$1" >>"$DIR/log/n$1" 2>&1 </dev/null &
  local pid
  until pid=$(pgrep --oldest -f "^$BASH $SELF _node $1\$"); do sleep 0.02; done
  ip link add "veth$1" type veth peer name eth0 netns "$pid"
  ip link set "veth$1" master switch up
}

kill_node() {
  local p
  if [ "$NET" = isolated ]; then
    # the first process of a namespace takes all others with it, and its end of the cable
    run pkill -KILL -f "^$BASH $SELF _node $1\$"
    return
  fi
  # slurmd and its step daemons have the node's log open, their tasks carry its name; the daemons first, lest they tell
  for p in $(find /proc/[0-9]*/fd -lname "$DIR/log/slurmd.n$1" 2>/dev/null | cut -d/ -f3 | sort -u) \
    $(grep -lzxF "SLURMD_NODENAME=n$1" /proc/[0-9]*/environ 2>/dev/null | cut -d/ -f3); do
    if [ "$p" != $$ ]; then kill -KILL "$p" 2>/dev/null || true; fi
  done
}

run() {
  if [ "$NET" = shared ]; then "$@"; return; fi
  # a program that enters the namespaces would start in their root folder
  # shellcheck disable=SC2016
  nsenter --target "$(cat "$DIR/pids/site")" --all "$BASH" -c 'cd "$1" && shift && exec "$@"' - "$PWD" "$@"
}

up() {
  local i
  [ ! -e "$DIR/net" ] || die "a cluster is in $DIR already"
  NODES=$1 NET=${CLUSTER_NET:-shared}
  if [ -z "${CLUSTER_NET:-}" ] && namespaces true 2>/dev/null; then NET=isolated; fi
  mkdir -p "$DIR"
  echo "$NODES" >"$DIR/nodes"
  write_config
  echo "$NET" >"$DIR/net"
  if [ "$NET" = isolated ]; then
    namespaces "$BASH" "$SELF" _site "$DIR" >"$DIR/log/site" 2>&1 </dev/null &
    until pgrep --oldest -f "^$BASH $SELF _site $DIR\$" >"$DIR/pids/site"; do sleep 0.02; done
  else
    hosts | sed "s|\$| # $DIR|" >>/etc/hosts
    start_daemons
  fi
  for ((i = 0; i < 150; i++)); do
    [ "$(run sinfo --noheader --states=idle --format=%D 2>/dev/null | head -n1)" != "$NODES" ] || return 0
    [ "$NET" = shared ] || kill -0 "$(cat "$DIR/pids/site")" 2>/dev/null || break
    sleep 0.2
  done
  tail -n 20 "$DIR"/log/* >&2
  die "not every node has become idle in 30 s"
}

down() {
  local name
  if [ "$NET" = isolated ]; then
    kill -KILL "$(cat "$DIR/pids/site")" 2>/dev/null || true
  elif [ "$NET" = shared ]; then
    for ((k = 1; k <= NODES; k++)); do kill_node $k; done
    for name in slurmctld munged; do kill -KILL "$(cat "$DIR/pids/$name")" 2>/dev/null || true; done
    grep -v " # $DIR\$" /etc/hosts >"$DIR/hosts" || true
    cat "$DIR/hosts" >/etc/hosts  # not moved: in a container it is a mount
  fi
  rm -rf "$DIR"
}

case ${1:-} in
  up) up "${2:-2}" ;;
  run) run "${@:2}" ;;
  kill-node) kill_node "${2#n}" ;;
  start-node) if [ "$NET" = isolated ]; then run "$BASH" "$SELF" _start_node "${2#n}"; else start_node "${2#n}"; fi ;;
  down) down ;;
  _site) site ;;
  _node) node "$2" ;;
  _start_node) start_node "$2" ;;
  *) sed -n '2,/^set/{/^#/s/^#\( \|$\)//p}' "$SELF" >&2; exit 2 ;;
esac

#!/usr/bin/env bash
# A Ray cluster of logical nodes on this machine (Linux): a head that reads data, and a node of its own for each teacher
# and each student, at loopback addresses. Ray's GCS and raylets listen on the other interfaces all the same; token and
# TLS keep strangers out.
#
#   TEACHERS=2 STUDENTS=2 GPUS=0 cluster/local.sh start
#   eval "$(cluster/local.sh env)"   address, token and certificate, for `ray`, `betakd` and `ray job submit`
#   cluster/local.sh status
#   cluster/local.sh stop            ends what it started and nothing else (`ray stop` ends every Ray on the machine)
set -euo pipefail

TEACHERS=${TEACHERS:-1} STUDENTS=${STUDENTS:-1}
GPUS=${GPUS:-1}  # of each teacher and student node; logical, so they need not exist to try a placement
CPUS=${CPUS:-8}  # of each node, logical too: as many as cluster/pools.yaml asks for one process
PORT=${PORT:-6379} DASHBOARD_PORT=${DASHBOARD_PORT:-8265}
HEAD=127.0.0.2  # Ray replaces 127.0.0.1 by the machine's public address
DIR=${BETAKD_CLUSTER_DIR:-${TMPDIR:-/tmp}/betakd-$UID}  # short: Ray makes sockets in it, whose paths have 107 bytes

export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$DIR/token RAY_USAGE_STATS_ENABLED=0
export RAY_USE_TLS=1 RAY_TLS_SERVER_CERT=$DIR/tls/tls.crt RAY_TLS_SERVER_KEY=$DIR/tls/tls.key RAY_TLS_CA_CERT=$DIR/tls/ca.crt
export RAY_JOB_STOP_WAIT_TIME_S=300  # `ray job stop` kills a driver after 3 s otherwise: students save first
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0  # else `stop` waits 30 s a node for work to move elsewhere

fail() { echo "local.sh: $*" >&2; exit 1; }

running() { compgen -G "$DIR/*.pid" >/dev/null; }

# node NAME CPUS GPUS POOL RESOURCES OPTION...: one `ray start` that stays, leader of a process group of its own.
node() {
  local name=$1 cpus=$2 gpus=$3 pool=$4 resources=$5; shift 5
  setsid ray start --block --num-cpus="$cpus" --num-gpus="$gpus" --labels="betakd.io/pool=$pool" \
    --resources="$resources" --dashboard-agent-listen-port=0 "$@" >"$DIR/$name.log" 2>&1 &
  echo $! >"$DIR/$name.pid"
}

# gpu_node POOL N: the Nth node besides the head. It sees GPUs of its own, if the machine has so many.
gpu_node() {
  local pool=$1 n=$2 devices=""
  ((GPUS == 0)) || devices=$(seq -s, $(((n - 1) * GPUS)) $((n * GPUS - 1)))
  CUDA_VISIBLE_DEVICES=$devices node "$pool-$n" "$CPUS" "$GPUS" "$pool" "{\"${pool}_slot\": $((GPUS ? GPUS : 1))}" \
    --address="$HEAD:$PORT" --node-ip-address="127.0.0.$((2 + n))"
  await $((1 + n))  # one by one: nodes that start together take each other's log files and sockets
}

start() {
  running && fail "a cluster is running from $DIR: stop it first"
  command -v ray >/dev/null || fail "no ray command: activate the environment that has betakd_ray[cluster]"
  mkdir -p "$DIR"
  [[ -O $DIR ]] || fail "$DIR belongs to another user: set BETAKD_CLUSTER_DIR"
  chmod 700 "$DIR"
  (umask 077 && head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' >"$RAY_AUTH_TOKEN_PATH")
  certificate
  CUDA_VISIBLE_DEVICES="" node head "$CPUS" 0 cpu '{}' --head --port="$PORT" --node-ip-address=$HEAD --temp-dir="$DIR/ray" \
    --dashboard-host=127.0.0.1 --dashboard-port="$DASHBOARD_PORT"
  await 1
  local n
  for ((n = 1; n <= TEACHERS; n++)); do gpu_node teacher $n; done
  for ((n = TEACHERS + 1; n <= TEACHERS + STUDENTS; n++)); do gpu_node student $n; done
  environment >"$DIR/environment"
  status
  echo "Next: eval \"\$($0 env)\""
}

# certificate: one for all nodes, as all are on this machine, by an authority that is forgotten.
certificate() {
  local here addresses=(localhost)
  for ((here = 1; here <= 2 + TEACHERS + STUDENTS; here++)); do addresses+=("127.0.0.$here"); done
  here=$(dirname "${BASH_SOURCE[0]}")
  "$here/tls.sh" authority "$DIR/authority"
  "$here/tls.sh" node "$DIR/authority" "$DIR/tls" "${addresses[@]}"
  rm -r "$DIR/authority"
}

# await NODES: until so many are alive; a node that ends before is an error.
await() {
  local tries pid
  for ((tries = 0; tries < 120; tries++)); do
    for pid in "$DIR"/*.pid; do
      kill -0 "$(<"$pid")" 2>/dev/null || { stop; fail "${pid%.pid} ended, see ${pid%.pid}.log"; }
    done
    [[ $(nodes 2>/dev/null) -ge $1 ]] && return
    sleep 1
  done
  stop
  fail "$1 nodes are not up after 2 minutes, see $DIR/*.log"
}

nodes() { ray status --address="$HEAD:$PORT" | grep -c ' node_[0-9a-f]'; }

status() {
  running || fail "no cluster is running from $DIR"
  ray status --address="$HEAD:$PORT"
}

stop() {
  running || fail "no cluster is running from $DIR"
  local file pid own=()
  for file in "$DIR"/*.pid; do
    pid=$(<"$file")
    # The number may be another process's by now: only a session that `ray start` leads is ours.
    ! ps -o args= -p "$pid" | grep -q 'ray start --block' || own+=("$pid")
  done
  for pid in "${own[@]}"; do kill -TERM -- "-$pid" || true; done
  for pid in "${own[@]}"; do gone "$pid" || kill -KILL -- "-$pid"; done
  rm "$DIR"/*.pid
}

# gone GROUP: whether it ends within 20 s.
gone() {
  local tries
  for ((tries = 0; tries < 100; tries++)); do
    kill -0 -- "-$1" 2>/dev/null || return 0
    sleep 0.2
  done
  return 1
}

environment() {
  echo "export RAY_ADDRESS=$HEAD:$PORT RAY_API_SERVER_ADDRESS=http://127.0.0.1:$DASHBOARD_PORT"
  echo "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$RAY_AUTH_TOKEN_PATH"
  echo "export RAY_USE_TLS=1 RAY_TLS_SERVER_CERT=$RAY_TLS_SERVER_CERT RAY_TLS_SERVER_KEY=$RAY_TLS_SERVER_KEY RAY_TLS_CA_CERT=$RAY_TLS_CA_CERT"
}

case ${1:-} in
  start) start ;;
  stop) stop ;;
  status) status ;;
  env) running || fail "no cluster is running from $DIR"; cat "$DIR/environment" ;;
  *) fail "start, stop, status or env" ;;
esac

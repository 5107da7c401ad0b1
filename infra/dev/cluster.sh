#!/usr/bin/env bash
# A Ray cluster of two nodes on this machine, until Ctrl-C: `make cluster`. NODES, CPUS (of each), PORT and
# DASHBOARD_PORT may be set. Through Python, as `ray start` puts a second node on an address that others can reach.
set -euo pipefail
port=${PORT:-6379} dashboard=${DASHBOARD_PORT:-8265}

for taken in "PORT=$port" "DASHBOARD_PORT=$dashboard"; do
    if (exec 3<> "/dev/tcp/127.0.0.1/${taken#*=}") 2> /dev/null; then
        echo "cluster: port ${taken#*=} is taken: set ${taken%=*} to another" >&2
        exit 1
    fi
done

export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0
export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0  # loopback alone
loopback=lo
[[ $(uname) != Darwin ]] || loopback=lo0
export GLOO_SOCKET_IFNAME=$loopback NCCL_SOCKET_IFNAME=$loopback  # by which the workers of a training talk
export RAY_TMPDIR=${RAY_TMPDIR:-/tmp/ray-cluster}  # apart from /tmp/ray, where other Rays would find this one and join it
mkdir -p "$RAY_TMPDIR"
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN

exec python - "$port" "$dashboard" "${CPUS:-2}" "${NODES:-2}" << 'EOF'
import os
import signal
import sys

from ray.cluster_utils import Cluster

port, dashboard, cpus, nodes = map(int, sys.argv[1:])
ended = {signal.SIGINT, signal.SIGTERM}
node = {"num_cpus": cpus, "object_store_memory": 200_000_000}
head = {**node, "gcs_server_port": port, "include_dashboard": True, "dashboard_port": dashboard}
cluster = Cluster()
try:
    cluster.add_node(**head)
    for number in range(1, nodes):  # a raylet that starts empties the folder where it keeps jobs' code
        cluster.add_node(**node, runtime_env_dir_name=f"runtime_resources_{number}")
    signal.pthread_sigmask(signal.SIG_BLOCK, ended)
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")
    print(f"export RAY_ADDRESS={cluster.address}", *(f"{name}={os.environ[name]}" for name in names))
    print(f"# Jobs go to http://127.0.0.1:{dashboard}. Ctrl-C ends them.", flush=True)
    signal.sigwait(ended)
finally:
    cluster.shutdown()
EOF
